"""The sources that a run's options describe."""

from latentfm.config import DataOptions, SourceOptions
from latentfm.data.sources import Columns, Dataset, Source, read_folder, read_sources
from latentfm.files import expanded


def open_dataset(options: DataOptions) -> Dataset:
    """The dataset of data.folder or data.sources. Raises InputError when there is nothing to train on."""
    if options.folder:
        return read_folder(expanded(options.folder), Columns(caption=stripped(options.caption)))
    return read_sources([source(each, options.caption) for each in options.sources])


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
