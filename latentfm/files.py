"""How files are opened, read and written: regular files of a bounded size only, and whole or not at all.

Whatever lies in a folder of the user's may be a named pipe that never answers, a device that never ends, or text that claims to be
small: `open_file` is the one way in, `read_text` and `read_json` go through it, and `reading` turns what a damaged content raises into
one line that names the file. MemoryError passes through all of them: a passing lack of memory says nothing about a file.
"""

import errno
import json
import os
import shutil
import stat
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from latentfm.errors import Failure, InputError
from latentfm.words import shown

TEXT_BYTES = 256 * 2**20  # the most that is read as text: a metadata.jsonl of a million long captions
JSON_BYTES = 16 * 2**20  # the most that is read as one JSON value: the index of a model of 100,000 tensors is a tenth

# what is raised by parsers, by numpy, torch and pyarrow, and by plain Python on a content that is not what it should be
CONTENT_ERRORS = (
    ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError, ArithmeticError, RecursionError, NotImplementedError,
    RuntimeError, EOFError, OSError, UnicodeError, struct.error, zlib.error,
)  # fmt: skip
KINDS = {
    stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a named pipe", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device",
}  # fmt: skip


class SpecialFile(InputError):
    """What stands under a file's name is a pipe, a device, a socket or a folder."""


class TooLarge(InputError):
    """A file, or what it says of itself, is larger than is read."""


class Refused(ValueError):
    """What a text holds is not taken; the message says why, after the name of the file or line."""


@contextmanager
def reading(path: object, way_out: str = "copy or make it again", also: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """A context in which whatever a file's content raises becomes an InputError of one line: its name, the reason, the way out.

    `also`: further exceptions that a library raises there. InputError and MemoryError pass through as they are.
    """
    try:
        yield
    except InputError:
        raise
    except (*CONTENT_ERRORS, *also) as error:
        raise InputError(f"{shown(path)} cannot be read: {reason(error)}; {way_out}") from error


@contextmanager
def any_error_told(told: Callable[[str], str]) -> Iterator[None]:
    """A context for what raises errors of its own, as storages and formats do: they become the InputError that `told` makes of the reason.

    InputError and MemoryError pass through as they are.
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        raise InputError(told(reason(error))) from error


def reason(error: BaseException, most: int = 300) -> str:
    """What an exception says, in one short line without the names of our own code; its kind where it says nothing."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, KeyError):
        return f"it has no {shown(repr(error.args[0]) if error.args else 'such entry', most)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, (TypeError, AttributeError, IndexError)):
        return f"it is not laid out as it should be ({shown(' '.join(str(error).split()), most)})"
    return shown(" ".join(str(error).split()), most) or type(error).__name__


def expanded(path: str | Path) -> Path:
    """A path as a person writes it: a leading ~ or ~name stands for a home, where there is such a user; else it is part of the name."""
    try:
        return Path(os.path.expanduser(path))
    except ValueError:  # a zero byte or half a letter after the ~
        return Path(path)


def check_regular(path: str | Path) -> os.stat_result:
    """The status of a regular file, links followed. Raises SpecialFile for anything else, OSError where there is nothing."""
    try:
        found = os.stat(path)
    except ValueError as error:
        raise FileNotFoundError(errno.ENOENT, f"No file can have such a name ({error})", str(path)) from None
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for test, name in KINDS.items() if test(found.st_mode)), "no file")
        raise SpecialFile(f"{shown(path)} is {kind}, not a regular file; remove it, or put a file in its place")
    return found


def open_file(path: str | Path, most: int | None = None) -> BinaryIO:
    """A regular file opened for reading bytes; a pipe without a writer is not waited for, a device is not touched.

    Raises SpecialFile for anything else under that name, TooLarge above `most` bytes, OSError where it cannot be opened.
    """
    check_regular(path)
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
    try:
        size = check_regular(descriptor).st_size  # once more: it may have been exchanged in between
        if most is not None and size > most:
            raise TooLarge(f"{shown(path)} is {size:,} bytes large, the most that is read here is {most:,}; split or shorten it")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: str | Path, most: int | None = None) -> bytes:
    """The bytes of a regular file. Raises as open_file; TooLarge too when it has grown beyond `most`."""
    with open_file(path, most) as file:
        data = file.read() if most is None else file.read(most + 1)
    if most is not None and len(data) > most:
        raise TooLarge(f"{shown(path)} grew beyond {most:,} bytes while it was read; the most that is read here")
    return data


def read_text(path: str | Path, most: int = TEXT_BYTES) -> str:
    """The text of a UTF-8 file, without a byte order mark. Raises InputError in one line for whatever keeps it from being read."""
    try:
        return read_bytes(path, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{shown(path)} is not UTF-8 text (byte {error.start:,}); save it again as UTF-8") from None
    except OSError as error:
        raise InputError(f"{shown(path)} cannot be read: {error.strerror}") from error


def read_json(path: str | Path, kind: type = dict, most: int = JSON_BYTES, way_out: str = "copy or make it again") -> Any:
    """The JSON value of type `kind` in a file. Raises InputError when it is none, is damaged, or is not to be trusted."""
    text = read_text(path, most)
    with reading(path, way_out):
        value = json.loads(text)
        if not isinstance(value, kind):
            raise ValueError(f"it should hold a JSON {'object' if kind is dict else 'list'}, it holds {shown(json.dumps(value), 60)}")
    return value


def own_json(text: str | bytes) -> Any:
    """The value of a JSON text that people write. Raises Refused for a name that is given twice, ValueError, RecursionError for no JSON."""
    return json.loads(text, object_pairs_hook=without_repeats)


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise Refused(f"gives '{shown(repeated, 60)}' twice; leave one of them out")
    return found


def existing_parent(place: Path) -> Path:
    """The path itself, or the nearest one above it that is there."""
    return next(path for path in (place.absolute(), *place.absolute().parents) if path.exists() or path.parent == path)


def check_can_be_written(folder: Path, option: str) -> None:
    """Raises InputError where the folder that `option` names cannot be made or written; makes nothing."""
    existing = existing_parent(folder)
    if not existing.is_dir():
        raise InputError(f"{option} {folder}: {existing} is a file, not a folder; choose another")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{option} {folder}: no permission to write in {existing}; choose another")


def follow_umask(files: Iterable[Path]) -> None:
    """Gives files that were just written the mode that any other new file has: safetensors' own writer leaves its to the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for file in files:
        if file.is_file() and not file.is_symlink():
            file.chmod(0o666 & ~mask)


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


def could_not_write(target: Path, error: BaseException) -> InputError:
    """What to say where the disk refuses `target`: a Failure, but for a place that could never be written, which was given so."""
    reason, number = getattr(error, "strerror", None) or error, getattr(error, "errno", None)
    if number in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG):
        kind, way_out = InputError, "choose a place that can be written"
    elif number in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY):
        kind, way_out = InputError, "move away what stands in its place, or choose another"
    else:  # safetensors' own error has no number
        full = number in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        kind, way_out = Failure, "free some space" if full else "try again, or choose another disk"
    return kind(f"could not write {shown(target)}: {reason}. Nothing of it was left, and nothing saved earlier was touched; {way_out}")


@contextmanager
def whole_or_nothing(target: Path) -> Iterator[Path]:
    """A context with a name beside `target` to write a file or folder under; it becomes `target` when all went well, else it goes.

    An existing `target` stays until the new one is complete. Raises as could_not_write says when the disk is full or refuses the write.
    """
    partial, old = (target.with_name(f"{target.name}.{word}") for word in ("partial", "old.partial"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove(partial)  # of a run that was killed
        yield partial
        for path in (*sorted(partial.rglob("*")), partial):  # rglob of a file finds nothing
            flush(path)
        if target.is_dir() and partial.is_dir():  # a file never takes the place of a folder
            remove(old)
            target.rename(old)  # a folder cannot be renamed over another
        partial.replace(target)
        with suppress(OSError):  # the new one is in place: what goes wrong from here on makes it no less so
            flush(target.parent)
            remove(old)
    except BaseException as error:
        with suppress(OSError):  # a disk that takes nothing does not take this either
            if old.exists() and not target.exists():
                old.rename(target)
            remove(partial)
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":  # the latter for a full disk too
            raise could_not_write(target, error) from error
        raise
