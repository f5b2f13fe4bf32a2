"""What the command line prints as a single line: what was given cannot be used, or could be and the work failed all the same."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """A file, option or value of the user's that cannot be used; the message says which, and the way out."""

    exit_code = 2


class Failure(InputError):
    """Work that failed on what could be used: a disk that is full, memory that ran out, a loss that is not finite, a process that died."""

    exit_code = 1


class Problems:
    """Several InputErrors, collected so as to be told at once."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    @contextmanager
    def collected(self) -> Iterator[None]:
        """A context whose InputError, or each of those that it was raised for, is kept instead of raised."""
        try:
            yield
        except InputError as error:
            said = getattr(error, "messages", [str(error)])
            self.messages += [message for message in said if message not in self.messages]

    def raise_all(self) -> None:
        """Raises one InputError with all there are, numbered where they are several; nothing where there is none."""
        if not self.messages:
            return
        each = "; ".join(f"({number}) {message}" for number, message in enumerate(self.messages, start=1))
        error = InputError(self.messages[0] if len(self.messages) == 1 else f"{len(self.messages)} things are wrong: {each}")
        error.messages = self.messages
        raise error


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns " (did you mean X?)" for the closest of `names`, or "" when none is close."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""
