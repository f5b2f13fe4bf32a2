"""Whether a picture shows what its prompt asks for, by GenEval's tasks and rules (Ghosh et al. 2023).

A prompts file is GenEval's own metadata.jsonl, or one like it: a JSON object a line with `prompt`, `tag` (one of TASKS), `include`
(things with `class`, `count`, and where asked `color` and `position`: [relation, index of the thing that it relates to]) and `exclude`.
A line with a prompt alone is drawn, and counts for all figures but these.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from latentfm.errors import InputError, nearest
from latentfm.evaluation.detection import Detection
from latentfm.files import Refused, own_json, read_text
from latentfm.requests import check_text
from latentfm.words import listed, shown

TASKS = {
    "single_object": "single object", "two_object": "two objects", "counting": "counting", "colors": "colours", "position": "position",
    "color_attr": "attribute binding",
}  # fmt: skip
RELATIONS = ("left of", "right of", "above", "below")
POSITION_THRESHOLD = 0.1  # of the boxes' sizes: an offset below it is none


@dataclass(frozen=True)
class Thing:
    """Things of a class that there must be `count` of, or, excluded, fewer. position: (relation, index of the other in `include`)."""

    name: str
    count: int = 1
    colour: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Asked:
    """A prompt, and what its picture has to show: nothing that can be told if `include` is empty."""

    prompt: str
    task: str | None = None
    include: tuple[Thing, ...] = ()
    exclude: tuple[Thing, ...] = ()


def read_asked(file: Path) -> list[Asked]:
    """What a prompts file asks for. Raises InputError naming the line that is wrong, and for a file without a prompt."""
    lines = [(n, line) for n, line in enumerate(read_text(file).split("\n"), start=1) if line.strip()]
    if not lines:
        raise InputError(f"--prompts {shown(file)} has no prompt in it; it has a JSON object a line, as GenEval's metadata.jsonl")
    return [asked_of(line, f"--prompts {shown(file)}, line {number}") for number, line in lines]


def asked_of(line: str, where: str) -> Asked:
    """What one line asks for. Raises InputError for what it cannot mean."""
    try:
        row = own_json(line)
    except Refused as error:
        raise InputError(f"{where} {error}") from None
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise InputError(f'{where}: {shown(line, 60)} is no JSON object with a prompt, as {{"prompt": "a cat"}}')
    check_text(row["prompt"], f"the prompt in {where}")
    task = row.get("tag")
    if task is not None and task not in list(TASKS):
        raise InputError(f"{where}: no tag {shown(repr(task), 40)}{nearest(str(task), TASKS)}; there are {listed(TASKS, 6)}")
    include, exclude = (tuple(thing_of(each, where) for each in things_of(row.get(name), where)) for name in ("include", "exclude"))
    if (task is None) != (not include):
        raise InputError(f"{where}: tag and include need each other")
    for thing in include:
        if thing.position and not 0 <= thing.position[1] < len(include):
            raise InputError(f"{where}: position {list(thing.position)} relates to none of the {len(include)} included")
    return Asked(row["prompt"], task, include, exclude)


def things_of(given: object, where: str) -> Sequence[object]:
    if given is None or isinstance(given, list):
        return given or []
    raise InputError(f"{where}: include and exclude are lists of things, not {shown(repr(given), 60)}")


def thing_of(given: object, where: str) -> Thing:
    """A thing as GenEval writes it. Raises InputError."""
    found = given if isinstance(given, dict) else {}
    name, count, colour, position = found.get("class"), found.get("count", 1), found.get("color"), found.get("position")
    good = isinstance(name, str) and type(count) is int and count > 0 and (colour is None or isinstance(colour, str))
    if position is not None:
        good = good and isinstance(position, list) and len(position) == 2 and position[0] in RELATIONS and type(position[1]) is int
    if not good or found.keys() - {"class", "count", "color", "position"}:
        example = '{"class": "cat", "count": 1, "color": "red", "position": ["left of", 0]}'
        raise InputError(f"{where}: {shown(json.dumps(given), 100)} is no thing, as {example}; relations are {listed(RELATIONS)}")
    return Thing(name, count, colour, tuple(position) if position else None)


def relations(one: Sequence[float], other: Sequence[float]) -> set[str]:
    """How box `one` (left, top, right, bottom) lies to `other`: GenEval's relative_position, at most one word across and one down."""
    offset, revised = [], []
    for low, high in ((0, 2), (1, 3)):
        apart = (one[low] + one[high] - other[low] - other[high]) / 2
        sizes = abs(one[high] - one[low]) + abs(other[high] - other[low])
        offset.append(apart)
        revised.append(max(abs(apart) - POSITION_THRESHOLD * sizes, 0.0) * (1 if apart > 0 else -1))
    length = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    if all(abs(each) < 1e-3 for each in revised):
        return set()
    across, down = (each / length for each in revised)
    said = {"left of": across < -0.5, "right of": across > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {name for name, holds in said.items() if holds}


def verdict(asked: Asked, found: Sequence[Detection]) -> tuple[bool, str]:
    """(whether the picture shows what is asked, what is wrong with it or ""), by what was found in it, the surest first."""
    wrong: list[str] = []
    groups: list[list[Detection] | None] = []  # of each included, its things; None where something is wrong with them
    for thing in asked.include:
        there = [each for each in found if each.label == thing.name]
        chosen, before = there[: thing.count], len(wrong)
        if len(there) < thing.count:
            wrong.append(f"{len(there)} {thing.name}, not {thing.count}")
        else:
            colours = [each.colour for each in chosen]
            if thing.colour and colours.count(thing.colour) < thing.count:
                wrong.append(f"{thing.name} {', '.join(str(colour) for colour in colours)}, not {thing.colour}")
            if thing.position and len(wrong) == before:
                wrong += misplaced(thing, chosen, groups)
        groups.append(chosen if len(wrong) == before else None)
    for thing in asked.exclude:
        if (number := sum(each.label == thing.name for each in found)) >= thing.count:
            wrong.append(f"{number} {thing.name}, not below {thing.count}")
    return not wrong, "; ".join(wrong)


def misplaced(thing: Thing, chosen: Sequence[Detection], groups: Sequence[list[Detection] | None]) -> list[str]:
    """What is wrong with the places of `chosen`, in a word for each."""
    relation, index = thing.position
    others = groups[index] if index < len(groups) else None
    if others is None:
        return [f"nothing for {thing.name} to be {relation}"]
    said = [(other, relations(one.box, other.box)) for one in chosen for other in others]
    return [f"{thing.name} {' and '.join(sorted(holds)) or 'upon'} {other.label}, not {relation}" for other, holds in said
            if relation not in holds][:1]  # fmt: skip
