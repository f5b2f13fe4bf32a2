"""Several sources as one: which kind each is, read in turn, with its share of the draws and ids that do not clash."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import get_args

from latentfm.config import SourceKind, SourceOptions
from latentfm.data.cache.stat_cache import NOTHING_KEPT, StatCache
from latentfm.data.sources.base import Columns, Dataset, Problem, Sample, Share, is_image
from latentfm.data.sources.folder import read_folder
from latentfm.data.sources.hub import is_saved, read_dataset
from latentfm.data.sources.listing import METADATA_NAMES
from latentfm.data.sources.shards import SUFFIXES, read_shards
from latentfm.data.sources.tables import read_parquet
from latentfm.errors import InputError
from latentfm.words import listed, shown


def read_sources(sources: Sequence[SourceOptions], kept: StatCache = NOTHING_KEPT, caption: str | None = None) -> Dataset:
    """The samples of all sources, in their order, ids as "<title>/<id>", and their problems. No picture is decoded.

    Each sample is drawn repeats x weight times an epoch, in the mean; see `latentfm.data.mixture`. A source whose listing is `kept` is not
    read. `caption` is every picture's one caption where its source says nothing of captions.

    Raises InputError for two sources of one title, a kind that cannot be told, and what the kind's reader raises.
    """
    names = [source.title for source in sources]
    for name in names:
        if names.count(name) > 1:
            called = f"{names.count(name)} sources are called '{shown(name)}'"
            raise InputError(f"{called}: give each a name of its own, as in name: {shown(name)}-2")
    samples: list[Sample] = []
    problems: list[Problem] = []
    pictures = 0
    for name, source in zip(names, sources, strict=True):
        found = read_source(source, columns_of(source, caption), kept)
        share = Share(name, source.repeats * source.weight, source.regularisation)
        samples += [replace(sample, id=f"{name}/{sample.id}", share=share) for sample in found.samples]
        problems += [replace(problem, path=f"{name}/{problem.path}") for problem in found.problems]
        pictures += found.pictures
    if all(source.regularisation for source in sources):
        raise InputError(f"{listed(names)}: regularisation alone, nothing to train; leave regularisation out, or add a source")
    return Dataset(", ".join(source.place for source in sources), tuple(samples), tuple(problems), pictures)


def columns_of(source: SourceOptions, caption: str | None) -> Columns:
    """Which columns of a source hold what; `caption` as for `read_sources`."""
    captions = source.caption_columns or {}
    caption = source.caption if source.caption is not None or captions else caption
    return Columns(
        source.image_column, {captions: 1.0} if isinstance(captions, str) else captions, source.mask_column, caption and caption.strip()
    )


def read_source(source: SourceOptions, columns: Columns, kept: StatCache) -> Dataset:
    """One source's samples, with the ids its own kind gives."""
    place, kind = source.place, source.kind or ("datasets" if source.dataset else kind_of(source.place))
    if kind == "datasets":
        return read_dataset(place, columns, source.subset, source.split or "train", source.revision, source.streaming, kept)
    given = [name for name in ("subset", "split", "revision", "streaming") if getattr(source, name)]
    if given:
        what = f"{shown(place)} is of the kind {kind}, which has no {', '.join(given)}"
        raise InputError(f"{what}; leave it out, or give kind: datasets")
    return {"folder": read_folder, "parquet": read_parquet, "webdataset": read_shards}[kind](place, columns, kept)


def kind_of(place: str) -> str:
    """Returns the kind of what is at a path or URL, told by its name or, for a folder, by what it holds. Raises InputError."""
    name = PurePosixPath(place).name.lower()
    if name.endswith((".parquet", *SUFFIXES)):
        return "parquet" if name.endswith(".parquet") else "webdataset"
    root = Path(os.path.expanduser(place))
    if not root.is_dir():
        if "://" in place:
            raise InputError(f"cannot tell what {shown(place)} is: give its kind, one of {', '.join(get_args(SourceKind))}")
        return "folder"  # whose reader says what is wrong with it
    if is_saved(root):
        return "datasets"
    try:
        files = sorted(name.lower() for name in os.listdir(root) if not name.startswith("."))
    except OSError:
        return "folder"
    if any(name in METADATA_NAMES or is_image(name) for name in files):
        return "folder"
    if any(name.endswith(SUFFIXES) for name in files):
        return "webdataset"
    return "parquet" if any(name.endswith(".parquet") for name in files) else "folder"
