"""What the shell's TAB key adds: names of a run's options, and of the values that an option may have."""

from collections.abc import Callable, Iterable
from typing import Annotated, get_args

import typer


def names(values: Iterable[str]) -> Callable[[str], list[str]]:
    """A function from the word at hand to what it may become; of several by commas the last is completed."""
    values = list(values)

    def complete(incomplete: str) -> list[str]:
        before, comma, begun = incomplete.rpartition(",")
        return [before + comma + value for value in values if value.startswith(begun)]

    return complete


def run_options(incomplete: str) -> list[str]:
    """ "train.optimizer=" for "train.opt", "train.optimizer=adamw" for "train.optimizer=ad"."""
    from latentfm.config import OPTIONS

    name, equals, begun = incomplete.partition("=")
    if not equals:
        return [option + "=" for option in OPTIONS if option.startswith(name)]
    if name not in OPTIONS:
        return []
    return [f"{name}={value}" for value in words(OPTIONS[name].annotation) if value.startswith(begun)]


def words(annotation: object) -> list[str]:
    """The texts and truth values that a type allows by name."""
    if annotation is bool:
        return ["true", "false"]
    return [word for each in get_args(annotation) for word in ([each] if isinstance(each, str) else words(each))]


Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Options of a run, on top of its configuration.", autocompletion=run_options),
]
