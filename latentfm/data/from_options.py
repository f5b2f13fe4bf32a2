"""The data of a run, as its options describe it."""

from latentfm.config import DataOptions, SourceOptions
from latentfm.data.buckets import DataPlan
from latentfm.data.cache.processes import ONE_PROCESS, Processes
from latentfm.data.cache.stat_cache import NOTHING_KEPT, StatCache
from latentfm.data.cached import CachedData
from latentfm.data.inventory import Inventory
from latentfm.data.online import OnlineData
from latentfm.data.prepared import PreparedData
from latentfm.data.sources import Columns, Dataset, Source, read_folder, read_sources
from latentfm.files import expanded
from latentfm.interchange.frozen import FrozenModels


def open_dataset(options: DataOptions, kept: StatCache = NOTHING_KEPT, processes: Processes = ONE_PROCESS) -> Dataset:
    """The dataset of data.folder or data.sources, read by the first process where its listing is not `kept`.

    Raises InputError when there is nothing to train on.
    """
    if options.folder:
        columns = Columns(caption=stripped(options.caption))
        return processes.first(lambda: read_folder(expanded(options.folder), columns, kept), "sources")
    return processes.first(lambda: read_sources([source(each, options.caption) for each in options.sources], kept), "sources")


def prepared_data(
    dataset: Dataset, plan: DataPlan, models: FrozenModels, options: DataOptions, processes: Processes = ONE_PROCESS
) -> PreparedData:
    """A dataset's data out of the cache, or with data.online encoded at every step; `prepare` has still to be called."""
    inventory = Inventory(dataset, plan, options.flip, processes, StatCache(expanded(options.cache)))
    return (OnlineData if options.online else CachedData)(inventory, models, options, sorted(plan.t5_lengths), processes)


def source(options: SourceOptions, caption: str | None = None) -> Source:
    """The source that an entry of data.sources describes; `caption` is every picture's one caption where it says nothing of captions."""
    captions = options.caption_columns or {}
    caption = options.caption if options.caption is not None or captions else caption
    columns = Columns(
        options.image_column, {captions: 1.0} if isinstance(captions, str) else captions, options.mask_column, stripped(caption)
    )
    kind = "datasets" if options.dataset else options.kind
    return Source(
        options.path or options.url or options.dataset, kind, columns, options.name, options.repeats, options.weight,
        options.regularisation, options.subset, options.split, options.revision, options.streaming,
    )  # fmt: skip


def stripped(caption: str | None) -> str | None:
    """A caption without the white space around it, as captions in files are read."""
    return None if caption is None else caption.strip()
