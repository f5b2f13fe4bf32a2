"""Hugging Face `datasets` -> samples: saved on disk, on the hub, or streamed."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from latentfm.data.cache.stat_cache import NOTHING_KEPT, StatCache
from latentfm.data.sources.base import Columns, Dataset, Forward, Problem, Sample, finished, nothing_usable, path_within
from latentfm.data.sources.kept import kept_listing
from latentfm.data.sources.listing import check_files, walk
from latentfm.data.sources.tables import WAY_OUT, cell, is_pointer, samples_of
from latentfm.data.sources.texts import FETCH, Unusable
from latentfm.data.sources.urls import read_beside, read_whole
from latentfm.errors import InputError, nearest
from latentfm.files import any_error_told, expanded, read_json
from latentfm.words import listed, shown

SAVED_FILES = ("dataset_dict.json", "state.json")  # what save_to_disk writes
ARCHIVES = ("zip", "tar", "gzip", "bz2", "xz", "zstd")  # as in zip://0.png::hf://datasets/name/0.zip


def read_dataset(
    name: str, columns: Columns | None = None, subset: str | None = None, split: str = "train", revision: str | None = None,
    streaming: bool = False, kept: StatCache = NOTHING_KEPT,
) -> Dataset:  # fmt: skip
    """A sample a row of a dataset: a folder that save_to_disk wrote, or what datasets.load_dataset takes; ids are "<split>:<row>".

    Cells are as in parquet files: one that names a file is read where the file lies in the dataset's own folder or repository, and
    refused elsewhere. Every row is read once, in order, to know its pictures' hashes; later a row is fetched by number or, of a stream, by
    reading on to it. A dataset that cannot be read to its end is refused: half of it would be another dataset. The listing of a folder is
    kept, that of a dataset on the hub is not.

    Raises InputError when there is no such dataset, subset or split, when reading fails, when `columns` names a column that is not there
    or no row is usable.
    """
    rows = Rows(name, columns or Columns(), subset, split, revision, streaming)
    folder = os.path.abspath(expanded(name))
    files = [found.path for found in walk(folder) if found.kind is None] if os.path.isdir(folder) else None
    about = (folder, columns, subset, split, streaming)
    return kept_listing(kept, "datasets", about, files, name, rows, lambda: (list_dataset(name, split, rows), ()))


def list_dataset(name: str, split: str, rows: "Rows") -> Dataset:
    """The samples of a dataset, read once in order."""
    samples: list[Sample] = []
    problems: list[Problem] = []
    data, columns = rows.open()
    with any_error_told(lambda why: failed(name, why, len(samples) + len(problems))):
        if hasattr(data, "__len__"):
            data.data.table.validate(full=True)  # Arrow follows the offsets in its files without looking where they lead
        samples_of(data, columns, split, rows, (), reader_of(name), samples, problems)
    if not samples:
        raise nothing_usable(name, problems, WAY_OUT)
    return finished(name, samples, problems, len(samples) + len(problems))


def failed(name: str, why: str, done: int = 0) -> str:
    return f"reading the dataset {shown(name)} failed after {done:,} rows ({why}); start again"


class Rows:
    """The rows of a dataset, opened when the first is asked for."""

    def __init__(self, name: str, columns: Columns, subset: str | None, split: str, revision: str | None, streaming: bool):
        self.name, self.columns, self.given = name, columns, (subset, split, revision, streaming)
        self.found: tuple[Any, Columns] | None = None
        self.row: Any = None  # fetches a row by number

    def open(self) -> tuple[Any, Columns]:
        """(the dataset, its pictures as they are stored, the columns that are read). Raises InputError."""
        if self.found is None:
            data = opened(self.name, *self.given)
            with any_error_told(lambda why: failed(self.name, why)):
                names = data.column_names or list(next(iter(data), {}))
                columns = self.columns.found_in(names, f"the dataset {self.name}")
                data = without_decoding(data.select_columns([column for column in names if column in wanted(columns)]), columns)
            self.found, self.row = (data, columns), data if hasattr(data, "__len__") else Forward(partial(iter, data))
        return self.found

    def __call__(self, number: int, column: str) -> bytes:
        """The picture in a row's column. Raises OSError when it is not there any more."""
        self.open()
        return cell(self.row[number].get(column), reader_of(self.name))


def opened(name: str, subset: str | None, split: str, revision: str | None, streaming: bool) -> Any:
    """One split as a datasets.Dataset or IterableDataset. Raises InputError."""
    import datasets

    folder = expanded(name)
    with any_error_told(lambda why: f"cannot open the dataset {shown(name)}: {why}"):
        if folder.is_dir():
            check_files(folder)
        if is_saved(folder):
            check_saved(folder)
            data = datasets.load_from_disk(str(folder))
        else:
            data = datasets.load_dataset(str(folder) if folder.is_dir() else name, subset, revision=revision, streaming=streaming)
    if isinstance(data, dict):
        if split not in data:
            there = f"{shown(nearest(split, data))}; there are {listed(data, 50)}"
            raise InputError(f"the dataset {shown(name)} has no split '{shown(split)}'{there}")
        data = data[split]
    return data.to_iterable_dataset() if streaming and isinstance(data, datasets.Dataset) else data


def is_saved(folder: Path) -> bool:
    """Whether save_to_disk wrote this folder."""
    return any((folder / file).is_file() for file in SAVED_FILES)


def check_saved(folder: Path) -> None:
    """Raises InputError when the files of a saved dataset name others outside it, or are Git LFS pointers."""
    splits = [folder]
    if (folder / "dataset_dict.json").is_file():
        splits = [folder / inside(split, folder) for split in read_json(folder / "dataset_dict.json").get("splits") or ()]
    for split in splits:
        for entry in read_json(split / "state.json").get("_data_files") or ():
            file = split / inside(entry.get("filename") if isinstance(entry, dict) else entry, split)
            if is_pointer(str(file)):
                raise InputError(f"{shown(file)} is a {FETCH}")


def inside(name: object, folder: Path) -> str:
    try:
        return path_within(name, "file")
    except Unusable as error:
        raise InputError(f"the dataset in {shown(folder)} is damaged: an entry {error}; save it again") from None


def reader_of(name: str) -> Callable[[str], bytes]:
    """What reads a file that a cell of the dataset `name` names; it raises Unusable for one that is not the dataset's own."""
    if Path(name).expanduser().is_dir():
        return partial(read_inside, str(Path(name).expanduser()))
    return partial(read_of_hub, name)


def read_inside(folder: str, path: str) -> bytes:
    """The bytes of a file in `folder`, or in an archive there."""
    inner, chained, archive = path.rpartition("::")
    if chained:
        return read_whole(f"{archived(inner)}::{os.path.join(folder, path_within(archive, 'picture', Path(folder)))}")
    return read_beside(folder, path)


def read_of_hub(name: str, path: str) -> bytes:
    """The bytes of a file of a dataset on the hub, there or where `datasets` and the hub's client keep what they fetched."""
    import datasets
    from huggingface_hub import constants

    inner, chained, place = path.rpartition("::")
    if place.startswith((f"hf://datasets/{name}/", f"hf://datasets/{name}@")) and "/../" not in place:
        return read_whole(f"{archived(inner)}::{place}" if chained else place)
    for folder in map(str, (datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH, constants.HF_HUB_CACHE)):
        try:
            path_within(place, "picture", Path(folder))
        except Unusable:
            continue
        return read_inside(folder, path)
    raise Unusable("row whose picture leads out of the folder")


def archived(inner: str) -> str:
    """The parts of a chained URL before its last, all of them archives. Raises Unusable for others."""
    if any(part.split("://")[0] not in ARCHIVES for part in inner.split("::")):
        raise Unusable("row whose picture leads out of the folder")
    return inner


def wanted(columns: Columns) -> set[str]:
    return {columns.image, *columns.captions, *([columns.mask] if columns.mask else [])}


def without_decoding(data: Any, columns: Columns) -> Any:
    """The dataset with its pictures as {"bytes", "path"}, as they are stored: their hash is that of the file."""
    import datasets

    for column in (columns.image, columns.mask):
        if column and isinstance((data.features or {}).get(column), datasets.Image):
            data = data.cast_column(column, datasets.Image(decode=False))
    return data
