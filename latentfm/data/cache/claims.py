"""Which entries of a cache other processes are making: each has a file that names them, locked for as long as it lives.

So two runs on one cold cache share the work instead of doing it twice, and a process that is killed leaves nothing to wait for: its
lock goes with it, and the next to look removes its file. Where the file system knows no locks, or cannot be written, nothing is claimed.
"""

import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from latentfm.data.cache.trust import anyone_writes, rank_of
from latentfm.errors import InputError
from latentfm.files import open_file

FOLDER, SUFFIX, TURN = "claims", ".claim", "turn"
KEY = np.dtype("S32")
SECONDS_FOR_A_TURN = 5.0  # at most, for what takes milliseconds: then it goes without
CLAIM_BYTES = 2**26


class Claims:
    """This process's claim on entries of a cache; a context, after which it has none."""

    def __init__(self, cache: Path):
        self.folder = cache / FOLDER
        self.descriptor: int | None = None
        self.path = self.folder / f"{uuid.uuid4().hex}{SUFFIX}"

    def __enter__(self) -> "Claims":
        return self

    def take(self, keys: np.ndarray, kept: np.ndarray) -> np.ndarray:
        """Claims those of `keys` (S32) that nobody else has, and `kept`, made already but not written, still; bool [N]: which."""
        try:
            with self.turn():
                mine = ~np.isin(keys, self.others())
                if self.descriptor is None:
                    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
                    self.descriptor = os.open(self.path, flags, 0o644)
                    fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(self.descriptor, 0)
                os.pwrite(self.descriptor, np.concatenate([kept, keys[mine]]).tobytes(), 0)
                return mine
        except OSError:
            self.release()
            return np.ones(len(keys), bool)

    def others(self) -> np.ndarray:
        """What other processes have claimed; the claims of those that ended are removed."""
        found = [np.empty(0, KEY)]
        for path in self.folder.glob(f"*{SUFFIX}"):
            if path == self.path:
                continue
            try:
                with open_file(path, CLAIM_BYTES) as file:
                    if rank_of(os.fstat(file.fileno()), anyone_writes(self.folder)) is None:
                        continue
                    if free(file.fileno()):
                        path.unlink(missing_ok=True)
                        continue
                    data = file.read(CLAIM_BYTES)
                    found.append(np.frombuffer(data, KEY, len(data) // KEY.itemsize))
            except (OSError, InputError):
                continue
        return np.concatenate(found)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """A context in which no other process claims. Raises OSError where that cannot be had."""
        until = time.monotonic() + SECONDS_FOR_A_TURN
        while (descriptor := self.turn_of_mine()) is None:
            if time.monotonic() > until:
                raise BlockingIOError(f"{self.folder} is not to be had")
            time.sleep(0.01)
        try:
            yield
        finally:
            os.close(descriptor)

    def turn_of_mine(self) -> int | None:
        """The locked file that says whose turn it is; None while another process has it, or has just removed it."""
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(self.folder / TURN, flags, 0o666)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(self.folder / TURN)):
                return descriptor
        except (BlockingIOError, FileNotFoundError):
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    def release(self) -> None:
        """Gives up the claim; the last to do so leaves nothing behind."""
        if self.descriptor is None:
            return
        os.close(self.descriptor)
        self.descriptor = None
        with suppress(OSError), self.turn():
            self.path.unlink(missing_ok=True)
            if not any(self.folder.glob(f"*{SUFFIX}")):
                (self.folder / TURN).unlink(missing_ok=True)
                self.folder.rmdir()

    def __exit__(self, *error: object) -> None:
        self.release()


def free(descriptor: int) -> bool:
    """Whether nobody holds the lock on an open file."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
