"""What the commands check of their input before they load anything heavy. Each raises InputError with the way out."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from latentfm.bounds import MOST_LORA
from latentfm.errors import InputError, nearest
from latentfm.requests import Prompt, check_text, read_prompts

if TYPE_CHECKING:
    import torch


def wanted_prompts(prompts: Sequence[str] | None, file: Path | None) -> list[Prompt]:
    """The prompts given as arguments, then those of `file`. Raises InputError when there is none or they cannot be read."""
    for text in prompts or []:
        check_text(text, "the prompt")
    found = [Prompt(text) for text in prompts or []] + (read_prompts(file) if file is not None else [])
    if not found:
        raise InputError('no prompt: give one in quotes, as in latentfm generate "a red apple", or a file with --prompts-file')
    return found


def check_at_least_one(values: dict[str, int]) -> None:
    """Raises InputError naming the first option of `values` that is below 1."""
    for option, value in values.items():
        if value < 1:
            raise InputError(f"{option} {value} must be at least 1")


def check_at_most(values: dict[str, tuple[int, int]]) -> None:
    """Raises InputError naming the first option of `values` (number, most) that is beyond what is taken."""
    for option, (value, most) in values.items():
        if value > most:
            raise InputError(f"{option} {value} is more than {most:,}, the most that is taken at once")


def check_name(option: str, name: str, names: tuple[str, ...]) -> None:
    """Raises InputError when `name` is none of `names`, suggesting the nearest."""
    if name not in names:
        raise InputError(f"{option} {name!r} does not exist{nearest(name, names)}; there are {', '.join(names)}")


def check_lora_strengths(strengths: Sequence[float], option: str) -> None:
    """Raises InputError for a LoRA's strength that is out of range, or no number."""
    for strength in strengths:
        if not -MOST_LORA <= strength <= MOST_LORA:  # nan too
            raise InputError(f"{option} {strength} is no strength from -{MOST_LORA:g} to {MOST_LORA:g}; 1 is all of it, 0 none")


def model_folder(model: Path | None, option: str = "--model") -> Path:
    """The pipeline folder that `option` names, the bundled one if none.

    Raises InputError when it is missing, or when the pipeline is a folder further down.
    """
    if model is None:
        from latentfm.bundled import bundled_model

        return bundled_model()
    if not model.is_dir():
        what = "is a file" if model.exists() else "does not exist"
        raise InputError(f"{option} {model} {what}; give a pipeline folder (with a model_index.json), saved by latentfm or diffusers")
    if not (model / "model_index.json").is_file():
        below = sorted(index.parent for pattern in ("*", "*/*") for index in model.glob(f"{pattern}/model_index.json"))
        if below:
            raise InputError(f"{option} {model} has no model_index.json; did you mean {below[-1]}?")
    return model


def parse_size(text: str, option: str = "--size") -> tuple[int, int]:
    """(width, height) in pixels of "512x768" or "512". Raises InputError."""
    found = re.fullmatch(r"\s*(\d{1,6})\s*(?:[xX×*]\s*(\d{1,6})\s*)?", text)
    if not found:
        raise InputError(f"{option} {text!r} is no size; write WIDTHxHEIGHT, as in 512x768, or one number for a square")
    return int(found[1]), int(found[2] or found[1])


def check_size(width: int, height: int, multiple: int, largest: int, option: str = "--size") -> None:
    """Raises InputError, naming sizes that work, unless both sides are multiples of `multiple` and at most `largest`."""
    if all(0 < side <= largest and side % multiple == 0 for side in (width, height)):
        return
    top = largest // multiple * multiple
    lower, upper = (
        "x".join(str(min(top, max(multiple, rounding(side / multiple) * multiple))) for side in (width, height))
        for rounding in (math.floor, math.ceil)
    )
    near = f"the nearest is {lower}" if lower == upper else f"the nearest are {lower} and {upper}"
    raise InputError(f"{option} {width}x{height} does not fit this model: multiples of {multiple} up to {top} a side do; {near}")


def chosen_dtype(name: str, device: "torch.device") -> str:
    """The dtype that `name` means on a device: auto is bfloat16, and float32 on a CPU that would imitate it, several times as slow."""
    from latentfm.training.precision import has_bfloat16

    return name if name != "auto" else "float32" if device.type == "cpu" and not has_bfloat16(device) else "bfloat16"


def chosen_device(name: str) -> "torch.device":
    """The device that `name` means on this machine. Raises InputError when there is no such device here."""
    import torch

    from latentfm.training.precision import computing_device

    here = computing_device()
    if name == "auto":
        return here
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name!r} is no device; write cpu, cuda, or cuda:0 and so on") from None
    if device.type == "cpu":
        return device
    if device.type != here.type:
        raise InputError(f"--device {name}: torch sees no such device on this machine; use --device {here.type}")
    if device.index is not None and device.index >= torch.accelerator.device_count():
        raise InputError(f"--device {name}: there are only {torch.accelerator.device_count()}, counted from 0")
    return device
