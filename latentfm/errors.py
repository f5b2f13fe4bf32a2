"""The one exception that means: what was given cannot be used. The command line prints it as a single line."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A file, option or value of the user's that cannot be used; the message says which, and the way out."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns " (did you mean X?)" for the closest of `names`, or "" when none is close."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""
