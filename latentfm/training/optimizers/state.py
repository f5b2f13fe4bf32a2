"""What an optimizer has learnt, as tensors by name for a checkpoint."""

from typing import Any

import torch
from torch import Tensor, nn

from latentfm.errors import InputError

TABLES = {"qmap1": "dynamic", "qmap2": "udynamic"}  # bitsandbytes' quantisation tables: the same for all, in no checkpoint
GROUP = "group."  # begins the names of what an optimizer knows of a whole group of parameters


def optimizer_state(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, Tensor]:
    """What the optimizer has learnt, as {"<key>/<parameter name>": tensor} and {"group.<index>/<key>": tensor}.

    `names` maps id(parameter) to its name. Numbers become scalars of float64 or int64, which hold them exactly; tensors are the
    optimizer's own. A group's numbers (prodigy's estimate of the rate) are among them, but lr, which belongs to the schedule.
    """
    state = {
        f"{key}/{names[id(parameter)]}": scalar(value)
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
        if key not in TABLES
    }
    for index, group in enumerate(optimizer.param_groups):
        learnt = {key: value for key, value in group.items() if key != "lr" and is_number(value)}
        state |= {f"{GROUP}{index}/{key}": scalar(value) for key, value in learnt.items()}
    return state


def restore_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Tensor], names: dict[int, str]) -> None:
    """Inverse of `optimizer_state`. Raises InputError when the parameters or their groups are others."""
    by_name = {name: identity for identity, name in names.items()}
    fused = {id(p): bool(group.get("fused")) for group in optimizer.param_groups for p in group["params"]}
    by_id = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    for full, value in state.items():
        key, name = full.split("/", 1)
        if key.startswith(GROUP):
            index = int(key.removeprefix(GROUP))
            if index >= len(optimizer.param_groups):
                raise InputError(f"the checkpoint's optimizer has {index + 1} groups of parameters, this run {len(optimizer.param_groups)}")
            optimizer.param_groups[index][name] = unscalar(value)
            continue
        parameter = by_id.get(by_name.get(name, -1))
        if parameter is None:
            raise InputError(f"the checkpoint's optimizer has the parameter {name}, this run has not")
        there = optimizer.state[parameter].get(key)
        if isinstance(there, Tensor) and there.shape == value.shape:  # a master
            there.copy_(value)
        else:
            optimizer.state[parameter][key] = placed(optimizer, parameter, key, value, fused[id(parameter)])
    for parameter, values in optimizer.state.items():
        if getattr(values.get("state1"), "dtype", None) == torch.uint8:
            values |= {key: optimizer.name2qmap[table].to(parameter.device) for key, table in TABLES.items()}


def placed(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, key: str, value: Tensor, fused: bool) -> Any:
    """A copy of a parameter's `value` as the optimizer wants it: a number, or a tensor beside the parameter, paged where it was."""
    if is_number(number := unscalar(value)):
        return number
    if key in ("state1", "state2") and getattr(optimizer, "is_paged", False):
        return optimizer.get_state_buffer(parameter, dtype=value.dtype).copy_(value)
    if key == "step" and not fused:  # torch counts on the CPU, but for a fused optimizer
        return value.to("cpu", copy=True)
    if value.shape == parameter.shape:  # in its memory's order too, which a fused optimizer takes for the same
        return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    return value.to(parameter.device, copy=True)


def is_number(value: Any) -> bool:
    """Whether `value` is a number, as an optimizer counts or learns, and no switch."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def scalar(value: Any) -> Tensor:
    """A tensor as it is; a number as a tensor that holds it exactly."""
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)


def unscalar(value: Tensor) -> Any:
    """Inverse of `scalar`; optimizers keep no scalar tensors of its two dtypes."""
    return value.item() if value.ndim == 0 and value.dtype in (torch.int64, torch.float64) else value
