"""Atomic, rotated training checkpoints made of safetensors and JSON only.

A checkpoint is a folder `step-00001200` with `state.safetensors` (weights, averages, optimizer moments; whole tensors, so any number of
processes goes on from it), `state.json` (the step, what describes the run, the files' checksums and its own) and what can be drawn with, a
pipeline folder `model` or an adapter. It is written under a `.partial` name, flushed to disk and renamed, so a folder without that suffix
is whole. Nothing older is removed before the new one is in place.
"""

import json
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from latentfm.errors import InputError
from latentfm.files import CONTENT_ERRORS, JSON_BYTES, open_file, read_bytes, reason, whole_or_nothing
from latentfm.interchange.tensors import CHUNK, Tensors, read_file
from latentfm.training.distributed.processes import Gathering, Late
from latentfm.training.distributed.shards import Parts
from latentfm.training.optimizers.ema import EMA
from latentfm.training.optimizers.registry import optimizer_state, restore_optimizer_state
from latentfm.training.records.json_lines import number
from latentfm.words import listed, shown

NAME = re.compile(r"step-(\d{8})")
CHECKSUM = "checksum"  # in state.json: of all else that it says


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
        state = json.loads(json.dumps({"step": step, **info, "files": files}))
        (partial / "state.json").write_text(json.dumps({**state, CHECKSUM: of_state(state)}, indent=1), "utf-8")
    remove_older(folder, keep)
    return path


def remove_older(folder: Path, keep: int) -> None:
    """Removes the checkpoints that are neither among the newest `keep` nor the best; one that cannot be removed is told."""
    there = checkpoints(folder)
    kept = {*there[-keep:], best(there)}
    unwanted = [old for old in there if old not in kept]
    for old in (*unwanted, *folder.glob("step-*.partial")):  # the latter of runs killed while saving
        try:
            shutil.rmtree(old)
        except OSError as error:
            print(f"warning: the older {shown(old)} could not be removed: {error.strerror}; what was saved since is whole", flush=True)


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
            loss = number(state_of(path).get("validation_loss"))
        except InputError:
            continue
        if loss is not None:
            losses[path] = loss
    return min(losses, key=losses.get) if losses else None


class Damaged(InputError):
    """What is in a checkpoint is not what was written."""


def load(path: Path, verify: bool = True) -> tuple[Tensors, dict[str, Any]]:
    """(tensors, each read from its file when it is asked for; info) of a checkpoint.

    Raises Damaged when its content is not what was written, InputError when it cannot be read now, which says nothing of its content.
    With verify=False the files are not read for their checksums: somebody has just done so.
    """
    info = state_of(path)
    try:
        files = {file.name: checksum(file) for file in state_files(path)} if verify else info["files"]
        if files != info["files"]:
            changed = sorted(name for name in files.keys() | info["files"].keys() if files.get(name) != info["files"].get(name))
            raise ValueError(f"{', '.join(changed)}: not what was written")
        tensors: Tensors = {}
        for file in state_files(path):
            tensors |= read_file(file)[0]
        return tensors, info
    except (*CONTENT_ERRORS, SafetensorError) as error:
        raise problem_of(path, error) from error


def state_of(path: Path) -> dict[str, Any]:
    """What a checkpoint's state.json says, checked against its own checksum. Raises as `load`."""
    try:
        info = json.loads(read_bytes(path / "state.json", JSON_BYTES).decode("utf-8"))
        told = info.pop(CHECKSUM, None) if isinstance(info, dict) else None
        whole = isinstance(info, dict) and (told == of_state(info) or (told is None and is_old(info)))
        if not whole or not isinstance(info.get("files"), dict):
            raise ValueError("state.json: not what was written")
        return info
    except (*CONTENT_ERRORS, InputError) as error:
        raise problem_of(path, error) from error


def is_old(info: Mapping[str, Any]) -> bool:
    """Whether a state.json without a checksum is whole as far as can be seen: one of the versions that wrote none."""
    kinds = {"step": int, "config": dict, "inputs": dict, "data": dict, "files": dict}
    return info.keys() - {"validation_loss"} == kinds.keys() and all(isinstance(info[name], kind) for name, kind in kinds.items())


def problem_of(path: Path, error: Exception) -> InputError:
    """What an error says of a checkpoint: that it is damaged, or that it could not be read this time."""
    cause = error.__cause__ if isinstance(error, InputError) else error
    if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return InputError(f"checkpoint {shown(path)} cannot be read now: {reason(error)}. Nothing was renamed; try again, or move it away")
    return Damaged(f"checkpoint {shown(path)} cannot be read ({reason(error)}); move it away to resume from the one before")


def of_state(info: Mapping[str, Any]) -> int:
    """CRC-32 of what state.json says, however it is laid out."""
    return zlib.crc32(json.dumps(info, sort_keys=True, separators=(",", ":")).encode())


def newest_whole(folder: Path, tell: Callable[[str], None]) -> Path:
    """The newest checkpoint in `folder` that is whole; a damaged one is told and renamed.

    Raises InputError when there is none, or when the newest cannot be read now.
    """
    problem = None
    for path in reversed(checkpoints(folder)):
        try:
            load(path)
            return path
        except Damaged as error:
            problem = error
            aside, number = path.with_name(f"{path.name}.damaged"), 1
            while aside.exists():
                number += 1
                aside = path.with_name(f"{path.name}.damaged-{number}")
            path.rename(aside)
            tell(f"{error}; it is now called {aside.name}, going on from the one before")
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
    shapes = [name for name in parts.parameters if any(tensors[f"{share}.{name}"].shape != parts.shape(name) for share in ("model", "ema"))]
    if shapes:
        raise InputError(f"the checkpoint's parameters are of other shapes than this run's: {listed(sorted(shapes))}")
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
    with open_file(file) as opened:
        while block := opened.read(CHUNK):
            value = zlib.crc32(block, value)
    return value
