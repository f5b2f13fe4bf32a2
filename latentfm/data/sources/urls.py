"""Paths and fsspec URLs alike: which files a name stands for, and reading them."""

import os
import re
from collections.abc import Sequence
from typing import Any, BinaryIO

from latentfm.errors import InputError


def expand(place: str, suffixes: Sequence[str]) -> list[str]:
    """Returns the files that `place` stands for, in order: braces ({000..012}), then * and ?, and of a folder the files with `suffixes`.

    Raises InputError when one is missing, or there is none.
    """
    found: list[str] = []
    for name in braces(os.path.expanduser(place) if "://" not in place else place):
        system, path = located(name)
        try:
            if any(character in path for character in "*?"):
                files = [file for file in sorted(system.glob(path)) if file.endswith(tuple(suffixes))]
            elif system.isdir(path):
                files = sorted(file for file in system.ls(path, detail=False) if file.endswith(tuple(suffixes)))
            else:
                files = [path] if system.exists(path) else []
        except Exception as error:  # each kind of storage raises its own: no network, no permission, no such bucket
            raise InputError(f"cannot look for {name}: {' '.join(str(error).split()) or type(error).__name__}") from error
        if not files:
            raise InputError(f"there is no {' or '.join(suffixes)} file at {name}: check the name, or give the kind of the source")
        found += [system.unstrip_protocol(file) if "://" in name else file for file in files]
    return found


def braces(name: str) -> list[str]:
    """Returns the names that {first..last} stands for, leading zeros kept: "a-{08..10}" is a-08, a-09, a-10."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", name)
    if match is None:
        return [name]
    first, last = match.groups()
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [whole for number in numbers for whole in braces(name[: match.start()] + number + name[match.end() :])]


def located(url: str) -> tuple[Any, str]:
    """Returns the fsspec file system of a path or URL, and the path in it. Raises InputError for a protocol that cannot be read here."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise InputError(f"cannot read {url}: {' '.join(str(error).split())}") from error


def open_url(url: str) -> BinaryIO:
    """Returns the file at a path or URL, open for reading, decompressed if its name says so (.gz, .bz2, .xz, .zst). Raises OSError."""
    import fsspec

    return fsspec.open(url, "rb", compression="gzip" if url.endswith(".tgz") else "infer").open()
