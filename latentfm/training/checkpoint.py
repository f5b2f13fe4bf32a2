"""Atomic, rotated training checkpoints made of safetensors and JSON only.

A checkpoint is a folder `step-00001200` with `state.safetensors` (weights, averages, optimizer moments) and
`state.json` (the step and what describes the run). It is written under a `.partial` name, flushed to disk and
renamed, so a folder without that suffix is whole. Nothing older is removed before the new one is in place.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latentfm.errors import InputError
from latentfm.files import whole_or_nothing
from latentfm.training.ema import EMA

NAME = re.compile(r"step-(\d{8})")


def save(folder: Path, step: int, tensors: dict[str, Tensor], info: dict[str, Any], keep: int = 2) -> Path:
    """Write the checkpoint of `step` into `folder`, then remove all but the newest `keep`, and what was left half-written."""
    path = folder / f"step-{step:08d}"
    with whole_or_nothing(path) as partial:
        partial.mkdir()
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, partial / "state.safetensors")
        (partial / "state.json").write_text(json.dumps({"step": step, **info}, indent=1), "utf-8")
    for old in (*checkpoints(folder)[:-keep], *folder.glob("step-*.partial")):  # the latter of runs killed while saving
        shutil.rmtree(old)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if NAME.fullmatch(path.name) and (path / "state.json").exists())


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns (tensors, info) of a checkpoint. Raises InputError when it is damaged."""
    try:
        info = json.loads((path / "state.json").read_text("utf-8"))
        return load_file(path / "state.safetensors"), info
    except Exception as error:
        raise InputError(f"checkpoint {path} cannot be read ({error}); move it away to resume from the one before") from error


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, Tensor]:
    """The optimizer's per-parameter state as {"<key>/<parameter name>": tensor}; `names` maps id(parameter) to its name."""
    return {
        f"{key}/{names[id(parameter)]}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], names: dict[int, str]) -> None:
    """Inverse of `optimizer_tensors`. Raises InputError when the parameters differ."""
    by_name = {name: identity for identity, name in names.items()}
    by_id = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    for full, value in tensors.items():
        key, name = full.split("/", 1)
        parameter = by_id.get(by_name.get(name, -1))
        if parameter is None:
            raise InputError(f"the checkpoint's optimizer has the parameter {name}, this run has not")
        optimizer.state[parameter][key] = value.to(parameter.device, copy=True)  # a fused optimizer counts on the device


def pack(module: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, Tensor]:
    """The tensors of a run: "model.*", "ema.*" and "optimizer.*"; `names` as for `optimizer_tensors`."""
    shares = {"model": module.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer_tensors(optimizer, names)}
    return {f"{share}.{name}": value for share, tensors in shares.items() for name, value in tensors.items()}


def unpack(tensors: dict[str, Tensor], module: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer, names: dict[int, str]) -> None:
    """Puts what `pack` gave back into the module, the averages and the optimizer."""

    def share(prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}

    module.load_state_dict(share("model."))
    ema.load_state_dict(share("ema."))
    restore_optimizer(optimizer, share("optimizer."), names)
