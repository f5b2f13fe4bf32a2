"""Atomic, rotated training checkpoints made of safetensors and JSON only.

A checkpoint is a folder `step-00001200` with `state.safetensors` (weights, averages, optimizer moments; whole tensors, so any number of
processes goes on from it), `state.json` (the step, what describes the run, the files' checksums) and what can be drawn with, a pipeline
folder `model` or an adapter. It is written under a `.partial` name, flushed to disk and renamed, so a folder without that suffix is
whole. Nothing older is removed before the new one is in place.
"""

import json
import math
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from latentfm.errors import InputError
from latentfm.files import whole_or_nothing
from latentfm.interchange.tensors import CHUNK, Tensors, read_file
from latentfm.training.ema import EMA
from latentfm.training.optimizers import optimizer_state, restore_optimizer_state
from latentfm.training.parallel import Gathering, Late
from latentfm.training.parts import Parts

NAME = re.compile(r"step-(\d{8})")


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Late],
    info: Mapping[str, Any],
    gathering: Gathering,
    keep: int = 2,
    also: Callable[[Path], None] = lambda path: None,
) -> Path:
    """Writes the checkpoint of `step` into `folder`, then removes what is neither among the newest `keep` nor the best.

    All processes call it; the main one writes. `also` puts further files into the checkpoint. The best is the one with the least
    info["validation_loss"] among those that have it. Raises InputError on the main process when the disk refuses it.
    """
    path = folder / f"step-{step:08d}"
    if not gathering.main:
        gathering.write(path, "state", tensors)
        also(path)
        return path
    with whole_or_nothing(path) as partial:
        with gathering.careful():
            partial.mkdir()
        gathering.write(partial, "state", tensors)
        also(partial)
        gathering.raise_error()
        files = {file.name: checksum(file) for file in state_files(partial)}
        (partial / "state.json").write_text(json.dumps({"step": step, **info, "files": files}, indent=1), "utf-8")
    there = checkpoints(folder)
    kept = {*there[-keep:], best(there)}
    unwanted = [old for old in there if old not in kept]
    for old in (*unwanted, *folder.glob("step-*.partial")):  # the latter of runs killed while saving
        shutil.rmtree(old)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if NAME.fullmatch(path.name) and (path / "state.json").exists())


def best(paths: list[Path]) -> Path | None:
    """The checkpoint with the least validation loss; None when none was validated."""
    losses = {}
    for path in paths:
        try:
            loss = json.loads((path / "state.json").read_text("utf-8")).get("validation_loss")
        except (OSError, ValueError):
            continue
        if loss is not None and math.isfinite(loss):
            losses[path] = loss
    return min(losses, key=losses.get) if losses else None


def load(path: Path, verify: bool = True) -> tuple[Tensors, dict[str, Any]]:
    """(tensors, each read from its file when it is asked for; info) of a checkpoint. Raises InputError when it is damaged.

    With verify=False the files are not read for their checksums: somebody has just done so.
    """
    try:
        info = json.loads((path / "state.json").read_text("utf-8"))
        files = {file.name: checksum(file) for file in state_files(path)} if verify else info["files"]
        if files != info["files"]:
            changed = sorted(name for name in files.keys() | info["files"].keys() if files.get(name) != info["files"].get(name))
            raise ValueError(f"{', '.join(changed)}: not what was written")
        tensors: Tensors = {}
        for file in state_files(path):
            tensors |= read_file(file)[0]
        return tensors, info
    except Exception as error:
        raise InputError(f"checkpoint {path} cannot be read ({error}); move it away to resume from the one before") from error


def newest_whole(folder: Path, tell: Callable[[str], None]) -> Path:
    """The newest checkpoint in `folder` that is whole; a damaged one is told and renamed. Raises InputError when there is none."""
    problem = None
    for path in reversed(checkpoints(folder)):
        try:
            load(path)
            return path
        except InputError as error:
            problem = error
            path.rename(path.with_name(f"{path.name}.damaged"))
            tell(f"{error}; it is now called {path.name}.damaged, going on from the one before")
    raise problem or InputError(f"{folder} holds no checkpoint")


def pack(parts: Parts, ema: EMA, optimizer: torch.optim.Optimizer) -> dict[str, Late]:
    """The tensors of a run, made whole when they are written: "model.*", "ema.*" and "optimizer.*"."""
    tensors = {f"model.{name}": parts.late(name, value) for name, value in parts.parameters.items()}
    tensors |= {f"ema.{name}": parts.late(name, value) for name, value in ema.shadow.items()}
    for key, value in optimizer_state(optimizer, parts.names).items():
        tensors[f"optimizer.{key}"] = parts.late(key.split("/", 1)[1], value)
    return tensors


@torch.no_grad()
def unpack(tensors: Tensors, parts: Parts, ema: EMA, optimizer: torch.optim.Optimizer) -> None:
    """Puts what `pack` gave back into the parameters, the averages and the optimizer, one tensor at a time. Raises InputError."""
    wanted = {f"{share}.{name}" for share in ("model", "ema") for name in parts.parameters}
    differing = wanted ^ {name for name in tensors if not name.startswith("optimizer.")}
    if differing:
        raise InputError(f"the checkpoint does not hold this run's trained parameters; differing: {', '.join(sorted(differing)[:5])}")
    for name, parameter in parts.parameters.items():
        parameter.copy_(parts.part(name, tensors[f"model.{name}"].load()))
        ema.shadow[name].copy_(parts.part(name, tensors[f"ema.{name}"].load()))
    state = {}
    for full, stored in tensors.items():
        if full.startswith("optimizer."):
            key = full.removeprefix("optimizer.")
            value, name = stored.load(), key.split("/", 1)[1]
            state[key] = parts.part(name, value) if name in parts.parameters and value.shape == parts.shape(name) else value
    restore_optimizer_state(optimizer, state, parts.names)


def state_files(path: Path) -> list[Path]:
    return sorted(path.glob("state*.safetensors"))


def checksum(file: Path) -> int:
    """CRC-32 of a file's bytes."""
    value = 0
    with file.open("rb") as opened:
        while block := opened.read(CHUNK):
            value = zlib.crc32(block, value)
    return value
