"""Rows of a table -> samples, and parquet files: the picture as bytes in a cell, or as a path beside the file."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from latentfm.data.sources.base import (
    Columns,
    Dataset,
    Forward,
    Place,
    Problem,
    Sample,
    Unusable,
    captions_of,
    nothing_usable,
    path_within,
    sha256,
)
from latentfm.data.sources.urls import expand, open_url
from latentfm.errors import InputError

ROWS_AT_ONCE = 16  # pictures held while one is read
WAY_OUT = "each row needs a picture (bytes, or the path of a file) and a caption"

Fetch = Callable[[int], Mapping[str, Any]]  # row number -> the row


def read_parquet(place: str, columns: Columns | None = None) -> Dataset:
    """Returns a sample a row of a parquet file, of several ("part-*.parquet") or of a folder of them; ids are "<file>:<row>", rows from 0.

    The picture is a cell of bytes, Hugging Face's {"bytes", "path"}, or a path relative to the file's folder; the mask likewise.
    `place` may be any fsspec URL. Every picture is read once to know its hash, ROWS_AT_ONCE held at a time, and again when asked for.

    Raises InputError when there is no file, no usable row, or a column that `columns` names.
    """
    import pyarrow as pa

    samples: list[Sample] = []
    problems: list[Problem] = []
    files = expand(place, [".parquet"])
    for file, name in zip(files, short(files), strict=True):
        try:
            found = (columns or Columns()).found_in(column_names(file), file)
            wanted = [found.image, *found.captions, *([found.mask] if found.mask else [])]
            again = Forward(partial(parquet_rows, file, wanted))
            folder = file.rpartition("/")[0]
            samples_of(parquet_rows(file, wanted), found, name, again.__getitem__, partial(beside, folder), samples, problems)
        except (pa.ArrowException, OSError) as error:
            problems.append(Problem(f"{name} ({' '.join(str(error).split())})", "parquet file that cannot be read, or not to its end"))
    if not samples:
        raise nothing_usable(place, problems, WAY_OUT)
    return Dataset(place, tuple(samples), tuple(problems))


def column_names(file: str) -> list[str]:
    """Returns the names of a parquet file's columns."""
    import pyarrow.parquet as pq

    with open_url(file) as opened:
        return list(pq.ParquetFile(opened).schema_arrow.names)


def parquet_rows(file: str, columns: list[str]) -> Iterator[Mapping[str, Any]]:
    """Yields the rows of a parquet file as {column: value}, a few in memory at a time."""
    import pyarrow.parquet as pq

    with open_url(file) as opened:
        table = pq.ParquetFile(opened, buffer_size=1 << 20, pre_buffer=False)  # else pyarrow holds whole column chunks
        for batch in table.iter_batches(ROWS_AT_ONCE, columns=columns):
            yield from batch.to_pylist()


def samples_of(
    rows: Iterable[Mapping[str, Any]], columns: Columns, name: str, fetch: Fetch, read_path: Callable[[str], bytes],
    samples: list[Sample], problems: list[Problem],
) -> None:  # fmt: skip
    """Appends a sample, or a problem, for each row; ids are "<name>:<row>". What is appended stays when `rows` breaks off.

    `fetch` gives a row again when its picture is wanted; `read_path` reads a picture that a cell names instead of holding it.
    """
    for number, row in enumerate(rows):
        id = f"{name}:{number}"
        try:
            captions, weights = captions_of(row, columns.captions)
            places = {}
            for column in [columns.image, *([columns.mask] if columns.mask and row[columns.mask] is not None else [])]:
                read = partial(cell, fetch, number, column, read_path)
                try:
                    places[column] = Place(f"{id} {column}", read, sha256(bytes_of(row[column], read_path)))
                except OSError:
                    raise Unusable("row whose picture or mask is missing") from None
            samples.append(Sample(places[columns.image], captions, id, weights, places.get(columns.mask)))
        except Unusable as error:
            problems.append(Problem(id, str(error)))


def cell(fetch: Fetch, number: int, column: str, read_path: Callable[[str], bytes]) -> bytes:
    """Returns the picture in a row's column. Raises OSError when it is not there any more."""
    try:
        return bytes_of(fetch(number)[column], read_path)
    except Unusable as error:
        raise OSError(f"{error}; it was changed since it was listed") from error


def bytes_of(value: Any, read_path: Callable[[str], bytes]) -> bytes:
    """Returns the bytes of a cell: bytes, {"bytes", "path"}, or a path. Raises Unusable for anything else, OSError for a missing file."""
    if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return read_path(value)
    raise Unusable("row without a picture" if value is None else "row whose picture is neither bytes nor a path")


def beside(folder: str, name: str) -> bytes:
    """Returns the bytes of the file `name` in `folder`. Raises Unusable when it leads out of the folder, OSError when it is missing."""
    with open_url(f"{folder}/{path_within(name, 'picture')}" if folder else path_within(name, "picture")) as file:
        return file.read()


def short(files: list[str]) -> list[str]:
    """Returns the files' names without their folders. Raises InputError when two are the same."""
    names = [file.rpartition("/")[2] for file in files]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"two files are called {twice}: their samples could not be told apart; rename one, or make them two sources")
    return names
