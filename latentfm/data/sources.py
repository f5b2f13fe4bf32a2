"""A folder of pictures and captions -> samples with stable ids, and every file that could not be used, by name.

Two layouts are read; the first goes before the second:

    pictures/metadata.jsonl   {"file_name": "cat.png", "text": "a cat"}   (or .csv, as in Hugging Face imagefolder)
    pictures/cat.png          pictures/cat.txt                            (each non-empty line is one caption)
"""

import csv
import io
import json
import os
import posixpath
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from latentfm.errors import InputError, nearest

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"})
UNREAD_SUFFIXES = frozenset({".heic", ".heif", ".jfif", ".jxl", ".jp2", ".svg", ".psd", ".tga"})
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
CAPTION_COLUMNS = ("text", "caption", "prompt")
LAYOUT = (
    "put cat.png beside cat.txt, or write metadata.jsonl with lines like "
    '{"file_name": "cat.png", "text": "a cat"}'
)
METADATA_ELSEWHERE = f"metadata not read (only {' or '.join(METADATA_NAMES)} of the folder itself)"
NAMES_SHOWN = 5


@dataclass(frozen=True)
class Sample:
    """One picture and its captions (one is drawn each epoch).

    `id` is the path relative to the folder, with `/`: the same on every machine, and never shared by two pictures.
    """

    path: Path
    captions: tuple[str, ...]
    id: str


@dataclass(frozen=True)
class Problem:
    """Something in the folder that is not used. `path` names it (a metadata row as "metadata.jsonl:3 cat.png").

    `reason` is the same text for every problem of a kind, so problems can be counted by it.
    """

    path: str
    reason: str


@dataclass(frozen=True)
class Dataset:
    """The usable samples of a folder, sorted by id, and what could not be used."""

    folder: Path
    samples: tuple[Sample, ...]
    problems: tuple[Problem, ...]


def read_folder(folder: str | Path) -> Dataset:
    """Returns the samples of `folder`, sorted by id, and the problems met on the way. No picture is opened.

    With metadata.jsonl or metadata.csv in the folder, each row gives `file_name` and the caption: the first of `text`,
    `caption`, `prompt` that is there; in jsonl it may be a list of captions. Otherwise every picture, at any depth,
    takes its captions from the .txt of the same stem. White space around a caption is removed; an empty caption is
    allowed and is the null condition. Hidden files and folders are ignored.

    Raises InputError when the folder is missing, holds both metadata files or a malformed one, or has no usable sample.
    """
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
        samples, more = _read_metadata(root, found[0], files)
    else:
        samples, more = _read_sidecars(root, files)
    problems += more

    if not samples:
        raise InputError(_nothing_usable(root, files, found, problems))
    return Dataset(root, tuple(sorted(samples, key=lambda sample: sample.id)), tuple(problems))


def summary(dataset: Dataset) -> str:
    """Returns a line with the numbers of pictures and captions, then a line for each kind of problem, with names."""
    captions = sum(len(sample.captions) for sample in dataset.samples)
    lines = [f"{_count(len(dataset.samples), 'picture')}, {_count(captions, 'caption')} in {dataset.folder}"]
    kinds = defaultdict(list)
    for problem in dataset.problems:
        kinds[problem.reason].append(problem.path)
    for reason, paths in kinds.items():
        rest = f" and {len(paths) - NAMES_SHOWN} more" if len(paths) > NAMES_SHOWN else ""
        lines.append(f"not used, {reason}: {len(paths)} ({', '.join(paths[:NAMES_SHOWN])}{rest})")
    return "\n".join(lines)


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
            if not _is_text(id):
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

    images = [id for id in files if _is_image(id)]
    for id in images:
        text = texts.get(_stem(id))
        if text is None:
            problems.append(Problem(id, "picture without a caption"))
            continue
        try:
            samples.append(Sample(files[id], _captions_in(files[text]), id))
        except UnicodeDecodeError:
            problems.append(Problem(text, "caption file that is not UTF-8"))
        except OSError:
            problems.append(Problem(text, "caption file that cannot be read"))

    with_image = {_stem(id) for id in images}
    problems += [Problem(id, "caption without a picture") for stem, id in texts.items() if stem not in with_image]
    return samples, problems


def _captions_in(path: Path) -> tuple[str, ...]:
    """Returns the non-empty lines of a .txt; ("",) when there is none."""
    # Not splitlines(), which also cuts at U+2028 and other characters a caption may hold.
    lines = (line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n"))
    return tuple(line for line in lines if line) or ("",)


# metadata.jsonl and metadata.csv


class _UnusableRow(Exception):
    """A metadata row that becomes a Problem: its reason."""


def _read_metadata(root: Path, metadata: str, files: dict[str, Path]) -> tuple[list[Sample], list[Problem]]:
    """Returns a sample for every usable row, and problems for the other rows and for pictures no row names."""
    try:
        text = files[metadata].read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{files[metadata]} is not UTF-8: save it again as UTF-8") from None
    except OSError as error:
        raise InputError(f"cannot read {files[metadata]}: {error.strerror}; check its permissions") from None

    samples: dict[str, Sample] = {}
    problems, named = [], set()
    rows = _json_rows(text) if metadata.endswith(".jsonl") else _csv_rows(text, files[metadata])
    for line, row in rows:
        where = f"{metadata}:{line}"
        try:
            id = _row_id(row)
            where = f"{where} {id}"
            named.add(id)
            if id in samples:
                raise _UnusableRow("row with the file_name of an earlier row")
            if not os.path.isfile(root / id):
                raise _UnusableRow("row whose picture is missing")
            samples[id] = Sample(root / id, _row_captions(row), id)
        except _UnusableRow as error:
            problems.append(Problem(where, str(error)))

    pictures = {_stem(id) for id in files if _is_image(id)}
    for id in files:
        if _is_image(id) and id not in named:
            problems.append(Problem(id, f"picture without a caption in {metadata}"))
        elif id.lower().endswith(".txt") and _stem(id) in pictures:
            problems.append(Problem(id, f"caption file beside {metadata}, which is read instead"))
    return list(samples.values()), problems


def _json_rows(text: str) -> Iterator[tuple[int, object]]:
    """Yields (line number, what the line holds), blank lines left out; None for a line that is not JSON."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def _csv_rows(text: str, path: Path) -> Iterator[tuple[int, dict]]:
    """Yields (number of the line where the row ends, row). Raises InputError when a column is missing."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = reader.fieldnames or []
        for wanted in (("file_name",), CAPTION_COLUMNS):
            if not set(wanted) & set(columns):
                raise InputError(
                    f"{path} has no column {' or '.join(wanted)}{nearest(wanted[0], columns)}, only "
                    f"[{', '.join(columns)}]: its first line must name the columns, as in file_name,text"
                )
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num} is malformed CSV ({error}): correct that line") from None


def _row_id(row: object) -> str:
    """Returns the id that a row's file_name stands for."""
    if not isinstance(row, dict):
        raise _UnusableRow("malformed line (not a JSON object)")
    name = row.get("file_name")
    if not isinstance(name, str) or not name.strip() or not _is_text(name):
        raise _UnusableRow("row without a file_name")
    path = Path(name)
    id = posixpath.normpath(path.as_posix())
    if path.anchor or id.split("/")[0] == "..":
        raise _UnusableRow("row whose file_name leads out of the folder")
    return id


def _row_captions(row: dict) -> tuple[str, ...]:
    """Returns the captions of a row: the first caption column that is there, a string or a list of strings."""
    if any(row.get(None, ())):  # where csv.DictReader puts what is beyond the last column
        raise _UnusableRow('row with more fields than columns (put "..." around a caption that holds a comma)')
    value = next((row[column] for column in CAPTION_COLUMNS if row.get(column) is not None), None)
    if value is None or value == []:
        raise _UnusableRow("row without a caption")
    captions = value if isinstance(value, list) else [value]
    if not all(isinstance(caption, str) and _is_text(caption) for caption in captions):
        raise _UnusableRow("row whose caption is not a text")
    return tuple(caption.strip() for caption in captions)


# Names and messages


def _stem(id: str) -> str:
    """Returns the id without its extension, the folder kept."""
    return str(PurePosixPath(id).with_suffix(""))


def _is_image(id: str) -> bool:
    return PurePosixPath(id).suffix.lower() in IMAGE_SUFFIXES


def _is_text(text: str) -> bool:
    """Returns False for lone surrogates: undecodable file names, or half an emoji in JSON. No tokenizer takes them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _nothing_usable(root: Path, files: dict[str, Path], metadata: list[str], problems: list[Problem]) -> str:
    """Returns the one-line message for a folder without a usable sample: what was found, and what to do."""
    images = sum(map(_is_image, files))
    texts = sum(id.lower().endswith(".txt") for id in files)
    if metadata:
        found = f"{_count(images, 'picture')} and {metadata[0]}, but no usable row"
    elif images and texts:
        found = f"{_count(images, 'picture')} and {_count(texts, '.txt file')}, but none that can be paired"
    elif images:
        found = f"{_count(images, 'picture')} but no captions"
    else:
        found = f"no pictures ({' '.join(sorted(IMAGE_SUFFIXES))}), {_count(len(files), 'other file')}"
    first = f" (first problem: {problems[0].path}, {problems[0].reason})" if problems else ""
    return f"nothing to train on in {root}: {found}{first}; {LAYOUT}"
