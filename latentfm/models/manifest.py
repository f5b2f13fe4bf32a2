"""What was saved into a folder: the name, size and SHA-256 of every file of it, so that a later change is noticed. Needs no torch.

The manifest lies in the folder as text, which stock code passes over and `sha256sum -c latentfm_manifest.txt` checks too. Every load looks
at sizes and at the headers of safetensors, and reads what is small; asked to verify, it reads everything.
"""

import hashlib
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from latentfm.errors import InputError
from latentfm.files import JSON_BYTES, open_file, read_json, read_text, whole_or_nothing
from latentfm.models.stored import names_in, read_header
from latentfm.words import count, listed, shown

MANIFEST = "latentfm_manifest.txt"
TITLE = "# latentfm manifest 1: what was saved here; `latentfm verify` and `sha256sum -c` read it"
SMALL = 2**20  # bytes; files other than weights are read on every load up to this size
TOP = ("model_index.json", "latentfm.json", "null_condition.safetensors", "config.json", "adapter_config.json")
CHUNK = 2**20


class Saved(NamedTuple):
    """A file as it was saved."""

    size: int
    sha256: str


def hash_of(path: Path) -> Saved:
    """The size and SHA-256 of a regular file. Raises OSError when it cannot be read, SpecialFile for anything else."""
    digest, size = hashlib.sha256(), 0
    with open_file(path) as file:
        while block := file.read(CHUNK):
            digest.update(block)
            size += len(block)
    return Saved(size, digest.hexdigest())


def files_of(folder: Path) -> list[str]:
    """The names, relative and with slashes, of the files a model or adapter in `folder` consists of; not what a person put beside them."""
    names = names_in(folder)
    found = [name for name in names if name in TOP or name.endswith(".safetensors") or ".safetensors.index." in name]
    if "model_index.json" in names:
        index = read_json(folder / "model_index.json")
        for part in (name for name in names if isinstance(index.get(name), list) and any(index[name]) and (folder / name).is_dir()):
            found += [f"{part}/{name}" for name in names_in(folder / part) if name[0] != "."]
    return sorted(name for name in set(found) if shown(name) == name and (folder / name).is_file())


def write_manifest(folder: Path, known: Mapping[str, Saved] | None = None) -> None:
    """Writes the manifest of `folder`, as its files are now; an older one is replaced at the end.

    known: files by name that need not be read once more, taken where the size is right.
    """
    found = {name: (known or {}).get(name) for name in files_of(folder)}
    for name, saved in found.items():
        if saved is None or saved.size != (folder / name).stat().st_size:
            found[name] = hash_of(folder / name)
    write_entries(folder, found)


def renew_entry(folder: Path, name: str) -> None:
    """Has the manifest of `folder` hold the file `name` as it is now; the others' entries, as far as they are there, stay."""
    there = {other: saved for other, saved in (read_manifest(folder) or {}).items() if (folder / other).exists()}
    write_entries(folder, there | {name: hash_of(folder / name)})


def write_entries(folder: Path, saved: Mapping[str, Saved]) -> None:
    """Writes a manifest of these files into `folder`, all of it or nothing."""
    lines = [TITLE]
    for name, entry in sorted(saved.items()):
        lines += [f"# {entry.size}", f"{entry.sha256}  {name}"]
    with whole_or_nothing(folder / MANIFEST) as path:
        path.write_bytes(("\n".join(lines) + "\n").encode())


def read_manifest(folder: Path) -> dict[str, Saved] | None:
    """The files that were saved into `folder` by name; None where it has no manifest of ours. Raises InputError for a damaged one."""
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return None
    found: dict[str, Saved] = {}
    title, *lines = read_text(path, JSON_BYTES).splitlines() or [""]
    if title != TITLE or len(lines) % 2:
        raise damaged(folder, "it is cut short or was changed")
    for size, line in zip(lines[::2], lines[1::2], strict=True):
        sized, named = re.fullmatch(r"# (\d{1,18})", size), re.fullmatch(r"([0-9a-f]{64})  (.+)", line)
        if not sized or not named:
            raise damaged(folder, f"its line '{shown(line, 100)}' is not as it was written")
        name = PurePosixPath(named[2])
        if name.is_absolute() or ".." in name.parts or "\0" in named[2] or len(name.parts) > 2:
            raise damaged(folder, f"it names {shown(named[2], 100)}, which is not of this folder")
        found[named[2]] = Saved(int(sized[1]), named[1])
    return found


def damaged(folder: Path, why: str) -> InputError:
    return InputError(f"{shown(folder / MANIFEST)} is damaged: {why}; copy the folder again, or {renewal(folder)}")


def renewal(folder: Path) -> str:
    """The way on for a folder that was changed on purpose."""
    return f"if you changed it on purpose, take it as it is now: latentfm verify --renew {shown(folder)}"


def check_manifest(folder: Path, verify: bool = False, without: Collection[str] = ()) -> None:
    """Raises InputError unless the files of `folder` are what was saved there; a folder without a manifest passes.

    Looks at sizes, at the headers of safetensors and at what is small, with `verify` at every byte, and at files that were added; then a
    folder without a manifest is refused. without: components that are not loaded.
    """
    saved = read_manifest(folder)
    if saved is None:
        if verify:
            raise InputError(
                f"{shown(folder)} has no {MANIFEST}, so nothing says what its files should be; folders saved by latentfm have one, "
                f"and latentfm verify --renew {shown(folder)} makes one of the files as they are"
            )
        return
    wanted = {name: entry for name, entry in saved.items() if name.split("/")[0] not in without}
    wrong = [problem for name, entry in wanted.items() if (problem := difference(folder / name, name, entry, verify))]
    if verify:
        added = [name for name in files_of(folder) if name not in saved and name.split("/")[0] not in without]
        wrong += [f"{name} was not saved with it" for name in added]
    if wrong:
        raise InputError(f"{shown(folder)} is not what was saved there: {listed(wrong)}; copy it again, or {renewal(folder)}")


def difference(path: Path, name: str, saved: Saved, verify: bool) -> str:
    """In what a file differs from what was saved, in words; "" when in nothing that was looked at."""
    try:
        size = path.stat().st_size
        if size != saved.size:
            return f"{name} has {count(size, 'byte')}, {saved.size:,} were saved"
        weights = name.endswith(".safetensors")
        if (verify or (size <= SMALL and not weights)) and hash_of(path) != saved:
            return f"{name} has other bytes"
    except (FileNotFoundError, NotADirectoryError):
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    if weights:
        read_header(path)
    return ""
