"""What a pipeline's call is given, checked by kind before any work is done: refusals name argument, value and what is taken."""

import math
import numbers as kinds
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from latentfm.errors import InputError
from latentfm.words import shown


def told(value: object) -> str:
    """A value as an error names it: short, with its kind where that is not plain."""
    value = plain_number(value)
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    text = shown(repr(value), 60)
    return text if value is None or isinstance(value, str | int | float) else f"{text} ({type(value).__name__})"


def plain_number(value: Any) -> Any:
    """The number in a torch or numpy scalar; anything else as it is."""
    single = getattr(value, "shape", None) == () and hasattr(value, "item") and not getattr(value, "is_meta", False)
    return value.item() if single else value


def whole_number(name: str, value: Any, least: int | None = 1, most: int | None = None) -> int:
    """`value` as an int: a whole number of Python's, numpy's or torch's, or a float that is whole, as sliders give them.

    Raises InputError for anything else, and outside `least` to `most`.
    """
    number = plain_number(value)
    whole = isinstance(number, kinds.Integral) or (isinstance(number, kinds.Real) and math.isfinite(number) and number == int(number))
    if isinstance(number, bool) or not whole or (least is not None and number < least):
        raise InputError(f"{name} {told(value)} must be a whole number" + ("" if least is None else f" of at least {least}"))
    if most is not None and number > most:
        raise InputError(f"{name} {told(value)} is more than {most:,}, the most that is taken here")
    return int(number)


def real_number(name: str, value: Any, meaning: str) -> float:
    """`value` as a float. Raises InputError, saying what the number means, for what is none or not finite."""
    number = plain_number(value)
    try:
        found = float(number) if isinstance(number, kinds.Real) and not isinstance(number, bool) else math.nan
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise InputError(f"{name} {told(value)} is not a number {meaning}")
    return found


def pair(name: str, value: Any) -> tuple[float, float]:
    """`value` as two floats. Raises InputError for anything else."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise InputError(f"{name} {told(value)} must be two numbers")
    return real_number(name, value[0], "to begin with"), real_number(name, value[1], "to end with")


def numbers(name: str, value: Any) -> list[float]:
    """`value`, one number or more in a list, an array or a tensor, as floats. Raises InputError for anything else."""
    try:
        found = list(value)
    except TypeError:
        found = []
    if not found or isinstance(value, str | bytes | dict):
        raise InputError(f"{name} {told(value)} must be a list of numbers")
    return [real_number(name, each, "in a list of them") for each in found]


def texts(name: str, value: Any) -> str | list[str] | None:
    """`value`: a text, a list of texts, or None. Raises InputError for anything else, and for text that is no valid Unicode."""
    if value is None or isinstance(value, str):
        found = value
    elif isinstance(value, list | tuple):
        found = list(value)
    else:
        raise InputError(f"{name} must be a text or a list of texts, not {told(value)}")
    for text in [found] if isinstance(found, str) else found or []:
        if not isinstance(text, str):
            raise InputError(f"{name} must hold texts alone, not {told(text)}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(f"{name} {told(text)} is no valid Unicode text: half of a character is missing") from None
    return found


def tensor(name: str, value: Any, shape: tuple[int | None, ...], meaning: str) -> Tensor | None:
    """`value`, a floating-point tensor of this shape (None: any size there), or None. Raises InputError for anything else."""
    if value is None:
        return None
    fits = isinstance(value, Tensor) and value.is_floating_point() and value.ndim == len(shape)
    if not fits or any(wanted not in (None, size) for wanted, size in zip(shape, value.shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise InputError(f"{name} must be a floating-point tensor of shape ({wanted}), {meaning}, not {told(value)}")
    check_finite(name, value)
    return value


def check_finite(name: str, value: Tensor) -> None:
    """Raises InputError for a tensor with a number in it that is none, or is infinite."""
    if not torch.isfinite(value).all():
        raise InputError(f"{name} has numbers in it that are not finite (NaN or infinity)")


def generators(value: Any) -> torch.Generator | list[torch.Generator] | None:
    """`value`: a torch.Generator, a list of them, or None. Raises InputError for anything else."""
    if value is None or isinstance(value, torch.Generator):
        return value
    if isinstance(value, list | tuple) and value and all(isinstance(each, torch.Generator) for each in value):
        return list(value)
    example = "for example torch.Generator().manual_seed(7)"
    raise InputError(f"generator must be a torch.Generator or a list of them, one a picture, not {told(value)}; {example}")


def names(name: str, value: Any, known: Iterable[str]) -> list[str]:
    """`value`, a list of some of the names `known`. Raises InputError for anything else."""
    known = list(known)
    if not isinstance(value, list | tuple):
        raise InputError(f"{name} must be a list of names, not {told(value)}; there are {', '.join(known)}")
    unknown = [each for each in value if not isinstance(each, str) or each not in known]
    if unknown:
        raise InputError(f"{name}: {', '.join(map(told, unknown))} do not exist; there are {', '.join(known)}")
    return list(value)
