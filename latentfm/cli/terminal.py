"""What the commands show on a terminal: results on stdout, all else on stderr, and nothing of the libraries' own chatter."""

import atexit
import codecs
import errno
import gc
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from latentfm.lazy_imports import without_collecting
from latentfm.words import shown

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


class Steady:
    """A stream that outlives its reader: once it cannot be written to (a pipe closed, a terminal gone, a disk full), what comes is dropped.

    A training or a batch of pictures is worth more than who listens to it. All else is the stream's own.
    """

    def __init__(self, stream: TextIO):
        self.stream, self.lost = stream, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self.attempt(lambda: self.stream.write(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, act: Any) -> None:
        try:
            act()
        except OSError as error:
            if error.errno == errno.EINTR or self.lost:
                return
            self.lost = True
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())  # what still waits in buffers goes there, in silence
            os.close(nowhere)
            if error.errno != errno.EPIPE and self.stream is sys.__stdout__:
                say(f"note: standard output cannot be written to: {error.strerror}; the rest of it is lost")


def steady_streams() -> None:
    """Makes this process's standard output and error `Steady`, and able to say every name: what their encoding lacks is escaped.

    Bytes of file names that are no text in any encoding go out as they are.
    """
    codecs.register_error("latentfm", escaped)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before we were started
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # for as long as the process lives
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="latentfm")
        setattr(sys, name, Steady(stream))


def escaped(error: UnicodeError) -> tuple[bytes, int]:
    """For codecs.register_error: the bytes that a name was made of where Python kept them, an escape as in \\u82f9 for all else."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    parts = [
        bytes([ord(letter) - 0xDC00]) if "\udc80" <= letter <= "\udcff" else letter.encode("ascii", "backslashreplace")
        for letter in error.object[error.start : error.end]
    ]
    return b"".join(parts), error.end


@contextmanager
def left_at_once() -> Iterator[None]:
    """A context whose end is the process's, with the exit code that it would have had and what is registered for the exit done.

    Of several processes that compute together: the interpreter is not taken apart, for a thread of torch.distributed that lets go of a
    tensor meanwhile aborts the process, and the launcher takes what was finished, or stopped and saved, for failed. Destroying
    the process group does not end those threads everywhere: what FSDP2 has split keeps its group in DTensor's caches.
    """
    code: object = 0
    try:
        yield
    except SystemExit as left:
        code = left.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code if isinstance(code, int) else 1)


@contextmanager
def lasting() -> Iterator[None]:
    """A context for what lasts as long as the process, as libraries and a model do: no garbage is looked for in it.

    In what is there after the first, none is looked for later either.
    """
    with without_collecting():
        yield
    if not gc.get_freeze_count():
        gc.freeze()


def quiet_libraries() -> None:
    """Silences diffusers' and transformers' bars and warnings for this process, so that the output is ours; not when debugging."""
    if os.environ.get("LATENTFM_DEBUG") == "1":
        return
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # where a base is quantised: it tells of kernels it lacks
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # where blocks are compiled: it looks for CUDA
    with lasting():
        import diffusers
        import transformers

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    warnings.simplefilter("ignore")


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A context in which a first Ctrl-C waits for its end; a second one is heard at once."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        yield
        return
    pressed = []

    def note(number: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def progress_bar() -> "Progress":
    """A bar on stderr that vanishes when done; nothing at all where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty(), refresh_per_second=4,
        redirect_stdout=False, redirect_stderr=False,
    )  # fmt: skip


def table(console: "Console", title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], texts: Collection[str] = ()) -> None:
    """Prints a table whose columns are numbers, but for the first and those of `texts`."""
    from rich.table import Table

    made = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index and column not in texts else "left", overflow="fold")
    for row in rows:
        made.add_row(*map(harmless, row))
    console.print(made)


def harmless(text: object) -> str:
    """A text as rich shows it, letter by letter: no mark-up of its own, nothing that a terminal obeys."""
    from rich.markup import escape

    return escape(shown(text))


def show(path: Path, bar: "Progress") -> None:
    """Prints `path`, a result, on stdout, where the bar leaves room for it."""
    bar.stop()
    result(path)
    bar.start()


def result(path: Path) -> None:
    """Prints `path` on stdout: as it is for a program, safe to look at on a terminal."""
    print(f"{shown(path) if sys.stdout.isatty() else path}\n", end="", flush=True)  # at once: other processes write there too


def tell_result(train: Callable[[], Path], goes_on_by: str = "--resume") -> None:
    """Prints the path of what a training has made, once over all processes; where it was stopped that, on stderr.

    Then the exit code is 0: a launcher would take another for a failure, and end the other processes.
    """
    from latentfm.training.stop import Stopped

    made, stopped = None, ""
    try:
        made = train()
    except Stopped as error:
        stopped = str(error).replace("--resume", goes_on_by)
    if rank():
        return
    say(stopped or f"finished: {made}")
    if made:
        result(made)


def rank() -> int:
    """Which of the processes this is, as their launcher says; the first alone speaks for all."""
    return int(os.environ.get("RANK", 0))


def say(line: str, bar: "Progress | None" = None) -> None:
    """Prints `line`, a remark, on stderr, where the bar leaves room for it."""
    if bar:
        bar.stop()
    print(f"{shown(line)}\n", end="", file=sys.stderr, flush=True)
    if bar:
        bar.start()
