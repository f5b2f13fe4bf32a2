"""A run's data in a test: prepared by one process or several, nobody seeing the progress."""

from tiny import data_plan

from latentfm.data.cache.processes import ONE_PROCESS
from latentfm.data.from_options import prepared_data


def data_of(dataset, models, options, lengths, processes=ONE_PROCESS):
    """The data of a dataset, in the buckets that the options ask for."""
    return prepared_data(dataset, data_plan(options, models.folder, lengths), models, options, processes)


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
