"""The memory that threads share while they decode pictures, and whether it is memory that lacks."""

import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Budget:
    """Bytes that threads may take at a time; one that asks for more than there is gets all of it, alone."""

    def __init__(self, total: int):
        self.total = total
        self.reset()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.reset)  # a thread that held some of it is not there any more

    def reset(self) -> None:
        self.taken, self.turn = 0, threading.Condition()

    @contextmanager
    def of(self, amount: int) -> Iterator[None]:
        """A context in which `amount` bytes are taken, waited for where others have them."""
        amount = min(amount, self.total)
        with self.turn:
            self.turn.wait_for(lambda: self.taken + amount <= self.total)
            self.taken += amount
        try:
            yield
        finally:
            with self.turn:
                self.taken -= amount
                self.turn.notify_all()


def lacks(amount: int) -> bool:
    """Whether the system would refuse `amount` bytes now."""
    try:
        mmap.mmap(-1, max(1, amount)).close()
    except (OSError, ValueError, OverflowError, MemoryError):
        return True
    return False
