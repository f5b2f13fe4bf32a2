"""The rows of a folder's metadata.jsonl or metadata.csv, a line at a time and within bounds."""

import csv
import io
from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path

from latentfm.data.sources.base import CAPTION_COLUMNS, Columns
from latentfm.data.sources.texts import Unusable, encoding_of
from latentfm.errors import InputError, nearest
from latentfm.files import Refused, open_file, own_json
from latentfm.words import listed, shown

METADATA_BYTES = 4 * 2**30  # the most that a file of metadata may have
LINE_CHARACTERS = 2**20  # the most that one of its lines may have
DELIMITERS = (",", ";", "\t", "|")  # of a csv, the first that splits the columns' names out of its first line

Rows = Iterator[tuple[int, object]]  # (number of the line where the row ends, the row; None or Unusable for a line that is none)


def metadata_rows(path: Path, columns: Columns) -> Rows:
    """Yields the rows of a metadata file, blank ones left out.

    Raises InputError when it cannot be read, is no text, or is a csv without the columns or with a line that is none.
    """
    newline = "\n" if path.name.endswith(".jsonl") else ""  # a caption of JSON lines may hold any other character that ends lines
    try:
        with open_file(path, METADATA_BYTES) as file:
            encoding = encoding_of(file.read(4096))
            file.seek(0)
            text = io.TextIOWrapper(file, encoding=encoding, newline=newline)
            yield from json_rows(text) if newline else csv_rows(text, path, columns)
    except UnicodeError:
        raise InputError(f"{shown(path)} is not UTF-8: save it again as UTF-8") from None
    except Unusable as error:
        raise InputError(f"{shown(path)} is a {error}") from None
    except OSError as error:
        raise InputError(f"cannot read {shown(path)}: {error.strerror}; check its permissions") from None


def json_rows(text: io.TextIOWrapper) -> Rows:
    number = 0
    while line := text.readline(LINE_CHARACTERS + 1):
        number += 1
        long = len(line) > LINE_CHARACTERS
        rest = line
        while rest and not rest.endswith("\n"):
            rest = text.readline(LINE_CHARACTERS)
        if long:
            yield number, None
        elif line.strip():
            try:
                yield number, own_json(line)
            except Refused as error:
                yield number, Unusable(f"row that {error}")
            except (ValueError, RecursionError):
                yield number, None


def csv_rows(text: io.TextIOWrapper, path: Path, columns: Columns) -> Rows:
    """The rows of a csv. Its delimiter is the first of DELIMITERS that finds the column of file names; a first line "sep=;" is Excel's."""
    image = columns.image or "file_name"
    lines = bounded(text, path)
    first, before = next(lines, ""), 0
    if first.startswith("sep=") and len(first.rstrip("\r\n")) == 5:
        first, before = next(lines, ""), 1
    delimiter = next((delimiter for delimiter in DELIMITERS if image in fields(first, delimiter)), ",")
    reader, began = csv.reader(chain([first], lines), strict=True, delimiter=delimiter), 0
    try:
        names = [name.strip() for name in next(reader, [])]
        wanted_captions = tuple(columns.captions) or CAPTION_COLUMNS
        for wanted in ((image,), *([wanted_captions] if columns.caption is None else [])):
            if not set(wanted) & set(names):
                raise InputError(
                    f"{shown(path)} has no column {' or '.join(map(shown, wanted))}{shown(nearest(wanted[0], names))}, only "
                    f"[{listed(names, 50)}]: its first line must name the columns, as in file_name,text"
                )
            twice = [name for name in wanted if names.count(name) > 1]
            if twice:
                called = f"{names.count(twice[0])} columns called '{shown(twice[0])}'"
                raise InputError(f"{shown(path)} has {called}: give each a name of its own")
        began = reader.line_num
        for values in reader:
            began = reader.line_num
            if not values:
                continue
            row: dict[str | None, object] = dict(zip_longest(names, values[: len(names)])) | {None: values[len(names) :]}
            if len(columns.captions) > 1:
                row |= {name: None for name in columns.captions if row.get(name) == ""}
            yield before + reader.line_num, row
    except csv.Error as error:  # which may come lines after the quote that was not closed
        raise InputError(f"{shown(path)}:{before + began + 1} is malformed CSV ({error}): correct that line") from None


def fields(line: str, delimiter: str) -> list[str]:
    """The fields of one line of a csv; [] when it is none."""
    try:
        return [field.strip() for field in next(csv.reader([line], delimiter=delimiter), [])]
    except csv.Error:
        return []


def bounded(text: io.TextIOWrapper, path: Path) -> Iterator[str]:
    """The lines of a text. Raises InputError for one longer than LINE_CHARACTERS."""
    number = 0
    while line := text.readline(LINE_CHARACTERS + 1):
        number += 1
        if len(line) > LINE_CHARACTERS:
            raise InputError(f"{shown(path)}:{number} is a line of more than {LINE_CHARACTERS:,} characters: correct it")
        yield line
