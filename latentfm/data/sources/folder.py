"""A folder of pictures and captions -> samples with stable ids, and every file that could not be used, by name.

Two layouts are read; the first goes before the second:

    pictures/metadata.jsonl   {"file_name": "cat.png", "text": "a cat"}   (or .csv, as in Hugging Face imagefolder)
    pictures/cat.png          pictures/cat.txt                            (each non-empty line is one caption)

In both, pictures/cat.mask.png is cat's loss mask, unless it has a caption itself.
"""

import csv
import io
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

from latentfm.data.sources.base import (
    CAPTION_COLUMNS,
    IMAGE_SUFFIXES,
    Columns,
    Dataset,
    Problem,
    Sample,
    Unusable,
    captions_of,
    is_image,
    is_text,
    lines_of,
    path_within,
)
from latentfm.errors import InputError, nearest
from latentfm.words import count

UNREAD_SUFFIXES = frozenset({".heic", ".heif", ".jfif", ".jxl", ".jp2", ".svg", ".psd", ".tga"})
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
MASK_SUFFIX = ".mask.png"
LAYOUT = (
    "put cat.png beside cat.txt, or write metadata.jsonl with lines like "
    '{"file_name": "cat.png", "text": "a cat"}'
)
METADATA_ELSEWHERE = f"metadata not read (only {' or '.join(METADATA_NAMES)} of the folder itself)"


def read_folder(folder: str | Path, columns: Columns | None = None) -> Dataset:
    """Returns the samples of `folder`, sorted by id, and the problems met on the way. No picture is opened.

    With metadata.jsonl or metadata.csv in the folder, each row gives `file_name` and the caption: the first of `text`,
    `caption`, `prompt` that is there; in jsonl it may be a list of captions. Otherwise every picture, at any depth,
    takes its captions from the .txt of the same stem. White space around a caption is removed; an empty caption is
    allowed and is the null condition. Hidden files and folders are ignored. `columns` names other columns of the metadata: the
    picture's file, the captions with their weights, and the file of the mask; where there are several caption columns, an empty
    cell of a csv is no caption.

    Raises InputError when the folder is missing, holds both metadata files or a malformed one, has no usable sample, or when
    `columns` names what the metadata does not have.
    """
    columns = columns or Columns()
    name = os.path.expanduser(os.fspath(folder))
    if os.path.isfile(name):
        raise InputError(f"{name} is a file, not a folder: give the folder that holds the pictures, {LAYOUT}")
    if not os.path.isdir(name):
        raise InputError(f"there is no folder '{name}': make it, then {LAYOUT}")
    root = Path(name)

    files, problems = _list_files(root)
    found = [metadata for metadata in METADATA_NAMES if metadata in files]
    if len(found) == 2:
        raise InputError(f"{root} holds both {found[0]} and {found[1]}, which may disagree: keep one, remove the other")

    if found:
        samples, more = _read_metadata(root, found[0], files, columns)
    elif columns != Columns():
        raise InputError(f"{root} has no {' or '.join(METADATA_NAMES)} whose columns could be named; leave the columns out, or write one")
    else:
        samples, more = _read_sidecars(root, files)
    problems += more

    if not samples:
        raise InputError(_nothing_usable(root, files, found, problems))
    return Dataset(root, tuple(sorted(samples, key=lambda sample: sample.id)), tuple(problems))


def _list_files(root: Path) -> tuple[dict[str, Path], list[Problem]]:
    """Returns every visible file under `root` by id, sorted, and what could not be listed.

    Links to folders are followed; a folder reached a second time (a loop) is not entered again.
    """
    files, problems, entered = {}, [], set()

    def not_listed(error: OSError) -> None:
        problems.append(Problem(os.path.relpath(error.filename, root), "folder that cannot be listed"))

    for directory, subdirectories, names in os.walk(root, followlinks=True, onerror=not_listed):
        real = os.path.realpath(directory)
        if real in entered:
            subdirectories.clear()
            continue
        entered.add(real)
        subdirectories[:] = sorted(sub for sub in subdirectories if not sub.startswith("."))
        for name in sorted(names):
            path = Path(directory, name)
            id = path.relative_to(root).as_posix()
            if name.startswith("."):
                continue
            if not is_text(id):
                problems.append(Problem(id.encode("utf-8", "backslashreplace").decode(), "file name that is not UTF-8"))
            elif path.suffix.lower() in UNREAD_SUFFIXES:
                problems.append(Problem(id, "picture in a format that is not read (save it as PNG or JPEG)"))
            elif (name in METADATA_NAMES and directory != str(root)) or name == "metadata.parquet":
                problems.append(Problem(id, METADATA_ELSEWHERE))
            else:
                files[id] = path
    return dict(sorted(files.items())), problems


# Pictures beside .txt files


def _read_sidecars(root: Path, files: dict[str, Path]) -> tuple[list[Sample], list[Problem]]:
    """Returns a sample for every picture with a .txt of the same stem; two pictures may share one .txt."""
    samples, problems = [], []
    texts: dict[str, str] = {}
    for id in files:
        if id.lower().endswith(".txt") and texts.setdefault(_stem(id), id) != id:
            problems.append(Problem(id, "second caption file of the same name"))

    masks = _masks(files, set(texts))
    images = [id for id in files if is_image(id) and files[id] not in masks.values()]
    for id in images:
        text = texts.get(_stem(id))
        if text is None:
            problems.append(Problem(id, "picture without a caption"))
            continue
        try:
            captions = lines_of(files[text].read_text(encoding="utf-8-sig"))
            samples.append(Sample(files[id], captions, id, mask=masks.get(_stem(id))))
        except UnicodeDecodeError:
            problems.append(Problem(text, "caption file that is not UTF-8"))
        except OSError:
            problems.append(Problem(text, "caption file that cannot be read"))

    with_image = {_stem(id) for id in images}
    problems += [Problem(id, "caption without a picture") for stem, id in texts.items() if stem not in with_image]
    return samples, problems


def _masks(files: dict[str, Path], captioned: set[str]) -> dict[str, Path]:
    """Returns the loss masks by the stem of their picture: name.mask.png beside name.png, unless the stem name.mask is `captioned`."""
    pictures = {_stem(id) for id in files if is_image(id)}
    stems = {id.removesuffix(MASK_SUFFIX): id for id in files if id.endswith(MASK_SUFFIX)}
    return {stem: files[id] for stem, id in stems.items() if stem in pictures and _stem(id) not in captioned}


# metadata.jsonl and metadata.csv


def _read_metadata(root: Path, metadata: str, files: dict[str, Path], columns: Columns) -> tuple[list[Sample], list[Problem]]:
    """Returns a sample for every usable row, and problems for the other rows and for pictures no row names."""
    try:
        text = files[metadata].read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{files[metadata]} is not UTF-8: save it again as UTF-8") from None
    except OSError as error:
        raise InputError(f"cannot read {files[metadata]}: {error.strerror}; check its permissions") from None

    samples: dict[str, Sample] = {}
    masked: dict[str, str] = {}
    problems, named, seen = [], set(), set()
    rows = _json_rows(text) if metadata.endswith(".jsonl") else _csv_rows(text, files[metadata], columns)
    for line, row in rows:
        where = f"{metadata}:{line}"
        try:
            if not isinstance(row, dict):
                raise Unusable("malformed line (not a JSON object)")
            seen |= row.keys()
            id = path_within(row.get(columns.image or "file_name"), columns.image or "file_name")
            where = f"{where} {id}"
            named.add(id)
            if id in samples:
                raise Unusable("row with the file_name of an earlier row")
            if not os.path.isfile(root / id):
                raise Unusable("row whose picture is missing")
            captions, weights = _row_captions(row, columns)
            if columns.mask and row.get(columns.mask):
                masked[id] = path_within(row[columns.mask], columns.mask)
                if not os.path.isfile(root / masked[id]):
                    raise Unusable("row whose mask is missing")
            samples[id] = Sample(root / id, captions, id, weights)
        except Unusable as error:
            problems.append(Problem(where, str(error)))
    for wanted in (columns.image, columns.mask, *columns.captions):
        if wanted is not None and wanted not in seen:
            names = sorted(name for name in seen if isinstance(name, str))
            raise InputError(f"no row of {files[metadata]} has '{wanted}'{nearest(wanted, names)}; there are {', '.join(names)}")

    beside = _masks(files, {_stem(id) for id in named})
    masks = {id: root / masked[id] if id in masked else beside.get(_stem(id)) for id in samples}
    pictures = {_stem(id) for id in files if is_image(id)}
    used = named | set(masked.values())
    for id in files:
        if is_image(id) and id not in used and files[id] not in beside.values():
            problems.append(Problem(id, f"picture without a caption in {metadata}"))
        elif id.lower().endswith(".txt") and _stem(id) in pictures:
            problems.append(Problem(id, f"caption file beside {metadata}, which is read instead"))
    return [replace(sample, mask=masks[id]) for id, sample in samples.items()], problems


def _json_rows(text: str) -> Iterator[tuple[int, object]]:
    """Yields (line number, what the line holds), blank lines left out; None for a line that is not JSON."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def _csv_rows(text: str, path: Path, columns: Columns) -> Iterator[tuple[int, dict]]:
    """Yields (number of the line where the row ends, row). Raises InputError when a column is missing."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        names = reader.fieldnames or []
        for wanted in ((columns.image or "file_name",), tuple(columns.captions) or CAPTION_COLUMNS):
            if not set(wanted) & set(names):
                raise InputError(
                    f"{path} has no column {' or '.join(wanted)}{nearest(wanted[0], names)}, only "
                    f"[{', '.join(names)}]: its first line must name the columns, as in file_name,text"
                )
        for row in reader:
            if len(columns.captions) > 1:
                row |= {name: None for name in columns.captions if row.get(name) == ""}
            yield reader.line_num, row
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num} is malformed CSV ({error}): correct that line") from None


def _row_captions(row: dict, columns: Columns) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Returns the captions of a row and their weights: of the columns named, else of the first caption column that is there."""
    if any(row.get(None, ())):  # where csv.DictReader puts what is beyond the last column
        raise Unusable('row with more fields than columns (put "..." around a caption that holds a comma)')
    if columns.captions:
        return captions_of(row, columns.captions)
    return captions_of(row, {column: 1.0 for column in [c for c in CAPTION_COLUMNS if row.get(c) is not None][:1]})


# Names and messages


def _stem(id: str) -> str:
    """Returns the id without its extension, the folder kept."""
    return str(PurePosixPath(id).with_suffix(""))


def _nothing_usable(root: Path, files: dict[str, Path], metadata: list[str], problems: list[Problem]) -> str:
    """Returns the one-line message for a folder without a usable sample: what was found, and what to do."""
    images = sum(map(is_image, files))
    texts = sum(id.lower().endswith(".txt") for id in files)
    if metadata:
        found = f"{count(images, 'picture')} and {metadata[0]}, but no usable row"
    elif images and texts:
        found = f"{count(images, 'picture')} and {count(texts, '.txt file')}, but none that can be paired"
    elif images:
        found = f"{count(images, 'picture')} but no captions"
    else:
        found = f"no pictures ({' '.join(sorted(IMAGE_SUFFIXES))}), {count(len(files), 'other file')}"
    first = f" (first problem: {problems[0].path}, {problems[0].reason})" if problems else ""
    return f"nothing to train on in {root}: {found}{first}; {LAYOUT}"
