"""Every visible file below a folder, each folder entered once, and what there is no file by name."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from latentfm.data.sources.base import IMAGE_SUFFIXES, Problem
from latentfm.data.sources.texts import composed
from latentfm.files import KINDS, check_regular
from latentfm.words import is_text

UNREAD_SUFFIXES = frozenset({".heic", ".heif", ".jfif", ".jxl", ".jp2", ".svg", ".psd", ".tga"})
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
METADATA_ELSEWHERE = f"metadata not read (only {' or '.join(METADATA_NAMES)} of the folder itself)"
CAPTION_SUFFIXES = (".txt", ".caption")  # the first goes before the second
RUN_RECORDS = {"config.json", "run.json"}  # what a training's folder holds from its start on
RUN_PICTURES = "samples"  # the folder beside them that it draws into


class Entry(NamedTuple):
    """Something below a folder: its path from there, with "/", and what it is; `kind` None is a regular file.

    A folder is only told of when it is not entered: it cannot be listed, was already, `under` another name, or holds a run's pictures.
    """

    name: str
    path: str
    kind: str | None = None
    under: str | None = None


def walk(root: str | Path, run_pictures: bool = True) -> Iterator[Entry]:
    """Every visible file below `root`, whatever the depth, in an order of the names alone; but for a run's own if not `run_pictures`.

    Links to folders are followed after the folders themselves; a folder that is reached again is not entered.
    """
    entered: dict[object, str] = {}
    folders, links = [("", os.fspath(root))], []
    while folders or links:
        name, path = folders.pop() if folders else links.pop(0)
        try:
            status = os.stat(path)
            key = (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)
            if key in entered:
                yield Entry(name, path, "a folder", entered[key] or ".")
                continue
            entered[key] = name
            with os.scandir(path) as listed:
                entries = sorted((entry for entry in listed if not entry.name.startswith(".")), key=lambda entry: entry.name)
        except OSError:
            yield Entry(name or ".", path, "a folder")
            continue
        below = []
        left_out = {RUN_PICTURES} if not run_pictures and {entry.name for entry in entries} >= RUN_RECORDS else ()
        for entry in entries:
            inner = f"{name}/{entry.name}" if name else entry.name
            kind = kind_of(entry)
            if kind == "a folder" and entry.name in left_out:
                yield Entry(inner, entry.path, "a run's pictures")
            elif kind != "a folder":
                yield Entry(inner, entry.path, kind)
            elif entry.is_symlink():
                links.append((inner, entry.path))
            else:
                below.append((inner, entry.path))
        folders += reversed(below)


def kind_of(entry: os.DirEntry) -> str | None:
    """What an entry of a folder is, links followed; None for a regular file."""
    try:
        if entry.is_file():
            return None
        if entry.is_dir():
            return "a folder"
        mode = entry.stat().st_mode
    except OSError:
        return "a link that leads nowhere" if entry.is_symlink() else "a file that cannot be looked at"
    return next((name for test, name in KINDS.items() if test(mode)), "no file")


def list_files(root: Path) -> tuple[dict[str, Path], list[Problem]]:
    """Every visible file under `root` by id, sorted, and what is not used of the rest. Ids have their accents composed.

    What a training draws into its folder is not for training: it would change the data that the run itself is to go on with.
    """
    problems: list[Problem] = []
    plain: dict[str, Path] = {}
    for name, path, kind, under in walk(root, run_pictures=False):
        printable = name if is_text(name) else name.encode("utf-8", "backslashreplace").decode()
        suffix = os.path.splitext(name)[1].lower()
        if under is not None:
            problems.append(Problem(f"{printable} (read as {under})", "folder that is there under another name too", used=True))
        elif kind == "a folder":
            problems.append(Problem(printable, "folder that cannot be listed"))
        elif kind == "a run's pictures":
            problems.append(Problem(printable, "folder of a training's sample pictures"))
        elif kind is not None:
            if suffix in IMAGE_SUFFIXES or suffix in CAPTION_SUFFIXES or name in METADATA_NAMES:
                problems.append(Problem(printable, f"{kind.removeprefix('a ')}, not a regular file"))
        elif not is_text(name):
            problems.append(Problem(printable, "file name that is not UTF-8"))
        elif suffix in UNREAD_SUFFIXES:
            problems.append(Problem(name, "picture in a format that is not read (save it as PNG or JPEG)"))
        elif os.path.basename(name) in (*METADATA_NAMES, "metadata.parquet") and name not in METADATA_NAMES:
            problems.append(Problem(name, METADATA_ELSEWHERE))
        else:
            plain[name] = Path(path)
    files = {name: path for name, path in plain.items() if composed(name) == name}
    for name, path in plain.items():
        if name not in files:
            files[composed(name) if composed(name) not in files else name] = path
    return dict(sorted(files.items())), problems


def check_files(root: Path) -> None:
    """Raises SpecialFile for the first pipe, device or socket below `root`: readers that are not ours open whatever is there."""
    for _, path, kind, _ in walk(root):
        if kind in KINDS.values() and kind != "a folder":
            check_regular(path)

