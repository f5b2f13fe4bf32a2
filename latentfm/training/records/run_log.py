"""What a run writes down about itself: its options, a row a step, validations, events, and the page that shows them."""

import json
import resource
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from latentfm.errors import InputError
from latentfm.files import flush, read_json, whole_or_nothing
from latentfm.training.checkpoint.claim import Claim, FolderInUse
from latentfm.training.records.json_lines import add_whole, keep_rows, number, read_or_set_aside, rows_of, set_aside
from latentfm.training.records.run_page import RunPage
from latentfm.words import shown

SECONDS_BETWEEN_PAGES = 60.0


class RunLog:
    """The files of a run's folder that tell its course; only the main process writes.

    config.json, run.json and held_out.json say what it is, metrics.jsonl has a row an optimizer step, validation.jsonl one a validation,
    events.jsonl what happened besides; run.html shows all of it. None of them is needed to go on: what cannot be read of them is set
    aside, and said.
    """

    def __init__(self, folder: Path, main: bool):
        self.folder, self.main = folder, main
        self.claim = Claim(folder)
        self.began, self.before = time.monotonic(), 0.0
        self.run_page, self.page_written = RunPage(folder), 0.0
        self.described: dict[str, dict[str, Any]] = {}
        self.waiting: dict[str, str] = {}  # rows that the disk did not take yet, by file

    def open(self, step: int, config: dict[str, Any], facts: dict[str, Any], held_out: list[str]) -> None:
        """Begins, or goes on after `step`: rows of later steps are dropped, they will be written again; what happened stays."""
        if not self.main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        last = keep_rows(self.folder / "metrics.jsonl", say, step or -1)  # one that begins has no row of step 0 either: it may be another's
        keep_rows(self.folder / "validation.jsonl", say, step or -1)
        keep_rows(self.folder / "events.jsonl", say)
        self.before = number(last[0].get("seconds")) or 0.0 if last else 0.0
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        before = read_or_set_aside(self.folder / "run.json", read_json, say, {}).get("started")
        if step and isinstance(before, str):
            started = before
        self.described = {"config.json": config, "run.json": {"started": started, **facts}}
        self.described |= {"held_out.json": {"pictures": held_out}} if held_out else {}
        self.describe()

    def describe(self) -> None:
        """Writes config.json, run.json and, where pictures are held out, held_out.json."""
        for name, value in self.described.items():
            path = self.folder / name
            if path.is_dir():
                set_aside(path, say, f"{path} is a folder")
            with whole_or_nothing(path) as partial:
                partial.write_text(json.dumps(value, indent=2) + "\n", "utf-8")

    def metrics(self, row: dict[str, Any]) -> None:
        """Appends the row of a step, with the time since the start of the run (stops left out) and the peak of the memory."""
        self.append("metrics.jsonl", row | {"seconds": round(self.seconds(), 3), "memory_gib": round(peak_memory() / 2**30, 4)})

    def validation(self, row: dict[str, Any]) -> None:
        self.append("validation.jsonl", row)

    def validated(self, step: int) -> dict[str, Any] | None:
        """The validation of `step`, if it was made and can be read."""
        made = [row for row in rows_of(self.folder / "validation.jsonl") if row["step"] == step]
        return next((row for row in reversed(made) if number(row.get("validation_loss")) is not None), None)

    def event(self, step: int, what: str) -> None:
        self.append("events.jsonl", {"step": step, "time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "what": what})

    def append(self, name: str, row: dict[str, Any]) -> None:
        """Adds a row to a file. When the disk refuses it, that is told and it is written with the next: the training matters more.

        Raises FolderInUse when another run has come to write to the folder, after this one's claim on it was removed.
        """
        if not self.main:
            return
        told = bool(self.waiting)
        self.waiting[name] = self.waiting.get(name, "") + json.dumps(row) + "\n"
        try:
            if self.described and not self.folder.is_dir():
                say(f"warning: {shown(self.folder)} is gone; it is made again, without what was in it, and the training goes on")
                self.claim.renew()
                self.describe()
            self.claim.renew()
            for name in list(self.waiting):
                add_whole(self.folder / name, self.waiting[name].encode())
                del self.waiting[name]
        except FolderInUse:
            raise
        except (OSError, InputError) as error:
            if not told:
                reason = getattr(error, "strerror", None) or error
                say(f"warning: could not write {shown(self.folder / name)}: {reason}. The training goes on, the rows wait for room")

    def flush(self) -> None:
        """Forces the rows to disk: a checkpoint that outlives a power cut should not lack the rows before it."""
        if self.main and (self.folder / "metrics.jsonl").is_file():
            try:
                flush(self.folder / "metrics.jsonl")
            except OSError as error:
                say(f"warning: the rows of {shown(self.folder)} may not be on the disk yet: {error.strerror}. The training goes on")

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.began

    def page(self, now: bool = False) -> None:
        """Writes run.html, if the last is a minute old, or now. What keeps it from being written is told: the training matters more."""
        if self.main and self.folder.is_dir() and (now or time.monotonic() - self.page_written > SECONDS_BETWEEN_PAGES):
            self.page_written = time.monotonic()
            try:
                self.run_page.write()
            except Exception as error:  # of whatever stands in the run's files; there is no wrong page, only none
                say(f"warning: no run page: {shown(error, 300)}" if not isinstance(error, InputError) else f"warning: {error}")


def say(line: str) -> None:
    print(line, flush=True)


def peak_memory() -> int:
    """The most bytes that tensors took on the GPU so far; without one, that this process took."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
