"""A run's claim on its output folder: a lock that ends with the process, however that ends."""

import errno
import fcntl
import os
import platform
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from latentfm.errors import InputError
from latentfm.files import check_regular
from latentfm.words import shown

NAME = "running.lock"
HELD = (errno.EAGAIN, errno.EACCES)
OPENING = b"process "  # of what stands in a lock file of ours
FLOCK = "qqihh" if sys.platform == "darwin" else "hhqqi"  # struct flock: type, whence, start, length, process; or the first two last


class FolderInUse(InputError):
    """Another run is writing to the folder."""


class Claim:
    """A lock on the file running.lock of `folder`, which is never followed elsewhere and never emptied before it is ours."""

    def __init__(self, folder: Path):
        self.path, self.descriptor = folder / NAME, -1
        self.told = False

    def take(self) -> None:
        """Takes the claim. Raises FolderInUse where another run has it; where the file system knows no locks, that is told."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = self.opened()
            try:
                self.lock(descriptor)
                if self.is_at(descriptor):
                    self.check_ours(descriptor)
                    break
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # who had it has removed it since: another may have made a new one
        self.descriptor = descriptor
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, words_of(os.getpid()), 0)

    def opened(self) -> int:
        """A descriptor of the file. Raises InputError for a link or anything else that is no file of ours."""
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(self.path, flags, 0o666)
        except OSError as error:
            what = "is a link to elsewhere" if error.errno == errno.ELOOP else f"cannot be opened: {error.strerror}"
            raise InputError(f"{shown(self.path)} {what}; remove it where no run is writing, or choose another output.folder") from error
        try:
            check_regular(descriptor)
        except InputError as error:
            os.close(descriptor)
            raise InputError(f"{shown(self.path)} is no regular file; remove it, or choose another output.folder") from error
        return descriptor

    def check_ours(self, descriptor: int) -> None:
        """Raises InputError for a file that holds something else, or has another name besides: it is not ours to empty."""
        held = os.pread(descriptor, 200, 0)
        if os.fstat(descriptor).st_nlink > 1 or (held and not held.startswith(OPENING)):
            raise InputError(f"{shown(self.path)} is no lock of a run; move it away, or choose another output.folder")

    def lock(self, descriptor: int) -> None:
        """Locks the file. Raises FolderInUse where another process has."""
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, loader processes do not inherit it
        except OSError as error:
            if error.errno in HELD:
                holder = shown(os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip())
                folder = shown(self.path.parent)
                raise FolderInUse(
                    f"a run is writing to {folder} ({holder}); wait for its end or stop it, or choose another output.folder"
                ) from None
            if not self.told:
                self.told = True
                print(
                    f"warning: {shown(self.path)} cannot be locked ({error.strerror}): nothing keeps another run from writing there too",
                    flush=True,
                )

    def is_at(self, descriptor: int) -> bool:
        """Whether the file that is open is the one under the name."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path, follow_symlinks=False))
        except FileNotFoundError:
            return False

    def renew(self) -> None:
        """Takes the claim again where its file went, as with the folder around it. Raises FolderInUse where another run came instead."""
        if self.descriptor < 0 or self.is_at(self.descriptor):
            return
        old = self.descriptor
        self.take()
        os.close(old)

    def release(self) -> None:
        """Gives the claim up; what keeps its file from being removed hides no other error."""
        if self.descriptor < 0:
            return
        with suppress(OSError):
            if self.is_at(self.descriptor):
                os.unlink(self.path)
        with suppress(OSError):
            os.close(self.descriptor)
        self.descriptor = -1


@contextmanager
def claimed(folder: Path) -> Iterator[Claim]:
    """A context in which no other run, on whatever machine, writes to `folder`. Raises FolderInUse when one does."""
    claim = Claim(folder)
    claim.take()
    try:
        yield claim
    finally:
        claim.release()


def words_of(process: int) -> bytes:
    """What stands in the lock file of a process of this machine."""
    return OPENING + f"{process} on {platform.node()}".encode()


def holder(folder: Path) -> int:
    """The number of the process that has the claim on `folder`, 0 where none has, -1 where it is not one of this machine. Takes no claim.

    Not to be asked by that process, which has no lock against itself and would lose it with the file closed. Raises OSError where it cannot
    be known, as on a file system without locks.
    """
    try:
        descriptor = os.open(folder / NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    try:
        first = FLOCK.startswith("h")
        ask = (fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0) if first else (0, 0, 0, fcntl.F_WRLCK, os.SEEK_SET)
        told = struct.unpack(FLOCK, fcntl.fcntl(descriptor, fcntl.F_GETLK, struct.pack(FLOCK, *ask)))
        kind, process = (told[0], told[4]) if first else (told[3], told[2])
        if kind == fcntl.F_UNLCK:
            return 0
        return process if process > 0 and os.pread(descriptor, 200, 0) == words_of(process) else -1
    finally:
        os.close(descriptor)
