"""Paths and fsspec URLs alike: which files a name stands for, and reading them, within bounds where they unfold."""

import errno
import io
import math
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain, product, zip_longest
from pathlib import Path
from typing import Any, BinaryIO

from latentfm.data.sources.base import PICTURE_BYTES, path_within
from latentfm.data.sources.texts import Unusable, composed
from latentfm.errors import InputError
from latentfm.files import TooLarge, any_error_told, open_file, read_bytes
from latentfm.words import count, shown

FILES = 100_000  # the most that one name may stand for
BRACES, MOST_BRACES = r"\{(\d{1,12})\.\.(\d{1,12})\}", 8
UNFOLDED_BYTES = 256 * 2**20  # beyond it, what is compressed may unfold to UNFOLDED_TIMES its size and no more
UNFOLDED_TIMES = 100
BLOCK = 2**20
TOO_LARGE = f"row whose picture or mask has more than {PICTURE_BYTES:,} bytes"


def expand(place: str, suffixes: Sequence[str]) -> list[str]:
    """The files that `place` stands for, in order: braces ({000..012}), of a folder the files with `suffixes`, else * and ?.

    Raises InputError when one is missing, or there is none, or more than FILES.
    """
    found: list[str] = []
    for name in braces(os.path.expanduser(place) if "://" not in place else place):
        system, path = located(name)
        with any_error_told(lambda why, name=name: f"cannot look for {shown(name)}: {why}"):  # no network, no permission, no such bucket
            if system.isdir(path):
                files = [file for file in sorted(system.ls(path, detail=False)) if file.lower().endswith(tuple(suffixes))]
            elif system.exists(path):
                files = [path]
            else:
                files = [file for file in sorted(system.glob(path)) if file.lower().endswith(tuple(suffixes))]
        if not files:
            raise InputError(f"there is no {' or '.join(suffixes)} file at {shown(name)}: check the name, or give the kind of the source")
        found += [system.unstrip_protocol(file) if "://" in name else file for file in files]
    if not found:
        raise InputError(f"{shown(place)} stands for no file: the first number in braces should be the smaller one")
    return found


def braces(name: str) -> list[str]:
    """The names that {first..last} stands for, leading zeros kept: "a-{08..10}" is a-08, a-09, a-10. Raises InputError above FILES."""
    parts = re.split(BRACES, name)  # a text, the first and the last number, a text, ...
    numbers = [range(int(first), int(last) + 1) for first, last in zip(parts[1::3], parts[2::3], strict=True)]
    if math.prod(map(len, numbers)) > FILES or len(numbers) > MOST_BRACES:
        raise InputError(f"{shown(name, 300)} stands for more than {FILES:,} files; name the folder that holds them, or use *")
    written = ([str(number).zfill(len(first)) for number in each] for each, first in zip(numbers, parts[1::3], strict=True))
    return ["".join(chain.from_iterable(zip_longest(parts[::3], chosen, fillvalue=""))) for chosen in product(*written)]


def names_of(files: Sequence[str], what: str) -> list[str]:
    """The names of files, which are `what`, without their folders. Raises InputError when two are the same."""
    names = [file.rpartition("/")[2] for file in files]
    if twice := [name for name in names if names.count(name) > 1]:
        called = f"two {what} are called {shown(twice[0])}"
        raise InputError(f"{called}: their samples could not be told apart; rename one, or make them two sources")
    return names


def located(url: str) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, and the path in it. Raises InputError for a protocol that cannot be read here."""
    import fsspec

    with any_error_told(lambda why: f"cannot read {shown(url)}: {why}"):
        return fsspec.core.url_to_fs(url)


def open_url(url: str) -> BinaryIO:
    """The file at a path or URL, open for reading, decompressed if its name says so (.gz, .bz2, .xz, .zst).

    Raises OSError, SpecialFile for what is here and no regular file, and, in reading on, OSError for what unfolds without end.
    """
    from fsspec.compression import compr
    from fsspec.implementations.local import LocalFileSystem
    from fsspec.utils import infer_compression

    system, path = located(url)
    raw = open_file(path) if isinstance(system, LocalFileSystem) else system.open(path, "rb")
    with suppress(AttributeError):
        raw.system = system  # an archive's closes the archive when nobody has it any more
    method = "gzip" if path.lower().endswith(".tgz") else infer_compression(path)
    return raw if method is None else Unfolded(compr[method](raw, mode="rb"), raw)


def read_whole(url: str) -> bytes:
    """The bytes of a file at a path or URL. Raises Unusable for more than PICTURE_BYTES, OSError and SpecialFile as `open_url`."""
    with open_url(url) as file:
        data = file.read(PICTURE_BYTES + 1)
    if len(data) > PICTURE_BYTES:
        raise Unusable(TOO_LARGE)
    return data


def read_beside(folder: str, name: str, noted: list[str] | None = None) -> bytes:
    """The bytes of the file `name` in `folder`, a path or URL ("" is here); which file that is, is added to `noted`.

    Raises Unusable when it leads out of the folder or is too large, OSError when it is missing, SpecialFile when it is no regular file.
    """
    if "://" in folder:
        url = f"{folder}/{path_within(name, 'picture')}"
        note(url, noted)
        return read_whole(url)
    inner = path_within(name, "picture", Path(folder or "."))
    if "\0" in inner:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), inner)
    if not os.path.exists(os.path.join(folder, inner)) and os.path.exists(os.path.join(folder, composed(inner))):
        inner = composed(inner)
    note(os.path.join(folder, inner), noted)
    try:
        return read_bytes(os.path.join(folder, inner), PICTURE_BYTES)  # a name with "::" in it is no URL here
    except TooLarge:
        raise Unusable(TOO_LARGE) from None


def note(file: str, noted: list[str] | None) -> None:
    if noted is not None:
        noted.append(file)


class Unfolded(io.RawIOBase):
    """A decompressed file that is read in blocks and refuses, with OSError, to become more than UNFOLDED_TIMES what it was read from.

    Up to UNFOLDED_BYTES anything goes.
    """

    def __init__(self, inner: BinaryIO, raw: BinaryIO):
        super().__init__()
        self.inner, self.raw = inner, raw

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.inner.tell()

    def read(self, size: int | None = -1) -> bytes:
        parts, left = [], math.inf if size is None or size < 0 else size
        while left and (part := self.inner.read(int(min(left, BLOCK)))):
            parts.append(part)
            left -= len(part)
            self.check()
        return b"".join(parts)

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        """Goes to `place`, forward by reading. Only from the beginning."""
        if whence != os.SEEK_SET:
            raise OSError("what is decompressed on the way can be counted from its beginning alone")
        if place < self.tell():
            return self.inner.seek(place)
        while self.tell() < place and self.read(min(BLOCK, place - self.tell())):
            pass
        return self.tell()

    def check(self) -> None:
        size, unfolded = self.raw.tell(), self.tell()
        if unfolded > UNFOLDED_BYTES and unfolded > UNFOLDED_TIMES * size:
            raise OSError(f"it unfolds to more than {UNFOLDED_TIMES} times its size: {count(unfolded, 'byte')} of {size:,}")

    def close(self) -> None:
        self.inner.close()
        self.raw.close()
        super().close()
