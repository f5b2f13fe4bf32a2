"""One job of a cache, made by this process."""

from latentfm.data.cache.fill import Job, make_missing


def fill_missing(cache, wanted, make, batch_size, *on_done, load=None, **options):
    """Makes what is missing of `wanted` (key, item) pictures; returns how many were made."""
    return make_missing(cache, Job("moments", wanted, make, batch_size, load), *on_done, **options)
