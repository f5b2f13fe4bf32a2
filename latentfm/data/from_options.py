"""The data of a run, as its options describe it."""

from latentfm.config import DataOptions
from latentfm.data.buckets import DataPlan
from latentfm.data.cache.processes import ONE_PROCESS, Processes
from latentfm.data.cache.stat_cache import NOTHING_KEPT, StatCache
from latentfm.data.cached import CachedData
from latentfm.data.inventory import Inventory
from latentfm.data.online import OnlineData
from latentfm.data.prepared import PreparedData
from latentfm.data.sources import Columns, Dataset, read_folder, read_sources
from latentfm.errors import InputError
from latentfm.files import expanded
from latentfm.interchange.frozen import FrozenModels


def open_dataset(options: DataOptions, kept: StatCache = NOTHING_KEPT, processes: Processes = ONE_PROCESS) -> Dataset:
    """The dataset of data.folder or data.sources, read by the first process where its listing is not `kept`.

    Raises InputError when there is nothing to train on.
    """
    if options.pairs is not None:
        raise InputError("data.pairs hold no pictures to look at; give data.folder or data.sources instead")
    if options.folder:
        columns = Columns(caption=options.caption and options.caption.strip())
        return processes.first(lambda: read_folder(expanded(options.folder), columns, kept), "sources")
    return processes.first(lambda: read_sources(options.sources, kept, options.caption), "sources")


def prepared_data(
    dataset: Dataset, plan: DataPlan, models: FrozenModels, options: DataOptions, processes: Processes = ONE_PROCESS
) -> PreparedData:
    """A dataset's data out of the cache, or with data.online encoded at every step; `prepare` has still to be called."""
    inventory = Inventory(dataset, plan, options.flip, processes, StatCache(expanded(options.cache)))
    return (OnlineData if options.online else CachedData)(inventory, models, options, sorted(plan.t5_lengths), processes)
