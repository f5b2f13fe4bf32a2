"""What the commands show on a terminal: results on stdout, all else on stderr, and nothing of the libraries' own chatter."""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


def quiet_libraries() -> None:
    """Silences diffusers' and transformers' bars and warnings for this process, so that the output is ours; not when debugging."""
    if os.environ.get("LATENTFM_DEBUG") == "1":
        return
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # where a base is quantised: it tells of kernels it lacks
    import diffusers
    import transformers

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    warnings.simplefilter("ignore")


def progress_bar() -> "Progress":
    """A bar on stderr that vanishes when done; nothing at all where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty(), refresh_per_second=4,
        redirect_stdout=False, redirect_stderr=False,
    )  # fmt: skip


def show(path: Path, bar: "Progress") -> None:
    """Prints `path`, a result, on stdout, where the bar leaves room for it."""
    bar.stop()
    print(path, flush=True)
    bar.start()


def say(line: str, bar: "Progress | None" = None) -> None:
    """Prints `line`, a remark, on stderr, where the bar leaves room for it."""
    if bar:
        bar.stop()
    print(line, file=sys.stderr, flush=True)
    if bar:
        bar.start()
