"""A folder of pictures and captions -> samples with stable ids, and every file that could not be used, by name.

Two layouts are read; the first goes before the second:

    pictures/metadata.jsonl   {"file_name": "cat.png", "text": "a cat"}   (or .csv, as in Hugging Face imagefolder)
    pictures/cat.png          pictures/cat.txt                            (each non-empty line is one caption)

In both, pictures/cat.mask.png is cat's loss mask, unless it has a caption itself.
"""

import os
import posixpath
from dataclasses import replace
from pathlib import Path
from typing import Any

from latentfm.data.cache.stat_cache import NOTHING_KEPT, StatCache
from latentfm.data.sources.base import (
    CAPTION_COLUMNS,
    IMAGE_SUFFIXES,
    Columns,
    Dataset,
    Problem,
    Sample,
    finished,
    first_of,
    is_image,
    path_within,
    texts_of,
    weighted,
)
from latentfm.data.sources.kept import kept_listing
from latentfm.data.sources.listing import CAPTION_SUFFIXES, METADATA_NAMES, list_files
from latentfm.data.sources.rows import metadata_rows
from latentfm.data.sources.texts import CAPTION_BYTES, Unusable, composed, decoded, lines_of
from latentfm.errors import InputError
from latentfm.files import TooLarge, read_bytes
from latentfm.words import count, shown

MASK_SUFFIX = ".mask.png"
LAYOUT = (
    "put cat.png beside cat.txt, or write metadata.jsonl with lines like "
    '{"file_name": "cat.png", "text": "a cat"}'
)
REPLACED = "caption file that is not read: the option caption stands for all"


def read_folder(folder: str | Path, columns: Columns | None = None, kept: StatCache = NOTHING_KEPT) -> Dataset:
    """The samples of `folder`, sorted by id, and the problems met on the way. No picture is opened, nor a caption whose text is `kept`.

    With metadata.jsonl or metadata.csv in the folder, each row gives `file_name` and a caption: the first of `text`,
    `caption`, `prompt` that is there; in jsonl it may be a list of captions, and several rows of one picture are its several captions.
    Otherwise every picture, at any depth, takes its captions from cat.txt, cat.caption or cat.png.txt, the first that is there. White
    space around a caption is removed; an empty caption is allowed and is the null condition. Hidden files and folders are ignored.
    `columns` names other columns of the metadata: the picture's file, the captions with their weights, and the file of the mask; where
    there are several caption columns, an empty cell of a csv is no caption. `columns.caption` is every picture's one caption; metadata is
    then read only where `columns` names its image or mask.

    Raises InputError when the folder is missing, holds both metadata files or a malformed one, has no usable sample, or when
    `columns` names what the metadata does not have.
    """
    columns = columns or Columns()
    name = os.path.expanduser(os.fspath(folder))
    if os.path.isfile(name):
        raise InputError(f"{shown(name)} is a file, not a folder: give the folder that holds the pictures, {LAYOUT}")
    if not os.path.isdir(name):
        raise InputError(f"there is no folder '{shown(name)}': make it, then {LAYOUT}")
    root = Path(name)

    files, problems = list_files(root)
    texts = [path for id, path in files.items() if id.lower().endswith(CAPTION_SUFFIXES) or id in METADATA_NAMES]
    about = (os.path.abspath(root), columns, list(files), problems)
    return kept_listing(kept, "folder", about, texts, root, None, lambda: list_folder(root, files, problems, columns))


def list_folder(root: Path, files: dict[str, Path], problems: list[Problem], columns: Columns) -> tuple[Dataset, list[Path]]:
    """(the samples among a folder's files, those that metadata names beyond them); `problems` of the files are among its own."""
    found, elsewhere = [metadata for metadata in METADATA_NAMES if os.path.lexists(root / metadata)], []
    if columns.caption is not None and not (columns.image or columns.mask):
        samples, more, pictures = _read_pictures(files, columns.caption)
        found = []
    elif len(found) == 2:
        raise InputError(f"{shown(root)} holds both {found[0]} and {found[1]}, which may disagree: keep one, remove the other")
    elif found:
        samples, more, pictures = _read_metadata(root, found[0], files, columns, elsewhere)
    elif columns != Columns():
        names = " or ".join(METADATA_NAMES)
        raise InputError(f"{shown(root)} has no {names} whose columns could be named; leave the columns out, or write one")
    else:
        samples, more, pictures = _read_sidecars(files)
    problems = problems + more

    if not samples:
        raise InputError(_nothing_usable(root, files, found, problems))
    return finished(root, sorted(samples, key=lambda sample: sample.id), problems, pictures), elsewhere


# Pictures beside .txt files


def _read_sidecars(files: dict[str, Path]) -> tuple[list[Sample], list[Problem], int]:
    """A sample for every picture with a caption file, which two may share; problems; and how many pictures there are."""
    samples, problems = [], []
    texts = _caption_files(files)
    masks = _masks(files, texts)
    images = [id for id in files if is_image(id) and files[id] not in masks.values()]
    stems = {_stem(id) for id in images}
    read, spare = set(), {}
    for id in images:
        own = texts.get(_stem(id), []) + (texts.get(id, []) if id not in stems else [])
        if not own:
            problems.append(Problem(id, "picture without a caption"))
            continue
        read.add(own[0])
        spare |= dict.fromkeys(own[1:])
        try:
            samples.append(Sample(files[id], lines_of(decoded(read_bytes(files[own[0]], CAPTION_BYTES))), id, mask=masks.get(_stem(id))))
        except Unusable as error:
            problems.append(Problem(own[0], str(error)))
        except TooLarge:
            problems.append(Problem(own[0], f"caption file of more than {CAPTION_BYTES:,} bytes"))
        except (OSError, InputError):
            problems.append(Problem(own[0], "caption file that cannot be read"))
    lone = sorted(id for named in texts.values() for id in named if id not in read and id not in spare)
    problems += [Problem(id, "second caption file of the same name") for id in spare if id not in read]
    return samples, problems + [Problem(id, "caption without a picture") for id in lone], len(images)


def _read_pictures(files: dict[str, Path], caption: str) -> tuple[list[Sample], list[Problem], int]:
    """A sample for every picture, with the one caption there is."""
    masks = _masks(files, {})
    images = [id for id in files if is_image(id) and files[id] not in masks.values()]
    unread = [id for id in files if id in METADATA_NAMES or id.lower().endswith(CAPTION_SUFFIXES)]
    samples = [Sample(files[id], (caption,), id, mask=masks.get(_stem(id))) for id in images]
    return samples, [Problem(id, REPLACED, used=True) for id in unread], len(images)


def _caption_files(files: dict[str, Path]) -> dict[str, list[str]]:
    """The caption files by what they are called without their suffix, those that go first first."""
    found: dict[str, list[tuple[int, str]]] = {}
    for id in files:
        suffix = posixpath.splitext(id)[1].lower()
        if suffix in CAPTION_SUFFIXES:
            found.setdefault(_stem(id), []).append((CAPTION_SUFFIXES.index(suffix), id))
    return {stem: [id for _, id in sorted(named)] for stem, named in found.items()}


def _masks(files: dict[str, Path], captioned: dict[str, Any]) -> dict[str, Path]:
    """The loss masks by the stem of their picture: name.mask.png beside name.png, unless it has a caption itself."""
    pictures = {_stem(id) for id in files if is_image(id)}
    stems = {id[: -len(MASK_SUFFIX)]: id for id in files if id.lower().endswith(MASK_SUFFIX)}
    return {stem: files[id] for stem, id in stems.items() if stem in pictures and _stem(id) not in captioned and id not in captioned}


# metadata.jsonl and metadata.csv


def _read_metadata(
    root: Path, metadata: str, files: dict[str, Path], columns: Columns, elsewhere: list[Path]
) -> tuple[list[Sample], list[Problem], int]:
    """A sample for every picture with a usable row; problems for other rows and for pictures no row names; how many pictures there are.

    What rows name and `files` has not is added to `elsewhere`.
    """
    texts: dict[str, dict[str, list[str]]] = {}  # of each picture, the captions of each column, over all its rows
    paths: dict[str, Path] = {}
    masked: dict[str, Path] = {}
    problems, named, seen = [], set(), set()
    weights = columns.captions or {"": 1.0}
    for line, row in metadata_rows(root / metadata, columns):
        where = f"{metadata}:{line}"
        try:
            if isinstance(row, Unusable):
                raise row
            if not isinstance(row, dict):
                raise Unusable("malformed line (not a JSON object)")
            seen |= row.keys()
            name = path_within(row.get(columns.image or "file_name"), columns.image or "file_name", root)
            where = f"{where} {name}"
            named.add(composed(name))
            id, path = _located(root, name, files, "picture", elsewhere)
            where = f"{metadata}:{line} {id}"
            named.add(id)
            mask = None
            captions = _row_captions(row, columns)
            if columns.mask and row.get(columns.mask):
                _, mask = _located(root, path_within(row[columns.mask], columns.mask, root), files, "mask", elsewhere)
            if mask is not None and masked.setdefault(id, mask) != mask:
                raise Unusable("row with another mask than an earlier row of its picture (keep one)")
            paths[id] = path
            for column, found in captions.items():
                texts.setdefault(id, {}).setdefault(column, []).extend(found)
        except Unusable as error:
            problems.append(Problem(where, str(error)))
    columns.check_in(sorted(name for name in seen if isinstance(name, str)), f"no row of {shown(root / metadata)} has")

    samples = []
    for id, path in paths.items():
        captions = ((columns.caption,), ()) if columns.caption is not None else weighted(texts[id], weights)
        samples.append(Sample(path, captions[0], id, captions[1]))
    beside = _masks(files, {_stem(id): id for id in named})
    stems = {_stem(id) for id in files if is_image(id)}
    masks = {*masked.values(), *beside.values()}
    pictures = {id for id, path in files.items() if is_image(id) and path not in masks} | paths.keys()
    for id in files:
        if id in pictures and id not in named:
            problems.append(Problem(id, f"picture without a caption in {metadata}"))
        elif id.lower().endswith(CAPTION_SUFFIXES) and (_stem(id) in stems or _stem(id) in files):
            problems.append(Problem(id, f"caption file beside {metadata}, which is read instead"))
    samples = [replace(sample, mask=masked.get(sample.id, beside.get(_stem(sample.id)))) for sample in samples]
    return samples, problems, len(pictures)


def _located(root: Path, name: str, files: dict[str, Path], what: str, elsewhere: list[Path]) -> tuple[str, Path]:
    """(id, path) of the file that a row names: as it is written there, its accents composed or not, or with Windows' backslashes.

    Raises Unusable when it is missing.
    """
    names = [name, path_within(name.replace("\\", "/"), what)] if "\\" in name else [name]
    for candidate in names:
        for id in (candidate, composed(candidate)):
            if id in files:
                return id, files[id]
        elsewhere.append(root / candidate)
        if os.path.isfile(root / candidate):  # in a hidden folder, or of a kind that is not listed
            return candidate, root / candidate
    if any(os.path.exists(root / candidate) for candidate in names):
        raise Unusable(f"row whose {what} is not a regular file")
    raise Unusable(f"row whose {what} is missing")


def _row_captions(row: dict, columns: Columns) -> dict[str, list[str]]:
    """The captions of a row by column: of the columns named, else of the first caption column that is there, as column ""."""
    if any(row.get(None, ())):  # what a csv has beyond the last column
        raise Unusable('row with more fields than columns (put "..." around a caption that holds a comma)')
    if columns.caption is not None:
        return {"": [columns.caption]}
    if columns.captions:
        return texts_of(row, columns.captions)
    present = [column for column in CAPTION_COLUMNS if row.get(column) is not None][:1]
    (captions,) = texts_of(row, present).values()
    return {"": captions}


# Names and messages


def _stem(id: str) -> str:
    """The id without its extension, the folder kept."""
    return posixpath.splitext(id)[0]


def _nothing_usable(root: Path, files: dict[str, Path], metadata: list[str], problems: list[Problem]) -> str:
    """The one-line message for a folder without a usable sample: what was found, and what to do."""
    images = sum(map(is_image, files))
    texts = sum(id.lower().endswith(CAPTION_SUFFIXES) for id in files)
    if metadata:
        found = f"{count(images, 'picture')} and {metadata[0]}, but no usable row"
    elif images and texts:
        found = f"{count(images, 'picture')} and {count(texts, '.txt file')}, but none that can be paired"
    elif images:
        found = f"{count(images, 'picture')} but no captions"
    else:
        found = f"no pictures ({' '.join(sorted(IMAGE_SUFFIXES))}), {count(len(files), 'other file')}"
    return f"nothing to train on in {shown(root)}: {found}{first_of(problems)}; {LAYOUT}"
