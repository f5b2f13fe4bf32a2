"""A run's data in a test: prepared by one process or several, nobody seeing the progress."""

from latentfm.data.buckets import Buckets
from latentfm.data.cache.processes import ONE_PROCESS
from latentfm.data.from_options import prepared_data
from latentfm.training.models import picture_size


def data_of(dataset, models, options, lengths, processes=ONE_PROCESS):
    """The data of a dataset, in the buckets that the options ask for."""
    network = models.network.config
    multiple = models.factor * network.patch_size
    largest = network.pos_embed_max_size * multiple
    buckets = Buckets.make(*picture_size(options, models), multiple, options.buckets, options.max_aspect, largest)
    return prepared_data(dataset, buckets, models, options, lengths, processes)


class Quiet:
    """A progress bar that nobody sees."""

    def add_task(self, description, total):
        return 0

    def advance(self, task, count):
        pass

    def update(self, task, description):
        pass

    def remove_task(self, task):
        pass
