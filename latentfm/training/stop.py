"""Being asked to stop: a run saves after its step and leaves; asked again, it leaves at once."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):
    """A run that was asked to stop has saved; the message says where, and how to go on."""


class Stop:
    """Which signal asked this process to stop, if one did: Ctrl-C, SIGTERM (a scheduler ends the job) or SIGUSR1 (it soon will)."""

    def __init__(self) -> None:
        self.signal: int = 0

    @contextmanager
    def listening(self) -> Iterator["Stop"]:
        """A context in which a signal is only noted, the first time; handlers can be set in the main thread alone."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # under nohup one is not to be heard
        before = {number: signal.signal(number, self.noted) for number in heard}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def noted(self, number: int, frame: object) -> None:
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        if not self.signal:
            self.signal = number
            again = "; once more to stop at once" if number == signal.SIGINT else ""
            print(f"{signal.Signals(number).name}: stopping after this step, saving{again}", file=sys.stderr, flush=True)
