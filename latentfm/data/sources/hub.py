"""Hugging Face `datasets` -> samples: saved on disk, on the hub, or streamed."""

from functools import partial
from pathlib import Path
from typing import Any

from latentfm.data.sources.base import Columns, Dataset, Forward, Problem, Sample, nothing_usable
from latentfm.data.sources.tables import WAY_OUT, samples_of
from latentfm.data.sources.urls import open_url
from latentfm.errors import InputError, nearest
from latentfm.files import expanded

SAVED_FILES = ("dataset_dict.json", "state.json")  # what save_to_disk writes


def read_dataset(
    name: str, columns: Columns | None = None, subset: str | None = None, split: str = "train", revision: str | None = None,
    streaming: bool = False,
) -> Dataset:  # fmt: skip
    """Returns a sample a row of a dataset: a folder that save_to_disk wrote, or what datasets.load_dataset takes; ids are "<split>:<row>".

    Cells are as in parquet files. Every row is read once, in order, to know its pictures' hashes; later a row is fetched by number or, of a
    stream, by reading on to it. A dataset that cannot be read to its end is refused: half of it would be another dataset.

    Raises InputError when there is no such dataset, subset or split, when reading fails, when `columns` names a column that is not there
    or no row is usable.
    """
    data = opened(name, subset, split, revision, streaming)
    names = data.column_names or list(next(iter(data), {}))
    columns = (columns or Columns()).found_in(names, f"the dataset {name}")
    data = without_decoding(data.select_columns([column for column in names if column in wanted(columns)]), columns)
    fetch = data.__getitem__ if hasattr(data, "__len__") else Forward(partial(iter, data)).__getitem__
    samples: list[Sample] = []
    problems: list[Problem] = []
    try:
        samples_of(data, columns, split, fetch, read_path, samples, problems)
    except Exception as error:  # a stream's storage, a decoder, Arrow: each raises its own
        done = len(samples) + len(problems)
        raise InputError(f"reading the dataset {name} failed after {done} rows ({one_line(error)}); start again") from error
    if not samples:
        raise nothing_usable(name, problems, WAY_OUT)
    return Dataset(name, tuple(samples), tuple(problems))


def opened(name: str, subset: str | None, split: str, revision: str | None, streaming: bool) -> Any:
    """Returns one split as a datasets.Dataset or IterableDataset."""
    import datasets

    folder = expanded(name)
    try:
        if is_saved(folder):
            data = datasets.load_from_disk(str(folder))
        else:
            data = datasets.load_dataset(str(folder) if folder.is_dir() else name, subset, revision=revision, streaming=streaming)
    except Exception as error:
        raise InputError(f"cannot open the dataset {name}: {one_line(error)}") from error
    if isinstance(data, dict):
        if split not in data:
            raise InputError(f"the dataset {name} has no split '{split}'{nearest(split, data)}; there are {', '.join(data)}")
        data = data[split]
    return data.to_iterable_dataset() if streaming and isinstance(data, datasets.Dataset) else data


def is_saved(folder: Path) -> bool:
    """Whether save_to_disk wrote this folder."""
    return any((folder / file).is_file() for file in SAVED_FILES)


def wanted(columns: Columns) -> set[str]:
    return {columns.image, *columns.captions, *([columns.mask] if columns.mask else [])}


def without_decoding(data: Any, columns: Columns) -> Any:
    """Returns the dataset with its pictures as {"bytes", "path"}, as they are stored: their hash is that of the file."""
    import datasets

    for column in (columns.image, columns.mask):
        if column and isinstance((data.features or {}).get(column), datasets.Image):
            data = data.cast_column(column, datasets.Image(decode=False))
    return data


def read_path(path: str) -> bytes:
    """Returns the bytes of a file that a cell names. Raises OSError."""
    with open_url(path) as file:
        return file.read()


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
