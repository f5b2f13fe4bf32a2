"""Files of JSON lines that a run writes and reads again, read as what they may have become: cut, flipped, edited, or no file at all.

What cannot be read never stands in the way of a run: it is set aside under another name, and said.
"""

import errno
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from latentfm.errors import InputError
from latentfm.files import SpecialFile, check_regular, open_file, reason, whole_or_nothing
from latentfm.words import count, shown

LONGEST = 2**20  # bytes of a row: hundreds of times what we write
MOST_STEP = 10**12
Tell = Callable[[str], None]


class ReadFailed(Exception):
    """A file could not be read this time; what it holds is not known."""


def number(value: Any) -> float | None:
    """`value` if it is a finite number that a float holds, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:
        return None


def row_of(line: bytes) -> dict[str, Any] | None:
    """The row in a line, with the number of its step; None where there is none."""
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    step = number(row.get("step")) if isinstance(row, dict) else None
    return row if step is not None and 0 <= step <= MOST_STEP and step == int(step) else None


def lines_of(path: Path) -> Iterator[bytes]:
    """The lines of a file, each with its end; one longer than LONGEST in parts, which are no rows. Raises OSError, SpecialFile."""
    with open_file(path) as file:
        while line := file.readline(LONGEST):
            yield line


def read_through(path: Path) -> Iterator[bytes]:
    """As `lines_of`, but raises ReadFailed where reading fails, which is not to be taken for a failure to write."""
    try:
        yield from lines_of(path)
    except OSError as error:
        raise ReadFailed(error.strerror) from error


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a file of JSON lines; what is none is left out, and where there is no file there are none."""
    try:
        return [row for line in lines_of(path) if (row := row_of(line)) is not None]
    except (OSError, SpecialFile):
        return []


def keep_rows(path: Path, tell: Tell, step: float = math.inf) -> list[dict[str, Any]]:
    """Drops the rows of a file after `step`, and a last one that was cut; returns the last row kept, if there is one, in a list.

    Lines that are no rows go to a file `.damaged` beside it, and what is no file is set aside whole. Raises InputError for a full disk.
    """
    last: list[dict[str, Any]] = []
    if not os.path.lexists(path):
        return last
    damaged = []
    try:
        check_regular(path)
        with whole_or_nothing(path) as partial, partial.open("wb") as kept:
            for line in read_through(path):
                row = row_of(line)
                if row is not None and row["step"] <= step:
                    kept.write(line.rstrip(b"\r\n") + b"\n")
                    last = [row]
                elif row is None and line.strip() and (line.endswith(b"\n") or len(line) == LONGEST):
                    damaged.append(line)
    except SpecialFile as error:
        set_aside(path, tell, str(error))
    except (OSError, ReadFailed) as error:  # a link to nowhere, or a disk that does not answer
        tell(f"warning: {shown(path)} cannot be read now ({reason(error)}); it is left as it is, and the run goes on")
        return []
    if damaged:
        aside = path.with_name(f"{path.name}.damaged")
        add_whole(aside, b"".join(damaged))
        tell(f"warning: {count(len(damaged), 'line')} of {shown(path)} cannot be read as rows; they are in {shown(aside.name)} now")
    return last


def add_whole(path: Path, text: bytes) -> None:
    """Adds `text` to a file, which is made where there is none, all of it or nothing. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # a pipe that nobody reads is an error, not a wait
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        check_regular(descriptor)
        end = os.lseek(descriptor, 0, os.SEEK_END)
        if os.write(descriptor, text) < len(text):  # a disk that is nearly full takes a part
            os.ftruncate(descriptor, end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(descriptor)


def name_aside(path: Path) -> Path:
    """The first of PATH.damaged, PATH.damaged-2, ... that is free."""
    target, number = path.with_name(f"{path.name}.damaged"), 1
    while os.path.lexists(target):
        number += 1
        target = path.with_name(f"{path.name}.damaged-{number}")
    return target


def set_aside(path: Path, tell: Tell, why: object) -> None:
    """Gives what cannot be used another name, `.damaged`, `.damaged-2`, ...; nothing is removed."""
    target = name_aside(path)
    try:
        path.rename(target)
        tell(f"warning: {shown(why)}; it is now called {shown(target.name)}, and the run goes on")
    except OSError as error:
        tell(f"warning: {shown(why)}, and it cannot be set aside: {error.strerror}")


def read_or_set_aside(path: Path, read: Callable[[Path], Any], tell: Tell, otherwise: Any) -> Any:
    """What `read` makes of a file; `otherwise` where there is none, or it cannot be read, which is told and sets it aside."""
    if not os.path.lexists(path):
        return otherwise
    try:
        return read(path)
    except InputError as error:
        if isinstance(error.__cause__, OSError):  # it may be readable another time
            tell(f"warning: {shown(error)}")
        else:
            set_aside(path, tell, error)
        return otherwise
