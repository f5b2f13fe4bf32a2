"""Several sources as one: which kind each is, read in turn, with its share of the draws and ids that do not clash."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from latentfm.data.cache.stat_cache import NOTHING_KEPT, StatCache
from latentfm.data.sources.base import Columns, Dataset, Problem, Sample, Share, is_image
from latentfm.data.sources.folder import read_folder
from latentfm.data.sources.hub import is_saved, read_dataset
from latentfm.data.sources.listing import METADATA_NAMES
from latentfm.data.sources.shards import SUFFIXES, read_shards
from latentfm.data.sources.tables import read_parquet
from latentfm.errors import InputError
from latentfm.words import listed, shown

KINDS = ("folder", "parquet", "webdataset", "datasets")


@dataclass(frozen=True)
class Source:
    """One source: `place` is a path, an fsspec URL or the name of a dataset; `kind` one of KINDS, or None to look.

    Each sample is drawn `repeats` x `weight` times an epoch, in the mean; see `latentfm.data.mixture`. `name` stands before the ids of
    its samples; None is the last part of `place`.
    """

    place: str
    kind: str | None = None
    columns: Columns = field(default_factory=Columns)
    name: str | None = None
    repeats: int = 1
    weight: float = 1.0
    regularisation: bool = False
    subset: str | None = None  # this and what follows: of datasets alone
    split: str | None = None
    revision: str | None = None
    streaming: bool = False

    def named(self) -> str:
        """The name its ids begin with."""
        return self.name or re.split(r"[/\\]", self.place.rstrip("/\\"))[-1]


def read_sources(sources: Sequence[Source], kept: StatCache = NOTHING_KEPT) -> Dataset:
    """Returns the samples of all sources, in their order, ids as "<name>/<id>", and their problems. No picture is decoded.

    A source whose listing is `kept` is not read.

    Raises InputError for two sources of one name, a kind that cannot be told, and what the kind's reader raises.
    """
    names = [source.named() for source in sources]
    for name in names:
        if names.count(name) > 1:
            called = f"{names.count(name)} sources are called '{shown(name)}'"
            raise InputError(f"{called}: give each a name of its own, as in name: {shown(name)}-2")
    samples: list[Sample] = []
    problems: list[Problem] = []
    pictures = 0
    for name, source in zip(names, sources, strict=True):
        found = read_source(source, kept)
        share = Share(name, source.repeats * source.weight, source.regularisation)
        samples += [replace(sample, id=f"{name}/{sample.id}", share=share) for sample in found.samples]
        problems += [replace(problem, path=f"{name}/{problem.path}") for problem in found.problems]
        pictures += found.pictures
    if all(source.regularisation for source in sources):
        raise InputError(f"{listed(names)}: regularisation alone, nothing to train; leave regularisation out, or add a source")
    return Dataset(", ".join(source.place for source in sources), tuple(samples), tuple(problems), pictures)


def read_source(source: Source, kept: StatCache = NOTHING_KEPT) -> Dataset:
    """Returns one source's samples, with the ids its own kind gives."""
    kind = source.kind or kind_of(source.place)
    if kind == "datasets":
        return read_dataset(
            source.place, source.columns, source.subset, source.split or "train", source.revision, source.streaming, kept
        )
    given = [name for name in ("subset", "split", "revision", "streaming") if getattr(source, name)]
    if given:
        what = f"{shown(source.place)} is of the kind {kind}, which has no {', '.join(given)}"
        raise InputError(f"{what}; leave it out, or give kind: datasets")
    if kind == "folder":
        return read_folder(source.place, source.columns, kept)
    if kind == "webdataset":
        return read_shards(source.place, source.columns, kept)
    return read_parquet(source.place, source.columns, kept)


def kind_of(place: str) -> str:
    """Returns the kind of what is at a path or URL, told by its name or, for a folder, by what it holds. Raises InputError."""
    name = PurePosixPath(place).name.lower()
    if name.endswith((".parquet", *SUFFIXES)):
        return "parquet" if name.endswith(".parquet") else "webdataset"
    root = Path(os.path.expanduser(place))
    if not root.is_dir():
        if "://" in place:
            raise InputError(f"cannot tell what {shown(place)} is: give its kind, one of {', '.join(KINDS)}")
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
