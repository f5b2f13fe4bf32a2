"""Rows of a table -> samples, and parquet files: the picture as bytes in a cell, or as a path beside the file."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from latentfm.data.cache.stat_cache import NOTHING_KEPT, StatCache
from latentfm.data.sources.base import (
    PICTURE_BYTES,
    Columns,
    Dataset,
    Forward,
    Place,
    Problem,
    Sample,
    captions_of,
    finished,
    nothing_usable,
    sha256,
)
from latentfm.data.sources.kept import kept_listing
from latentfm.data.sources.texts import FETCH, POINTER, Unusable
from latentfm.data.sources.urls import UNFOLDED_BYTES, UNFOLDED_TIMES, expand, names_of, open_url, read_beside
from latentfm.errors import InputError
from latentfm.files import CONTENT_ERRORS, SpecialFile, reason

ROWS_AT_ONCE, FEW_ROWS = 16, 4  # pictures held while one is read; few where the rows of a group might be very large ones
LARGE_GROUP = 64 * 2**20  # bytes of a row group: one row may have them all
WAY_OUT = "each row needs a picture (bytes, or the path of a file) and a caption"
BROKEN = "parquet file that cannot be read, or not to its end"
TOO_MUCH = f"parquet file that unfolds to more than {UNFOLDED_TIMES} times its size, the rest of it is lost"


def read_parquet(place: str, columns: Columns | None = None, kept: StatCache = NOTHING_KEPT) -> Dataset:
    """A sample a row of a parquet file, of several ("part-*.parquet") or of a folder of them; ids are "<file>:<row>", rows from 0.

    The picture is a cell of bytes, Hugging Face's {"bytes", "path"}, or a path in the file's folder; the mask likewise.
    `place` may be any fsspec URL. Every picture is read once to know its hash, ROWS_AT_ONCE held at a time, and again when asked for.

    Raises InputError when there is no file, no usable row, or a column that `columns` names.
    """
    columns, files = columns or Columns(), expand(place, [".parquet"])
    read = Cells()
    return kept_listing(kept, "parquet", (files, columns), files, place, read, lambda: list_parquet(place, files, columns, read))


def list_parquet(place: str, files: Sequence[str], columns: Columns, read: "Cells") -> tuple[Dataset, list[str]]:
    """(the samples of parquet files, each read once, the picture files that their cells name); a sample's bytes are fetched by `read`."""
    import pyarrow as pa

    samples: list[Sample] = []
    rows: list[Problem] = []
    broken: list[Problem] = []
    beside: list[str] = []
    for file, name in zip(files, names_of(files, "files"), strict=True):
        try:
            found = columns.found_in(column_names(file), file)
            wanted = [found.image, *found.captions, *([found.mask] if found.mask else [])]
            pictures = [found.image, *([found.mask] if found.mask else [])]
            read_path = partial(read_beside, file.rpartition("/")[0], noted=beside)
            samples_of(parquet_rows(file, wanted), found, name, read, (file, pictures), read_path, samples, rows)
        except MemoryError:  # Arrow's own is one of its exceptions too
            raise
        except SpecialFile as error:
            broken.append(Problem(f"{name} ({error})", BROKEN))
        except Unusable as error:
            broken.append(Problem(name, str(error)))
        except InputError:
            raise
        except (pa.ArrowException, *CONTENT_ERRORS) as error:
            broken.append(Problem(f"{name} ({reason(error)})", FETCH if is_pointer(file) else BROKEN))
    if not samples:
        raise nothing_usable(place, rows + broken, WAY_OUT)
    return finished(place, samples, rows + broken, len(samples) + len(rows)), beside


class Cells:
    """Reads cells of parquet files again, each file from its beginning on."""

    def __init__(self) -> None:
        self.files: dict[str, Forward] = {}

    def __call__(self, file: str, columns: Sequence[str], number: int, column: str) -> bytes:
        """The picture in a row's column, read beside the row's other `columns`. Raises OSError when it is not there any more."""
        rows = self.files.setdefault(file, Forward(partial(parquet_rows, file, list(columns))))
        return cell(rows[number].get(column), partial(read_beside, file.rpartition("/")[0]))


def is_pointer(file: str) -> bool:
    """Whether a file is a Git LFS pointer instead of what its name says."""
    try:
        with open_url(file) as opened:
            return opened.read(len(POINTER)) == POINTER
    except CONTENT_ERRORS:
        return False


def column_names(file: str) -> list[str]:
    """The names of a parquet file's columns."""
    import pyarrow.parquet as pq

    with open_url(file) as opened:
        return list(pq.ParquetFile(opened).schema_arrow.names)


def parquet_rows(file: str, columns: list[str]) -> Iterator[Mapping[str, Any]]:
    """Yields the rows of a parquet file as {column: value}, a few in memory at a time; UNREADABLE for a text that is not UTF-8.

    Raises Unusable where the file unfolds to more than UNFOLDED_TIMES its size.
    """
    import pyarrow.parquet as pq

    with open_url(file) as opened:
        table = pq.ParquetFile(opened, buffer_size=1 << 20, pre_buffer=False)  # else pyarrow holds whole column chunks
        # of whole row groups: what a damaged file says of a column ends the process when pyarrow is asked for it
        groups = [table.metadata.row_group(number).total_byte_size for number in range(table.num_row_groups)]
        largest, size = max(groups, default=0), opened.seek(0, os.SEEK_END)
        most, unfolded = max(UNFOLDED_BYTES, UNFOLDED_TIMES * size), 0
        if largest > most:
            raise Unusable(TOO_MUCH)
        for batch in table.iter_batches(ROWS_AT_ONCE if largest <= LARGE_GROUP else FEW_ROWS, columns=columns):
            cells = [(name, batch.column(name)) for name in columns]
            for number in range(batch.num_rows):
                if unfolded > most:
                    raise Unusable(TOO_MUCH)
                row = {name: value_of(column[number]) for name, column in cells}
                unfolded += sum(map(size_of, row.values()))
                yield row


UNREADABLE = object()  # instead of a cell whose bytes are no value of its type


def value_of(cell: Any) -> Any:
    """What an Arrow cell holds."""
    try:
        return cell.as_py()
    except (ValueError, OverflowError):  # a text that is not UTF-8, a date before there were any
        return UNREADABLE


def size_of(value: Any) -> int:
    """Bytes of a cell, about."""
    if isinstance(value, (bytes, str)):
        return len(value)
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(size_of, values))


def samples_of(
    rows: Iterable[Mapping[str, Any]], columns: Columns, name: str, read: Callable[..., bytes], where: tuple,
    read_path: Callable[[str], bytes], samples: list[Sample], problems: list[Problem],
) -> None:  # fmt: skip
    """Appends a sample, or a problem, for each row; ids are "<name>:<row>". What is appended stays when `rows` breaks off.

    read(*where, row number, column) gives a picture again when it is wanted; `read_path` reads one that a cell names instead of holding it.
    """
    for number, row in enumerate(rows):
        id = f"{name}:{number}"
        try:
            captions, weights = captions_of(row, columns)
            places = {}
            for column in [columns.image, *([columns.mask] if columns.mask and row.get(columns.mask) is not None else [])]:
                try:
                    places[column] = Place(f"{id} {column}", read, sha256(bytes_of(row.get(column), read_path)), (*where, number, column))
                except (MemoryError, Unusable):
                    raise
                except SpecialFile:
                    raise Unusable("row whose picture or mask is not a regular file") from None
                except OSError:
                    raise Unusable("row whose picture or mask is missing") from None
                except Exception:  # a place may be on any storage, which raises errors of its own
                    raise Unusable("row whose picture or mask cannot be read") from None
            samples.append(Sample(places[columns.image], captions, id, weights, places.get(columns.mask)))
        except Unusable as error:
            problems.append(Problem(id, str(error)))


def cell(value: Any, read_path: Callable[[str], bytes]) -> bytes:
    """The picture in a cell that held one when it was listed. Raises OSError when it is not there any more."""
    try:
        return bytes_of(value, read_path)
    except Unusable as error:
        raise OSError(f"{error}; it was changed since it was listed") from error


def bytes_of(value: Any, read_path: Callable[[str], bytes]) -> bytes:
    """The bytes of a cell: bytes, {"bytes", "path"}, or a path.

    Raises Unusable for anything else and for more than PICTURE_BYTES, OSError for a missing file.
    """
    if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, str):
        return read_path(value)
    if not isinstance(value, bytes):
        raise Unusable("row without a picture" if value is None else "row whose picture is neither bytes nor a path")
    if len(value) > PICTURE_BYTES:
        raise Unusable(f"row whose picture has more than {PICTURE_BYTES:,} bytes")
    return value
