"""What is asked for, picture by picture: prompts with settings of their own, sweeps over numbers, and settings taken from a picture.

Without torch: all of it is checked before a model is loaded.
"""

import csv
import io
import itertools
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from latentfm.bounds import LAST_SEED, MOST_GUIDANCE, MOST_LETTERS, MOST_STEPS
from latentfm.errors import InputError, nearest
from latentfm.files import Refused, SpecialFile, own_json, read_text
from latentfm.sampling import Sampler
from latentfm.words import is_text, listed, shortened, shown

MOST_VALUES = 64  # of an option that is swept
# what a line of a prompts file may say besides its prompt, and how it is read
OWN = {
    "seed": int, "steps": int, "guidance": float, "negative": str, "solver": str, "schedule": str, "shift": float, "guidance_rule": str,
    "guidance_rescale": float, "zero_init": int, "noise": float, "width": int, "height": int, "image": str, "mask": str, "strength": float,
}  # fmt: skip
# what a picture says of itself that another one can be made like
LISTS = ("guidance_interval", "lora", "lora_strength", "without")
LIKE = {name: kind for name, kind in OWN.items() if name != "negative"} | {
    "prompt": str, "negative_prompt": str, "guidance_interval": float, "model": str, "model_fingerprint": str, "lora": str,
    "lora_strength": float, "reference": str, "dtype": str, "attention": str, "variant": str, "without": str,
    "compile": bool,
}  # fmt: skip
SAMPLER = {"steps": "num_inference_steps", "guidance": "guidance_scale", "guidance_rule": "guidance"}  # other names are the Sampler's own


@dataclass(frozen=True)
class Settings:
    """How a picture is drawn. width, height: pixels, the model's own if None. image, mask: files to begin from; see LatentFMPipeline."""

    sampler: Sampler = Sampler()
    negative: str | None = None
    width: int | None = None
    height: int | None = None
    image: Path | None = None
    mask: Path | None = None
    strength: float | None = None

    def __post_init__(self) -> None:
        """Raises InputError for what does not go together, or is out of its range."""
        if not 0 <= self.sampler.guidance_scale <= MOST_GUIDANCE:  # false for nan too
            strength = f"guidance {self.sampler.guidance_scale} is not a strength from 0 to {MOST_GUIDANCE:g}"
            raise InputError(f"{strength}; 1 is no guidance, 2 to 5 is usual")
        if self.sampler.num_inference_steps > MOST_STEPS:
            raise InputError(f"steps {self.sampler.num_inference_steps} must be from 1 to {MOST_STEPS:,}")
        if self.mask is not None and self.image is None:
            raise InputError(f"mask {shown(self.mask)} needs an image that it is laid on")
        if self.strength is not None and (self.image is None or not 0 < self.strength <= 1):
            raise InputError(f"strength {self.strength:g} needs an image, and is from above 0, the picture itself, to 1, noise")

    def changed(self, own: Mapping[str, Any]) -> "Settings":
        """These settings with some of OWN changed. Raises InputError for values that cannot be."""
        ours = {field.name for field in fields(self)} - {"sampler"}
        sampler = {SAMPLER.get(name, name): value for name, value in own.items() if name not in ours and name != "seed"}
        mine = {name: Path(value) if name in ("image", "mask") else value for name, value in own.items() if name in ours}
        return replace(self, sampler=replace(self.sampler, **sampler), **mine)

    def recorded(self) -> dict[str, Any]:
        """The settings as a picture's PNG holds them."""
        given = {name: getattr(self, name) for name in ("image", "mask", "strength")}
        return {
            "negative_prompt": self.negative or "",
            "steps": self.sampler.num_inference_steps,
            "guidance": self.sampler.guidance_scale,
            **self.sampler.unusual(),
            **{name: value if name == "strength" else str(value) for name, value in given.items() if value is not None},
            "width": self.width,
            "height": self.height,
        }


@dataclass(frozen=True)
class Request:
    """A picture that is asked for. swept: the values of the swept options that it is drawn with, in the options' order."""

    prompt: str
    seed: int
    settings: Settings
    swept: tuple[Any, ...] = ()


class Prompt(str):
    """A prompt, what it says of its own settings, some of OWN, and where it stands, for errors: a file and line, or nothing."""

    own: Mapping[str, Any]
    where: str

    def __new__(cls, text: str, own: Mapping[str, Any] | None = None, where: str = "") -> "Prompt":
        prompt = super().__new__(cls, text)
        prompt.own, prompt.where = own or {}, where
        return prompt

    def settings(self, base: Settings) -> Settings:
        """`base` with its own settings. Raises InputError, with its place, for those that do not go together."""
        try:
            return base.changed(self.own)
        except InputError as error:
            raise InputError(f"{self.where}: {error}" if self.where else str(error)) from None


def requests(prompts: Sequence[Prompt], number: int, seed: int, base: Settings, sweeps: Mapping[str, Sequence[Any]]) -> list[Request]:
    """Every picture: of each prompt `number`, seeds counting on from `seed` or from the prompt's own, each with all swept values.

    Raises InputError for settings that do not go together.
    """
    found, variants = [], [dict(zip(sweeps, values, strict=True)) for values in itertools.product(*sweeps.values())]
    for variant in variants:
        for place, prompt in enumerate(prompts):
            settings = prompt.settings(base.changed(variant))
            first = prompt.own.get("seed", seed + place * number)
            found += [Request(str(prompt), first + each, settings, tuple(variant.values())) for each in range(number)]
    return found


def check_own(prompts: Sequence[Prompt], number: int, sweeps: Mapping[str, Sequence[Any]]) -> None:
    """Raises InputError for a prompt with a setting of its own that is swept, and for a seed that `number` pictures do not fit behind."""
    last = LAST_SEED - (number - 1)
    for prompt in prompts:
        if twice := [name for name, values in sweeps.items() if len(values) > 1 and name in prompt.own]:
            raise InputError(f"{prompt.where} has {twice[0]} {prompt.own[twice[0]]} of its own, and several are asked for; leave one out")
        if prompt.own.get("seed", 0) > last:
            raise InputError(f"{prompt.where}: seed {prompt.own['seed']} is out of range: {number} pictures need one from 0 to {last}")


def batches(asked: Sequence[Request], size: int) -> Iterable[list[Request]]:
    """The requests in their order, at most `size` at a time, those of a batch with the same settings."""
    for _, group in itertools.groupby(asked, key=lambda request: request.settings):
        rest = list(group)
        for start in range(0, len(rest), size):
            yield rest[start : start + size]


def values(option: str, text: str, kind: type) -> list[Any]:
    """The values of an option that may be swept: "8", "4,8,16", "1..7" (whole steps) or "1..3:0.5". Raises InputError."""
    found: list[Any] = []
    for part in text.split(","):
        span = re.fullmatch(r"\s*(\S+?)\s*\.\.\s*([^:\s]+)\s*(?::\s*(\S+))?\s*", part)
        try:
            if span is None:
                found.append(kind(part))
                continue
            first, last, step = kind(span[1]), kind(span[2]), kind(span[3] or 1)
            count = (last - first) / step
            if not 0 <= count <= MOST_VALUES:
                raise ValueError
            found += [kind(first + step * each) for each in range(int(count + 1e-9) + 1)]
        except (ValueError, TypeError, ArithmeticError):
            noun = "whole numbers" if kind is int else "numbers"
            raise InputError(f"{option} {shown(repr(text), 60)}: give {noun}, as 8 or 4,8,16 or 1..7") from None
    if len(found) > MOST_VALUES:
        raise InputError(f"{option} has {len(found)} values; {MOST_VALUES} are the most that are swept")
    return list(dict.fromkeys(found))


def read_prompts(file: Path, option: str = "--prompts-file") -> list[Prompt]:
    """The prompts of a file, with what they say of their own settings.

    Text (one a line), .csv or .tsv with a prompt column, .jsonl, or .json, a list of texts and objects. "-" is standard input: JSON lines
    where its first line is an object, text otherwise. Raises InputError naming the line that is wrong.
    """
    try:
        text = sys.stdin.buffer.read().decode("utf-8") if str(file) == "-" else read_text(file)
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is no UTF-8 text: byte {error.start}") from None
    except SpecialFile as error:
        what = str(error).partition(";")[0]
        raise InputError(f"{option} {what}; from a pipe prompts are read as standard input: {option} -") from None
    except InputError as error:
        raise InputError(f"{option} {error}; it is a UTF-8 file: text with one prompt a line, .csv, .tsv, .json or .jsonl") from None
    kind = file.suffix.lower() if str(file) != "-" else ".jsonl" if text.lstrip().startswith("{") else ".txt"
    if kind in (".csv", ".tsv"):
        rows = table_rows(file, text, "," if kind == ".csv" else "\t")
    elif kind == ".json":
        rows = list_rows(file, text)
    else:
        # an end of line is a line feed, a carriage return, or both; what else Unicode calls one is part of the prompt
        numbered = [(n, line.strip()) for n, line in enumerate(re.split(r"\r\n|\n|\r", text), start=1) if line.strip()]
        rows = [(n, parsed(file, n, line) if kind in (".jsonl", ".ndjson") else {"prompt": line}) for n, line in numbered]
    place = "prompt" if kind == ".json" else "line"
    found = [own_prompt(f"{shown(file)}, {place} {number}", row) for number, row in rows]
    if not found:
        raise InputError(f"{option} {shown(file)} has no prompt in it; write one a line")
    return found


def table_rows(file: Path, text: str, delimiter: str) -> list[tuple[int, dict[str, Any]]]:
    """(line, row) of each row of a table. Raises InputError for a quote that does not end, and for more values than columns."""
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter, strict=True)
    found = []
    try:
        names = list(reader.fieldnames or ())
        if twice := [name for name in names if name and names.count(name) > 1]:
            raise InputError(f"{shown(file)} has {names.count(twice[0])} columns called '{shown(twice[0])}': give each a name of its own")
        for row in reader:
            if None in row:
                more = shown(str(row[None][0]), 60)
                raise InputError(f"{shown(file)}, line {reader.line_num} has more values than columns ({more}); quote texts with commas")
            found.append((reader.line_num, row))
    except csv.Error as error:
        raise InputError(f"{shown(file)} is no table beyond line {found[-1][0] if found else 1}: {error}; is a quote not closed?") from None
    return found


def list_rows(file: Path, text: str) -> list[tuple[int, dict[str, Any]]]:
    """(number, row) of each prompt of a JSON list. Raises InputError for what is none."""
    try:
        found = own_json(text)
    except Refused as error:
        raise InputError(f"{shown(file)} {error}") from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(each, dict | str) for each in found):
        raise InputError(f'{shown(file)} is no JSON list of prompts, as ["a cat", {{"prompt": "a dog", "seed": 3}}]; .jsonl has JSON lines')
    return [(n, {"prompt": each} if isinstance(each, str) else each) for n, each in enumerate(found, start=1)]


def parsed(file: Path, number: int, line: str) -> dict[str, Any]:
    """The object of a JSON line. Raises InputError for what is none."""
    try:
        found = own_json(line)
    except Refused as error:
        raise InputError(f"{shown(file)}, line {number} {error}") from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InputError(f'{shown(file)}, line {number}: {shown(line, 60)} is no JSON object, as {{"prompt": "a cat", "seed": 3}}')
    return found


def own_prompt(where: str, row: Mapping[str, Any]) -> Prompt:
    """A row of a prompts file. Raises InputError for a key that is not known and a value that is of another kind."""
    given = {name: value for name, value in row.items() if value not in (None, "") or name == "prompt"}
    if not isinstance(given.get("prompt"), str):
        what = f"its prompt is {shown(repr(row['prompt']), 60)}" if "prompt" in row else f"it has {listed(map(str, row)) or 'nothing'}"
        raise InputError(f"{where} has no prompt, which is a text: {what}")
    check_text(given["prompt"], f"a prompt in {where}")
    own: dict[str, Any] = {}
    for name in given.keys() - {"prompt"}:
        if name not in OWN:
            raise InputError(f"{where}: no setting {shown(repr(name), 40)}{nearest(str(name), OWN)}; there are {listed(sorted(OWN))}")
        try:
            if isinstance(given[name], bool | dict | list):
                raise ValueError
            own[name] = (whole if OWN[name] is int else OWN[name])(given[name])
        except (ValueError, TypeError, OverflowError):
            noun = {int: "a whole number", float: "a number", str: "a text"}[OWN[name]]
            raise InputError(f"{where}: {name} {shown(repr(given[name]), 60)} is not {noun}") from None
    if not 0 <= own.get("seed", 0) <= LAST_SEED:
        raise InputError(f"{where}: seed {own['seed']} is out of range: a seed is from 0 to {LAST_SEED}")
    return Prompt(given["prompt"], own, where)


def whole(value: Any) -> int:
    """A whole number, exactly; a table's 3.0 is one too. Raises ValueError for none."""
    try:
        return int(str(value))
    except ValueError:
        if float(value) != int(float(value)):
            raise
        return int(float(value))


def own_settings(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of a picture's settings another can be drawn with, by LIKE. Raises InputError for a value of another kind than ours are."""
    found = {name: value for name, value in settings.items() if name in LIKE and value is not None}
    for name, value in found.items():
        kind, each = {float: int | float}.get(LIKE[name], LIKE[name]), value if name in LISTS else [value]
        good = isinstance(each, list) and all(isinstance(one, kind) and isinstance(one, bool) == (kind is bool) for one in each)
        if not good or (name == "guidance_interval" and len(value) != 2):
            raise InputError(f"the settings in {shown(path)} are damaged: {name} is {shown(repr(value), 60)}")
    return found


def check_text(text: str, what: str) -> None:
    """Raises InputError for text that is too long, has a zero byte, or is no Unicode (bytes in another encoding than the terminal's)."""
    if len(text) > MOST_LETTERS:
        raise InputError(f"{what} '{shortened(text)}' has {len(text):,} characters; the most is {MOST_LETTERS:,}")
    if not is_text(text):
        raise InputError(f"{what} {shown(repr(text), 80)} is not valid UTF-8: it is of another encoding, or a part of it is missing")
    if "\0" in text:
        raise InputError(f"{what} {shown(repr(text), 80)} holds a zero byte; leave it out")
