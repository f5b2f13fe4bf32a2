"""The sources that a run's options describe."""

from latentfm.config import DataOptions, SourceOptions
from latentfm.data.sources import Columns, Dataset, Source, read_folder, read_sources
from latentfm.files import expanded


def open_dataset(options: DataOptions) -> Dataset:
    """The dataset of data.folder or data.sources. Raises InputError when there is nothing to train on."""
    if options.folder:
        return read_folder(expanded(options.folder))
    return read_sources([source(each) for each in options.sources])


def source(options: SourceOptions) -> Source:
    """The source that an entry of data.sources describes."""
    captions = options.caption_columns or {}
    columns = Columns(options.image_column, {captions: 1.0} if isinstance(captions, str) else captions, options.mask_column)
    kind = "datasets" if options.dataset else options.kind
    return Source(
        options.path or options.url or options.dataset, kind, columns, options.name, options.repeats, options.weight,
        options.regularisation, options.subset, options.split, options.revision, options.streaming,
    )  # fmt: skip
