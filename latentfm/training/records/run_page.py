"""The page of a run: OUTPUT/run.html, one file that opens by a double click and needs neither a server nor a network.

It is made of what the run writes: metrics.jsonl and validation.jsonl (a row a step), events.jsonl, config.json, run.json and samples/. Any
of them may be absent, and a row may lack what an older version did not write. The look is in run_page.html, which latentfm.web frames too,
without a run in it, and tells what is new.
"""

import base64
import html
import io
import json
import math
import os
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from latentfm.config import OPTIONS, default_of
from latentfm.errors import InputError
from latentfm.files import TEXT_BYTES, read_bytes, read_json, whole_or_nothing
from latentfm.training.records.curves import POINTS, Log, curves, parsed
from latentfm.training.records.json_lines import MOST_STEP, number
from latentfm.training.records.sample_files import COLUMNS, cells_of, has_cells, opened, settings_of, step_of, steps, thinned
from latentfm.training.vae.options import VAE_OPTIONS
from latentfm.words import count, shortened, shown

LARGEST = 4 * 10**6  # bytes of pictures in the page
WHOLE_GRIDS = 8  # pictures of steps whose small pictures are not there: each is read and made smaller anew
EVENTS = 200  # shown, the latest
LONGEST_EVENT = 2000  # characters
RECORDS = ("config.json", "run.json", "metrics.jsonl", "validation.jsonl", "events.jsonl")
UNMARKED = ("started", "saved", "finished")  # how events begin that every run has
ENDINGS = {"stopped": "stopped", "ended": "failed"}  # how events begin after which a run does not go on by itself, and what it is then


class RunPage:
    """The page of the run in `folder`; it reads the log on from where it stopped, and of the rest what has changed since."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.metrics = Log(folder / "metrics.jsonl")
        self.kept: dict[str, tuple[list[Any], Any]] = {}

    def write(self) -> Path:
        """The path of folder/run.html, written anew, whole or not at all. Raises InputError when the disk does not take it."""
        target = self.folder / "run.html"
        data = json.dumps(self.data(), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        for letter in "<>&\u2028\u2029":  # nothing in the data can end the script that holds it
            data = data.replace(letter, f"\\u{ord(letter):04x}")
        text = page(self.name(), data).encode("utf-8", "backslashreplace")  # a half of a character is no reason for no page
        with whole_or_nothing(target) as partial:
            partial.write_bytes(text)
        return target

    def name(self) -> str:
        return self.folder.resolve().name

    def data(self, running: bool | None = None) -> dict[str, Any]:
        """What the page shows, as run_page.html reads it, with nothing in it that JSON has no word for.

        The same object as long as no file changes, and so are its "pictures". `running`: whether a process is at it, None where that is
        not known; its last event tells then.
        """
        read = [self.folder / name for name in (*RECORDS, "model", "samples", "samples/cells")]
        return self.once("data", lambda *_: self.read(running), *read, also=running)

    def read(self, running: bool | None) -> dict[str, Any]:
        """See `data`."""
        config, facts = (self.once(name, load_json, self.folder / name) for name in ("config.json", "run.json"))
        events, damaged_events = self.once("events", load_rows, self.folder / "events.jsonl")
        held_out, damaged_held_out = self.once("validation", load_rows, self.folder / "validation.jsonl")
        columns, drawn = self.once("metrics", self.read_metrics, self.metrics.path)
        events = [row for row in events if "what" in row]
        damaged = {"metrics.jsonl": self.metrics.damaged, "events.jsonl": damaged_events, "validation.jsonl": damaged_held_out}
        state = state_of(columns, config, (self.folder / "model").exists(), str(events[-1]["what"]) if events else "", running)
        samples = self.folder / "samples"
        found = {
            "name": self.name(),
            "written": time.time(),
            "state": state,
            "epochs": facts["epochs"] * state["step"] / state["steps"] if number(facts.get("epochs")) and state["steps"] else None,
            "facts": {name: value for name, value in facts.items() if name != "chosen"},
            "curves": drawn,
            "validation": validation(held_out),
            "options": options(config, facts),
            "events": [event_of(row) for row in events[-EVENTS:]],
            "notes": [
                f"{count(lines, 'row')} of {name} {'is' if lines == 1 else 'are'} damaged and not shown"
                for name, lines in damaged.items() if lines
            ],
        }  # fmt: skip
        return clean(found) | {"pictures": self.once("pictures", lambda folder, _: clean(pictures_of(folder)), samples, samples / "cells")}

    def read_metrics(self, path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The log's columns and curves."""
        columns = self.metrics.read()
        return columns, curves(columns)

    def once(self, what: str, read: Callable[..., Any], *paths: Path, also: Any = None) -> Any:
        """What `read` made of files or folders, unless one of them has changed since, or `also` has."""
        now = [also, *map(stamp, paths)]  # before reading: what changes meanwhile is read again
        if what not in self.kept or self.kept[what][0] != now:
            self.kept[what] = now, read(*paths)
        return self.kept[what][1]

    def stamps(self, what: str) -> list[Any]:
        """What the last reading of `once` was of: equal as long as it is the same."""
        return self.kept[what][0]


def stamp(path: Path) -> tuple[int, ...] | None:
    """What changes with a file, or with the names in a folder; None where there is nothing."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def page(name: str, data: str) -> str:
    """The HTML of a run's page with JSON in it; where that is null, a page to be framed, which shows what it is sent."""
    before, after = files("latentfm.training.records").joinpath("run_page.html").read_text("utf-8").split("{{data}}")
    return before.replace("{{title}}", html.escape(f"{shown(name)} - latentfm")) + data + after


def validation(rows: list[dict]) -> dict[str, Any]:
    """The validation's curves: "step", "loss", "stderr", "by_t", a list for each t."""
    by_step = {step: row for row in rows if (step := number(row.get("step"))) is not None and abs(step) <= MOST_STEP}
    rows = thinned([by_step[step] for step in sorted(by_step)], 2 * POINTS)
    by_t = [values if isinstance(values := row.get("by_t"), dict) else {} for row in rows]
    times = sorted({t for values in by_t for t in values if number(as_float(t)) is not None}, key=float)
    return {
        "step": [int(row["step"]) for row in rows],
        "loss": [number(row.get("validation_loss")) for row in rows],
        "stderr": [number(row.get("stderr")) for row in rows],
        **({"psnr": [number(row.get("psnr")) for row in rows]} if any("psnr" in row for row in rows) else {}),  # of an autoencoder
        "by_t": {t: [number(values.get(t)) for values in by_t] for t in times},
    }


def as_float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def state_of(columns: dict[str, np.ndarray], config: dict, exported: bool, latest: str, running: bool | None = None) -> dict[str, Any]:
    """How far the run is: step of steps, seconds of training so far, a step and left, whether it is finished or has stopped, and a word.

    `exported` says whether the trained model is there, `latest` what happened last, and `running` whether a process is at it, if known.
    """
    train = config.get("train") if isinstance(config.get("train"), dict) else {}
    total, batch = number(train.get("steps")), number(train.get("batch_size"))
    rows = len(columns["step"])
    step = int(columns["step"][-1]) if rows else 0
    pace, seconds = None, None
    timed = np.flatnonzero(np.isfinite(columns["seconds"]))
    if len(timed):
        seconds = float(columns["seconds"][timed[-1]])
        recent = timed[-min(len(timed), 200)]
        if timed[-1] > recent:
            pace = (seconds - columns["seconds"][recent]) / (columns["step"][timed[-1]] - columns["step"][recent])
    elif rows and batch and columns["images_per_second"][-1] > 0:
        pace = batch / columns["images_per_second"][-1]
    pace = float(pace) if pace is not None and pace > 0 else None
    finished = exported and total is not None and step >= total and not running
    ended = next((word for opening, word in ENDINGS.items() if latest.startswith(opening)), None)
    if running is not None:  # what was told last is of an earlier process, or the process went without a word
        ended = None if running else ended or ("died" if latest else "not begun")
    return {
        "step": step, "steps": total, "rows": rows, "batch_size": batch, "seconds": seconds, "seconds_a_step": pace,
        "left": pace * max(0, total - step) if pace and total else None,
        "finished": finished, "stopped": ended is not None,
        "word": "finished" if finished else ended or ("training" if step else "starting"),
    }  # fmt: skip


def pictures_of(folder: Path) -> dict[str, Any]:
    """The pictures drawn while training as the latest were, of as many steps as LARGEST allows, the first and the last among them."""
    there = steps(folder)
    none = {"steps": [], "prompts": [], "tile": [1, 1], "total": 0, "hidden": 0, "progress": False}
    if not there:
        return none
    settings = {path: settings_of(path) for path in there}
    newest = next((path for path in reversed(there) if settings[path] is not None and has_cells(path)), None)
    if newest is None:
        return none | whole_grids(there)
    same = [path for path in there if alike(settings[path], settings[newest]) and cells_of(path).is_file()]
    prompts = settings[newest]["prompts"]
    most = 32
    shown = [path for path in thinned(same, most) if has_cells(path)] or [newest]
    while len(shown) > 1 and sum(cells_of(path).stat().st_size for path in shown) * 4 / 3 > LARGEST:
        most //= 2
        shown = thinned(shown, most) if most > 1 else shown[-1:]
    sheet = opened(cells_of(shown[-1]))
    tile = [sheet.width // min(COLUMNS, len(prompts)), sheet.height]
    return {
        "steps": [{"step": step_of(path), "src": source("webp", cells_of(path).read_bytes())} for path in shown],
        "prompts": prompts[:COLUMNS], "tile": tile, "total": len(same), "hidden": max(0, len(prompts) - COLUMNS),
        "progress": (folder / "progress.png").is_file(),
    }  # fmt: skip


def whole_grids(there: list[Path]) -> dict[str, Any]:
    """The pictures of steps, each grid made smaller as one: what there is of runs that kept no small pictures."""
    found, tile = [], [1, 1]
    for path in thinned(there, WHOLE_GRIDS):
        try:
            image = opened(path)
        except InputError:
            continue
        image.thumbnail((800, 800))
        tile, encoded = list(image.size), io.BytesIO()
        image.save(encoded, format="JPEG", quality=80)
        found.append({"step": step_of(path), "src": source("jpeg", encoded.getvalue())})
    return {"steps": found, "prompts": ["all prompts"] if found else [], "tile": tile, "total": len(there)}


def alike(settings: dict | None, others: dict | None) -> bool:
    """Whether two pictures were drawn alike, but for the step."""
    return settings is not None and others is not None and settings | {"training_step": 0} == others | {"training_step": 0}


def source(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def options(config: dict, facts: dict) -> list[dict[str, Any]]:
    """Each option of a configuration: its name, value, default, meaning, and whether what was given is another value than the default."""
    known = VAE_OPTIONS if "loss" in config else OPTIONS
    found, chosen = [], facts.get("chosen")
    chosen = chosen if isinstance(chosen, dict) else {}
    for section, values in config.items():
        for key, value in values.items() if isinstance(values, dict) else ():
            option = known.get(name := f"{section}.{key}")
            default = "" if option is None or option.is_required() else written(default_of(name, known))
            meaning = "an option of another version" if option is None else option.description
            given = written(chosen.get(name, value))
            value = written(value) + f" ({given})" * (name in chosen)
            found.append(
                {"name": name, "value": value, "default": default, "changed": given != default}
                | ({"meaning": meaning} if meaning else {})
            )
    return found


def written(value: Any) -> str:
    """An option's value as it would be written in a configuration."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=lambda other: other.model_dump(mode="json"))


def event_of(row: dict) -> dict[str, Any]:
    """An event as the page shows it; `marked` are those with a line in the curves."""
    what = shortened(str(row["what"]), LONGEST_EVENT)
    timestamp = number(row.get("time"))
    when = timestamp if timestamp is not None else None if row.get("time") is None else str(row["time"])
    return {"step": number(row.get("step")), "time": when, "what": what, "marked": not what.startswith(UNMARKED)}


def load_json(path: Path) -> dict:
    """The object in a JSON file; an empty one where there is none."""
    try:
        return clean(read_json(path))
    except (InputError, RecursionError):
        return {}


def load_rows(path: Path) -> tuple[list[dict], int]:
    """(the rows of a JSON-lines file, how many were damaged); none where there is no file."""
    try:
        return parsed(read_bytes(path, TEXT_BYTES).split(b"\n"))
    except (OSError, InputError):
        return [], 0


def clean(value: Any) -> Any:
    """`value` without the numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {str(key): clean(part) for key, part in value.items()}
    if isinstance(value, list):
        return [clean(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
