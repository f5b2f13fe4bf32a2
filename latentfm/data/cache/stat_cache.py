"""What was read from files, kept as long as their sizes and times are what they were: git's index, rsync's quick check.

A file's signature is its size, its modification time and its change time, which nobody can set; behind a URL its size and ETag. One that
was written so shortly before it was read that a later write could leave it the same signature is not kept (git's "racily clean" entries)
but read again. Each value is a JSON file of its own, checksummed, written whole or not at all; one that is damaged, a stranger's in a
folder that everybody may write, or that cannot be written is as if it were not there.
"""

import hashlib
import json
import os
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from latentfm.data.cache.processes import ONE_PROCESS, Processes
from latentfm.data.cache.trust import LISTINGS, anyone_writes, rank_of
from latentfm.errors import InputError
from latentfm.files import open_file, whole_or_nothing

T = TypeVar("T")
Signature = list[Any]
Files = Iterable[str | Path]
GRAIN, COARSE_GRAIN = 10**8, 2 * 10**9  # nanoseconds within which two writes may leave one time; the second where times are whole seconds
MOST_BYTES = 2**32


class StatCache:
    """Values by name under a cache's folder; without a folder nothing is kept."""

    def __init__(self, cache: Path | None = None):
        self.folder = None if cache is None else cache / LISTINGS

    def value(self, name: Iterable[object], files: Files | None, make: Callable[[], tuple[Any, Files | None]]) -> Any:
        """What `make` gives, a value that JSON holds, or what it gave when all its files had the signatures they have now.

        `name` has all that the value depends on besides. `files` are known before, None is files that have no signature; `make` gives more,
        which it came upon, or None instead for a value that is not to be kept. What is kept comes back as JSON does: tuples as lists.
        """
        if self.folder is None or files is None:
            return make()[0]
        path, began = self.path(name), time.time_ns()
        wanted = {str(file): signature(file) for file in files}
        kept = self.load(path)
        if kept is not None:
            now = {file: wanted.get(file) or signature(file) for file in kept["files"]}
            if now == kept["files"] and wanted.keys() <= now.keys():
                return kept["value"]
        value, more = make()
        signed = wanted | {str(file): signature(file) for file in more or ()}
        if more is not None and all(settled(found, began) for found in signed.values()):
            self.save(path, {"files": signed, "value": value})
        return value

    def values(
        self, name: str, items: Sequence[T], key: Callable[[T], str], sign: Callable[[T], Signature | None],
        read: Callable[[Sequence[T]], list[Any]], processes: Processes = ONE_PROCESS, keep: Callable[[Any], bool] = lambda value: True,
    ) -> list[Any]:  # fmt: skip
        """What `read` gives of each item, or gave when it had the signature that `sign` tells now: a value that JSON holds.

        The first process looks which are known, all read the others, each its share. `keep` says of a value whether it is kept.
        """
        table, began = self.path((name,)), time.time_ns()
        signed: list[Signature | None] = []

        def known() -> list[Any]:
            before = self.load(table) or {}
            signed.extend(map(sign, items))
            found = [before.get(key(item), (None, None)) for item in items]
            return [value if then is not None and then == now else None for (then, value), now in zip(found, signed, strict=True)]

        (values,) = processes.share(lambda own: [known() for _ in own], [name], f"{name} that are known")
        missing = [number for number, value in enumerate(values) if value is None]
        for number, value in zip(missing, processes.share(read, [items[number] for number in missing], name), strict=True):
            values[number] = value
        if missing and processes.rank == 0:
            kept = zip(items, signed, values, strict=True)
            self.save(table, {key(item): (now, value) for item, now, value in kept if settled(now, began) and keep(value)})
        return values

    def path(self, name: Iterable[object]) -> Path | None:
        return self.folder and self.folder / f"{hashlib.sha256(json.dumps([str(part) for part in name]).encode()).hexdigest()}.json"

    def load(self, path: Path | None) -> Any:
        """What was saved under a path; None where it is not there, or damaged."""
        if path is None:
            return None
        try:
            with open_file(path, MOST_BYTES) as file:
                if rank_of(os.fstat(file.fileno()), anyone_writes(path.parent)) is None:
                    return None
                checksum, data = file.readline().strip(), file.read()
        except (OSError, InputError):
            return None
        return json.loads(data) if hashlib.sha256(data).hexdigest().encode() == checksum else None

    def save(self, path: Path | None, value: Any) -> None:
        """Writes a value, for readers of any process at once; where that cannot be it is only not kept."""
        if path is None:
            return
        data = json.dumps(value, separators=(",", ":")).encode()
        own = path.with_name(f"{uuid.uuid4().hex}.json")  # two processes never write one file
        try:
            with whole_or_nothing(own) as partial:
                partial.write_bytes(hashlib.sha256(data).hexdigest().encode() + b"\n" + data)
            own.replace(path)
        except (OSError, InputError):
            return


NOTHING_KEPT = StatCache()


def signature(file: str | Path) -> Signature | None:
    """What tells whether a file is still the one it was; None for one that is not there, is no regular file, or has nothing to tell by."""
    if "://" in str(file):
        return signature_of_url(str(file))
    try:
        status = os.stat(file)
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns] if stat.S_ISREG(status.st_mode) else None


def signature_of_url(url: str) -> Signature | None:
    """As `signature`, behind a URL: of a file that is here its own, elsewhere the size and ETag that the storage tells."""
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    try:
        system, path = fsspec.core.url_to_fs(url)
        if isinstance(system, LocalFileSystem):
            return signature(path)
        info = system.info(path)
    except MemoryError:
        raise
    except Exception:  # each kind of storage raises its own
        return None
    tag = info.get("ETag") or info.get("etag")
    return [info.get("size"), str(tag)] if tag and not str(tag).startswith("W/") else None  # a weak one may stay when bytes change


def settled(found: Signature | None, began: int) -> bool:
    """Whether a file with this signature, read since `began` (nanoseconds), cannot be written to and keep it."""
    if found is None:
        return False
    times = found[1:] if len(found) == 3 else []
    return all(each < began - (GRAIN if each % 10**9 else COARSE_GRAIN) for each in times)
