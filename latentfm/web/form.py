"""What is asked for on the page, or of its endpoint, checked by the rules of the command line and the page's limits.

Values come from anywhere: whatever is no number, no text, not finite or too large is refused here, by its name, before anything is drawn.
"""

import math
import secrets
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from latentfm.bounds import LAST_SEED
from latentfm.cli.checks import check_at_least_one, check_lora_strengths, check_name, parse_size
from latentfm.errors import InputError
from latentfm.requests import Prompt, Request, Settings, check_text, requests, values
from latentfm.sampling import Guidance, Sampler, Schedule, Solver
from latentfm.web.limits import Limits
from latentfm.words import shown

OWN = "own"  # the model's own scheduler makes the steps
SOLVERS = (OWN, *get_args(Solver))
SCHEDULES = get_args(Schedule)
RULES = tuple(rule for rule in get_args(Guidance) if rule != "autoguidance")  # which needs a second model
SEEDS = 2**32  # a seed that is drawn is below it
LONGEST = 1000  # characters of whatever is no prompt: names, sizes, lists of numbers


@dataclass(frozen=True)
class Wish:
    """A request that has been checked, but for what only its model can tell. model, lora: by their names on the page."""

    prompt: str
    seed: int
    count: int
    base: Settings
    sweeps: dict[str, list[Any]]
    model: str
    lora: str | None
    lora_strength: float
    swept: list[str] = field(default_factory=list)

    def requests(self, width: int, height: int) -> list[Request]:
        """Every picture, in the model's own size where none was asked for."""
        size = {} if self.base.width is not None else {"width": width, "height": height}
        return requests([Prompt(self.prompt)], self.count, self.seed, replace(self.base, **size), self.sweeps)


def checked(
    limits: Limits, *, prompt: Any, negative: Any = "", size: Any = "", steps: Any = 28, guidance: Any = 3, guidance_rule: Any = "cfg",
    solver: Any = OWN, schedule: Any = "model", seed: Any = None, count: Any = 1, model: Any, lora: Any = None, lora_strength: Any = 1,
    strength: Any = None, image: Path | None = None, mask: Path | None = None,
) -> Wish:  # fmt: skip
    """The wish that the values come to. Raises InputError for what cannot be, or is beyond the limits.

    steps, guidance: a number, or as text several, "4,8,16" or "1..4"; solver: several by commas. seed: None is a new one. image, mask:
    files that were kept from what was sent in.
    """
    prompt, negative = text_of("prompt", prompt, limits.upload), text_of("negative", negative or "", limits.upload)
    for what, text in (("the prompt", prompt), ("the negative prompt", negative)):
        limits.check_text(what, text)
        check_text(text, what)
    solvers = text_of("solver", solver or OWN).replace(" ", "").split(",")
    sweeps = {
        "steps": values("steps", number_text("steps", steps), int),
        "guidance": values("guidance", number_text("guidance", guidance), float),
        "solver": [None if name == OWN else name for name in dict.fromkeys(solvers)],
    }
    for name in sweeps["solver"]:
        check_name("solver", name or OWN, SOLVERS)
    check_name("schedule", text_of("schedule", schedule), SCHEDULES)
    check_name("guidance_rule", text_of("guidance_rule", guidance_rule), RULES)
    limits.check("steps", max(sweeps["steps"]), limits.steps)
    check_at_least_one({"steps": min(sweeps["steps"])})
    count = whole("count", count)
    pictures = count * math.prod(len(each) for each in sweeps.values())
    limits.check("the number of pictures", pictures, limits.batch)
    seed = secrets.randbelow(SEEDS) if seed in (None, "") else whole("seed", seed, least=0)
    if seed > LAST_SEED - (count - 1):
        raise InputError(f"seed {seed} is out of range: {count} pictures need a seed from 0 to {LAST_SEED - (count - 1)}")
    width, height = parse_size(text_of("size", size), "size") if size not in (None, "") else (None, None)
    limits.check("size", max(width or 0, height or 0), limits.size, " pixels")
    share = None if strength is None or image is None else real("strength", strength)
    weight = real("lora_strength", lora_strength)
    check_lora_strengths([weight], "lora_strength")
    sampler = Sampler(sweeps["steps"][0], sweeps["guidance"][0], sweeps["solver"][0], schedule, guidance=guidance_rule)
    base = Settings(sampler, negative or None, width, height, image, mask, share)
    requests([Prompt(prompt)], 1, 0, base, sweeps)  # each of the swept values
    swept = [name for name, each in sweeps.items() if len(each) > 1]
    return Wish(prompt, seed, count, base, sweeps, text_of("model", model), text_of("lora", lora) if lora else None, weight, swept)


def text_of(name: str, value: Any, most: int = LONGEST) -> str:
    """`value`, a text of at most so many characters. Raises InputError for anything else."""
    if not isinstance(value, str):
        raise InputError(f"{name} {shown(repr(value), 60)} is not a text")
    if len(value) > most:
        raise InputError(f"{name} '{shown(value[:100], 40)}' has {len(value):,} characters; the most is {most:,}")
    return value


def whole(name: str, value: Any, least: int = 1) -> int:
    """`value` as an int: a whole number, or the text of one. Raises InputError for anything else."""
    if isinstance(value, str) and len(value) <= 20 and value.strip().isdecimal():
        value = int(value)
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value == int(value)
    if not good or value < least:
        raise InputError(f"{name} {shown(repr(value), 60)} is not a whole number of at least {least}")
    return int(value)


def real(name: str, value: Any) -> float:
    """`value` as a finite float. Raises InputError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e12 < value < 1e12:
        raise InputError(f"{name} {shown(repr(value), 60)} is not a number")
    return float(value)


def number_text(name: str, value: Any) -> str:
    """A number, or a text of several, as `values` reads it. Raises InputError for anything else."""
    if isinstance(value, str):
        if len(value) > LONGEST:
            raise InputError(f"{name} '{shown(value, 40)}' has {len(value):,} characters; give numbers, as 8 or 4,8,16 or 1..7")
        return value
    return f"{real(name, value):.12g}"
