"""The log of a run, metrics.jsonl, as columns, and as curves of few points in which no spike is lost."""

import json
import math
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from latentfm.files import SpecialFile, open_file
from latentfm.training.records.json_lines import LONGEST, MOST_STEP, number

CURVES = (
    "loss", "prior_loss", "learning_rate", "gradient_norm", "images_per_second", "memory_gib",
    "pixels", "kl", "adaptive_weight", "discriminator",  # of an autoencoder
)  # fmt: skip
POINTS = 750  # of a curve; each shows the least and the most of its rows: 1,500 numbers
BLOCK = 2**23  # bytes of the log that are parsed at once


class Log:
    """The rows of a metrics.jsonl as columns; each `read` goes on where the last one ended."""

    def __init__(self, path: Path):
        self.path, self.file = path, None
        self.start()

    def start(self) -> None:
        self.offset, self.damaged = 0, 0
        self.blocks: list[dict[str, np.ndarray]] = []

    def read(self) -> dict[str, np.ndarray]:
        """The columns: step [N] int64 ascending, those of CURVES and seconds [N], loss_by_t and count_by_t [N, T], all float64.

        NaN stands where a row has nothing, and 1 in count_by_t, for the T intervals of t that a loss was given for without its count.
        Lines that are no rows are counted in `damaged`; a last line without an end is still being written and waits. Of several rows of
        one step the last one counts.
        """
        size, file = 0, None
        with suppress(OSError):
            size, file = (status := self.path.stat()).st_size, status.st_ino
        if size < self.offset or file != self.file:  # rows were taken away: what goes on after a checkpoint writes the file anew
            self.start()
            self.file = file
        if size > self.offset:
            with suppress(OSError, SpecialFile), open_file(self.path) as opened:  # what cannot be read now has no rows now
                opened.seek(self.offset)
                while block := opened.read(BLOCK):
                    block += opened.readline(LONGEST)
                    whole, end, _ = block.rpartition(b"\n")
                    self.offset += len(whole) + len(end)
                    if whole:
                        rows, damaged = parsed(whole.split(b"\n"))
                        self.damaged += damaged
                        self.blocks.append(columns_of([row for row in rows if "step" in row]))
        if len(self.blocks) > 1:
            intervals = max(block["loss_by_t"].shape[1] for block in self.blocks)
            self.blocks = [joined([widened(block, intervals) for block in self.blocks])]
        return self.blocks[0] if self.blocks else columns_of([])


def parsed(lines: Iterable[bytes]) -> tuple[list[dict], int]:
    """(the rows of JSON lines, how many lines were none); empty lines do not count."""
    lines = [line for line in lines if line.strip()]
    try:
        rows = json.loads(b"[" + b",".join(lines) + b"]")  # three quarters of the time of one by one
        if len(rows) == len(lines) and all(type(row) is dict for row in rows):
            return rows, 0
    except (ValueError, RecursionError):
        pass
    rows = []
    for line in lines:
        with suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    rows = [row for row in rows if type(row) is dict]
    return rows, len(lines) - len(rows)


def columns_of(rows: list[dict]) -> dict[str, np.ndarray]:
    """The columns of rows, see `Log.read`."""
    rows = [row for row in rows if (step := number(row["step"])) is not None and abs(step) <= MOST_STEP]
    found = {"step": np.array([int(row["step"]) for row in rows], dtype=np.int64)}
    for name in (*CURVES, "seconds"):
        found[name] = array([row.get(name) for row in rows])
    by_t = [values if isinstance(values := row.get("loss_by_t"), list) else [] for row in rows]
    counts = [values if isinstance(values := row.get("count_by_t"), list) else [] for row in rows]
    intervals = max(map(len, by_t), default=0)
    for name, lists, absent in (("loss_by_t", by_t, None), ("count_by_t", counts, 1)):
        flat = [value for values in lists for value in (values + [absent] * (intervals - len(values)))[:intervals]]
        found[name] = array(flat).reshape(len(rows), intervals)
    return in_order(found)


def array(values: list) -> np.ndarray:
    """The numbers as float64; NaN for what is none."""
    try:
        return np.array(values, dtype=np.float64)  # None becomes NaN
    except (TypeError, ValueError, OverflowError):
        return np.array([number(value) for value in values], dtype=np.float64)


def in_order(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The columns with ascending steps, each step's last row."""
    step = columns["step"]
    if (step[1:] > step[:-1]).all():
        return columns
    _, last = np.unique(step[::-1], return_index=True)
    return {name: column[len(step) - 1 - last] for name, column in columns.items()}


def widened(columns: dict[str, np.ndarray], intervals: int) -> dict[str, np.ndarray]:
    """The columns with so many intervals of t."""
    more = ((0, 0), (0, intervals - columns["loss_by_t"].shape[1]))
    return columns | {name: np.pad(columns[name], more, constant_values=np.nan) for name in ("loss_by_t", "count_by_t")}


def joined(blocks: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The columns of one block after the other."""
    return in_order({name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]})


def curves(columns: dict[str, np.ndarray]) -> dict[str, Any]:
    """The curves in at most POINTS points: "step" of each point's last row, and {"mean", "low", "high"} of its rows for each of CURVES.

    "by_t" has the mean over samples for each interval of t, and how many they were. A curve without a number is left out.
    """
    rows = len(columns["step"])
    if not rows:
        return {"step": []}
    starts = np.unique(np.linspace(0, rows, min(rows, POINTS), endpoint=False).astype(int))
    ends = np.append(starts[1:], rows) - 1
    found: dict[str, Any] = {"step": columns["step"][ends].tolist()}
    for name in CURVES:
        values = np.where(np.isfinite(columns[name]), columns[name], np.nan)
        there = np.isfinite(values)
        if there.any():
            low, high = np.fmin.reduceat(values, starts), np.fmax.reduceat(values, starts)
            mean = mean_of(np.where(there, values, 0.0), there, starts)
            found[name] = {"mean": listed(mean), "low": listed(low), "high": listed(high)}
    losses, counts = columns["loss_by_t"], columns["count_by_t"]
    there = np.isfinite(losses) & (counts > 0)
    if there.any():
        weight = np.where(there, counts, 0.0)
        means = mean_of(np.where(there, losses, 0.0) * weight, weight, starts)
        found["by_t"] = {
            "mean": [listed(column) for column in means.T],
            "count": [listed(column) for column in np.add.reduceat(weight, starts).T],
        }
    return found


def mean_of(sums: np.ndarray, weights: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The weighted means over the stretches that begin at `starts`; NaN without weight."""
    weights = np.add.reduceat(weights.astype(np.float64), starts)
    return np.add.reduceat(sums, starts) / np.where(weights > 0, weights, np.nan)


def listed(values: np.ndarray) -> list[float | None]:
    """The values in five digits, None for what is no finite number."""
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values.tolist()]
