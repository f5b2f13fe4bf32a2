"""One job of a cache, made by this process, and a cache asked for single entries."""

from pathlib import Path

from latentfm.data.cache.fill import Job, make_missing


def fill_missing(cache, wanted, make, batch_size, *on_done, load=None, **options):
    """Makes what is missing of `wanted` (key, item) pictures; returns how many were made."""
    return make_missing(cache, Job("moments", wanted, make, batch_size, load), *on_done, **options)


def read(cache, key):
    """An entry's tensors. Raises KeyError when it is missing, InputError when it is damaged."""
    return cache.entries([key]).read(0)


def whole(cache, key):
    """Whether the entry is there and undamaged."""
    try:
        return cache.entries([key]).check(0) is None
    except KeyError:
        return False


def drop(cache, key):
    """Notes every copy of an entry as lost: it is missing from now on."""
    cache.refresh()
    while (place := cache.find([key])[0]) >= 0:
        cache.lose(Path(cache.paths[cache.index["shard"][place]]), key)
        cache.refresh()
