"""Files and folders that are written whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from latentfm.errors import InputError


def flush(path: Path) -> None:
    """Forces the file or folder `path` to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def whole_or_nothing(target: Path) -> Iterator[Path]:
    """A context with a name beside `target` to write a file or folder under; it becomes `target` when all went well, else it goes.

    An existing `target` stays until the new one is complete. Raises InputError when the disk is full or refuses the write.
    """
    partial, old = (target.with_name(f"{target.name}.{word}") for word in ("partial", "old.partial"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove(partial)  # of a run that was killed
        yield partial
        for path in (*sorted(partial.rglob("*")), partial):  # rglob of a file finds nothing
            flush(path)
        if target.is_dir():
            remove(old)
            target.rename(old)  # a folder cannot be renamed over another
        partial.replace(target)
        flush(target.parent)
        remove(old)
    except BaseException as error:
        if old.exists() and not target.exists():
            old.rename(target)
        remove(partial)
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":  # the latter for a full disk too
            reason = getattr(error, "strerror", None) or error
            raise InputError(
                f"could not write {target}: {reason}. Nothing of it was left, and nothing saved earlier was touched; free some space"
            ) from error
        raise
