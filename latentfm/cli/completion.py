"""What the shell's TAB key adds: names of a run's options, and of the values that an option may have."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, get_args

import typer

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo


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

    return completed(incomplete, OPTIONS)


def vae_options(incomplete: str) -> list[str]:
    """The same of the options of `latentfm train-vae`."""
    from latentfm.training.vae.options import VAE_OPTIONS

    return completed(incomplete, VAE_OPTIONS)


def completed(incomplete: str, options: "Mapping[str, FieldInfo]") -> list[str]:
    """What a word may become that begins one of `options` or its value."""
    name, equals, begun = incomplete.partition("=")
    if not equals:
        return [option + "=" for option in options if option.startswith(name)]
    if name not in options:
        return []
    return [f"{name}={value}" for value in words(options[name].annotation) if value.startswith(begun)]


def words(annotation: object) -> list[str]:
    """The texts and truth values that a type allows by name."""
    if annotation is bool:
        return ["true", "false"]
    return [word for each in get_args(annotation) for word in ([each] if isinstance(each, str) else words(each))]


HELP = "Options of a run, on top of its configuration."
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help=HELP, autocompletion=run_options)]
VAEOverrides = Annotated[list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help=HELP, autocompletion=vae_options)]
