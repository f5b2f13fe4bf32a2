"""Files damaged in every way that a seed draws, and readers held to two answers: one line that explains, or the right result.

A room's tests list its readers as `Reader`s and call `survives` for each; test_mutations.py has those of models, weights and adapters.
"""

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from latentfm.errors import InputError

LONGEST = 1500  # characters of a message
SLOWEST = 20.0  # seconds that a reader may take over a small damaged file, on a busy machine
WRONG = (
    None, True, -1, 0, 1.5, 10**9, 10**30, 1e308, float("nan"), "", "x", "\x1b[31m\nfoo", "../../etc/passwd", "\0", [], {}, [1, "2"],
    {"a": 1},
)  # fmt: skip
DEPTH = 100_000


class Reader(NamedTuple):
    """What reads a folder, and the names in it of the files that are damaged, one at a time.

    right: whether a result of `read` on a damaged folder will do, given that of the sound folder; any result will where it is None.
    """

    name: str
    read: Callable[[Path], Any]
    files: Callable[[Path], list[str]]
    right: Callable[[Any, Any], bool] | None = None


def survives(reader: Reader, sound: Path, place: Path, count: int, seed: int = 0) -> dict[str, int]:
    """How often `reader` refused and how often it read, over `count` damages of copies of `sound`; AssertionError for anything else."""
    draw = random.Random(f"{reader.name} {seed}")
    before, found = reader.read(sound), {"refused": 0, "read": 0}
    names = reader.files(sound)
    assert names
    for number in range(count):
        name = names[number % len(names)]
        folder = shutil.copytree(sound, place / str(number), symlinks=True)
        said, data = damaged((sound / name).read_bytes(), name, draw)
        (folder / name).write_bytes(data)
        what, began = f"{reader.name}, {name}, damage {number}: {said}", time.monotonic()
        try:
            result = reader.read(folder)
        except InputError as error:
            check_message(str(error), what)
            found["refused"] += 1
        except Exception as error:
            raise AssertionError(f"{what} -> {type(error).__name__}: {error}") from error
        else:
            assert reader.right is None or reader.right(result, before), f"{what} -> a wrong result, and not a word"
            found["read"] += 1
        assert time.monotonic() - began < SLOWEST, f"{what} took {time.monotonic() - began:.0f} s"
        shutil.rmtree(folder)
    return found


def check_message(text: str, what: str) -> None:
    """The message is one line of a bearable length that a terminal shows and does not obey."""
    assert text and "\n" not in text and "\x1b" not in text and "\0" not in text, f"{what} -> {text!r}"
    assert len(text) <= LONGEST, f"{what} -> {len(text)} characters: {text[:300]!r}"


def damaged(data: bytes, name: str, draw: random.Random) -> tuple[str, bytes]:
    """What was done, in words, and the damaged bytes of a file called `name`."""
    if name.endswith(".json") and draw.random() < 0.75:
        return damaged_json(data, draw)
    if name.endswith(".safetensors") and draw.random() < 0.75:
        length = int.from_bytes(data[:8], "little")
        said, header = damaged_json(data[8 : 8 + length], draw)
        return f"header: {said}", len(header).to_bytes(8, "little") + header + data[8 + length :]
    return damaged_bytes(data, draw)


def damaged_bytes(data: bytes, draw: random.Random) -> tuple[str, bytes]:
    """Bytes flipped, cut short, doubled, put in, or gone."""
    place, end = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    kind = draw.choice(["flip", "flip", "flip the start", "cut", "empty", "double", "drop", "zeros", "noise", "append"])
    if kind.startswith("flip"):
        changed = bytearray(data)
        for _ in range(draw.choice([1, 1, 8])):
            at = draw.randrange(min(len(data), 200 if kind == "flip the start" else len(data)))
            changed[at] ^= 1 << draw.randrange(8)
        return f"{kind} near {place}", bytes(changed)
    noise = bytes(draw.randrange(256) for _ in range(32))
    return f"{kind} {place} to {end}", {
        "cut": data[:place], "empty": b"", "double": data[:end] + data[place:], "drop": data[:place] + data[end:],
        "zeros": data[:place] + bytes(end - place) + data[end:], "noise": data[:place] + noise + data[place:], "append": data + noise,
    }[kind]  # fmt: skip


def damaged_json(data: bytes, draw: random.Random) -> tuple[str, bytes]:
    """A value of another type, a key gone or misspelt, a number without bounds, a list that is long or deep; at any place of the value."""
    value = json.loads(data)
    places = list(walk(value))
    holder, key = draw.choice(places[:2000]) if places else (None, None)
    kind = draw.choice(["wrong", "wrong", "wrong", "gone", "misspelt", "deep", "long", "other root", "twice"])
    if holder is None or kind == "other root":
        return "another value at the root", json.dumps(draw.choice(WRONG)).encode()
    said = f"{kind} at {key!r}"
    if kind == "gone":
        del holder[key]
    elif kind == "misspelt" and isinstance(holder, dict):
        holder[f"{key}\x1b]0;x"] = holder.pop(key)
    elif kind == "long":
        holder[key] = draw.choice([["x"] * 100_000, "x" * 100_000, {str(number): number for number in range(100_000)}])
    elif kind == "deep":
        holder[key] = "HERE"
        return said, json.dumps(value).encode().replace(b'"HERE"', b'{"a":' * DEPTH + b"1" + b"}" * DEPTH)
    elif kind == "twice":
        text = json.dumps(value)
        return said, (text[:-1] + "," + text[1:] if len(text) > 2 else text).encode()
    else:
        holder[key] = wrong = draw.choice(WRONG)
        said += f": {wrong!r}"
    return said, json.dumps(value).encode()


def walk(value: Any) -> Iterator[tuple[Any, Any]]:
    """(holder, key or index) of every value within `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from walk(inner)
