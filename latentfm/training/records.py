"""What a run writes down about itself: its options, a row a step, validations, events, and the page that shows them."""

import errno
import fcntl
import json
import os
import platform
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from latentfm.config import RunConfig
from latentfm.errors import InputError
from latentfm.files import flush, whole_or_nothing
from latentfm.training.run_page import RunPage

# options that may change when a run is resumed: they do not touch the course of the training
FREE_ON_RESUME = {
    "output", "sample", "validation.every", "validation.times", "data.workers", "data.cache", "data.verify", "train.compile",
    "train.gradient_checkpointing", "train.gradient_accumulation", "train.attention", "train.ema_device", "train.deterministic",
}  # fmt: skip
SECONDS_BETWEEN_PAGES = 60.0


class Records:
    """The files of a run's folder that tell its course; only the main process writes.

    config.json, run.json and held_out.json say what it is, metrics.jsonl has a row an optimizer step, validation.jsonl one a validation,
    events.jsonl what happened besides; run.html shows all of it.
    """

    def __init__(self, folder: Path, main: bool):
        self.folder, self.main = folder, main
        self.began, self.before = time.monotonic(), 0.0
        self.run_page, self.page_written = RunPage(folder), 0.0
        self.described: dict[str, dict[str, Any]] = {}
        self.waiting: dict[str, str] = {}  # rows that the disk did not take yet, by file

    def open(self, step: int, config: dict[str, Any], facts: dict[str, Any], held_out: list[str]) -> None:
        """Begins, or goes on after `step`: rows of later steps are dropped, they will be written again; what happened stays."""
        if not self.main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "validation.jsonl"):
            keep_rows(self.folder / name, step or -1)  # one that begins has no row of step 0 either: it may be another run's
        keep_rows(self.folder / "events.jsonl")
        rows = rows_of(self.folder / "metrics.jsonl")
        self.before = rows[-1].get("seconds", 0.0) if rows else 0.0
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        if step and (self.folder / "run.json").exists():
            started = json.loads((self.folder / "run.json").read_text("utf-8")).get("started", started)
        self.described = {"config.json": config, "run.json": {"started": started, **facts}}
        self.described |= {"held_out.json": {"pictures": held_out}} if held_out else {}
        self.describe()

    def describe(self) -> None:
        """Writes config.json, run.json and, where pictures are held out, held_out.json."""
        for name, value in self.described.items():
            with whole_or_nothing(self.folder / name) as partial:
                partial.write_text(json.dumps(value, indent=2) + "\n", "utf-8")

    def metrics(self, row: dict[str, Any]) -> None:
        """Appends the row of a step, with the time since the start of the run (stops left out) and the peak of the memory."""
        self.append("metrics.jsonl", row | {"seconds": round(self.seconds(), 3), "memory_gib": round(peak_memory() / 2**30, 4)})

    def validation(self, row: dict[str, Any]) -> None:
        self.append("validation.jsonl", row)

    def validated(self, step: int) -> dict[str, Any] | None:
        """The validation of `step`, if it was made."""
        return next((row for row in rows_of(self.folder / "validation.jsonl") if row["step"] == step), None)

    def event(self, step: int, what: str) -> None:
        self.append("events.jsonl", {"step": step, "time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "what": what})

    def append(self, name: str, row: dict[str, Any]) -> None:
        """Adds a row to a file. When the disk refuses it, that is told and it is written with the next: the training matters more."""
        if not self.main:
            return
        told = bool(self.waiting)
        self.waiting[name] = self.waiting.get(name, "") + json.dumps(row) + "\n"
        try:
            if self.described and not self.folder.is_dir():
                print(f"warning: {self.folder} is gone; it is made again, without what was in it, and the training goes on", flush=True)
                self.describe()
            for name in list(self.waiting):
                add_whole(self.folder / name, self.waiting[name].encode())
                del self.waiting[name]
        except (OSError, InputError) as error:
            if not told:
                reason = getattr(error, "strerror", None) or error
                print(f"warning: could not write {self.folder / name}: {reason}. The training goes on, the rows wait for room", flush=True)

    def flush(self) -> None:
        """Forces the rows to disk: a checkpoint that outlives a power cut should not lack the rows before it."""
        if self.main and (self.folder / "metrics.jsonl").exists():
            flush(self.folder / "metrics.jsonl")

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.began

    def page(self, now: bool = False) -> None:
        """Writes run.html, if the last is a minute old, or now. A disk that does not take it is told: the training matters more."""
        if self.main and self.folder.is_dir() and (now or time.monotonic() - self.page_written > SECONDS_BETWEEN_PAGES):
            self.page_written = time.monotonic()
            try:
                self.run_page.write()
            except InputError as error:
                print(f"warning: {error}", flush=True)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a file of JSON lines; one cut short by a kill or a full disk is none."""
    rows = []
    for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else ():
        with suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and "step" in row]


def add_whole(path: Path, text: bytes) -> None:
    """Adds `text` to a file, which is made where there is none, all of it or nothing. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if file.write(text) < len(text):  # a disk that is nearly full takes a part
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def keep_rows(path: Path, step: float = float("inf")) -> None:
    """Drops the rows of a file of JSON lines after `step`, and what is no row."""
    if path.exists():
        kept = [row for row in rows_of(path) if row["step"] <= step]
        with whole_or_nothing(path) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """A context in which no other run, on whatever machine, writes to `folder`. Raises InputError when one does.

    The claim is a lock on the file running.lock that ends with the process, however that ends. Where the file system knows no locks
    there is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "running.lock"
    with path.open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, loader processes do not inherit it
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                file.seek(0)
                raise InputError(
                    f"a run is writing to {folder} ({file.read().strip()}); wait for its end or stop it, or choose another output.folder"
                ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def peak_memory() -> int:
    """The most bytes that tensors took on the GPU so far; without one, that this process took."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What of the options that matter differs, as "section.key was X, is Y"; an option that did not exist had its default."""
    found = []
    for section, options in now.items():
        defaults = RunConfig.model_fields[section].annotation.model_fields
        for key, value in options.items():
            was = before.get(section, {}).get(key, defaults[key].get_default(call_default_factory=True))
            if section not in FREE_ON_RESUME and f"{section}.{key}" not in FREE_ON_RESUME and was != value:
                found.append(f"{section}.{key} was {was!r}, is {value!r}")
    return found
