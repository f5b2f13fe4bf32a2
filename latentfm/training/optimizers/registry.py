"""Which optimizer moves the trained weights, the course of its rate, and its state as tensors for a checkpoint."""

import importlib
import importlib.util
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from latentfm.config import TrainOptions
from latentfm.errors import InputError
from latentfm.optimizers import OPTIMIZERS
from latentfm.training.optimizers.adamw import AdamW

TABLES = {"qmap1": "dynamic", "qmap2": "udynamic"}  # bitsandbytes' quantisation tables: the same for all, in no checkpoint
GROUP = "group."  # begins the names of what an optimizer knows of a whole group of parameters


def package(name: str, option: str) -> Any:
    """The optional package `name`, imported. Raises InputError saying that `option` needs it and how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise missing(name, option) from error


def missing(name: str, option: str) -> InputError:
    """What to say where `option` needs the package `name` and it is not installed."""
    return InputError(f"{option} needs {name.split('.')[0].replace('_', '-')}, which is not installed: pip install 'latentfm[optimizers]'")


def check_optimizer(options: TrainOptions) -> None:
    """Raises InputError where train.optimizer is not installed, or cannot use what other options ask of it. Imports nothing."""
    name = options.optimizer
    kind = OPTIMIZERS[name]
    if kind.package is not None and importlib.util.find_spec(kind.package) is None:
        raise missing(kind.package, f"train.optimizer={name}")
    if options.learning_rate < kind.least_rate:
        raise InputError(
            f"{name} finds its own rate and multiplies it by train.learning_rate, which is {options.learning_rate:g}; set it to 1"
        )
    if not kind.betas and options.betas != TrainOptions.model_fields["betas"].default:
        raise InputError(f"{name} keeps no momentum and takes no train.betas, got {list(options.betas)}; leave them out")
    if name != "adamw" and options.moments != "float32":
        raise InputError(f"train.moments={options.moments} is for train.optimizer=adamw, not {name}; leave it out")
    if options.master_weights and options.adapter:
        raise InputError("train.master_weights copies bfloat16 weights; those of train.adapter are float32 already: leave it out")


def make_optimizer(parameters: Mapping[str, nn.Parameter], options: TrainOptions) -> torch.optim.Optimizer:
    """The optimizer of train.optimizer over those of the named `parameters` that take a gradient; biases and norms are not decayed.

    The classes are those of latentfm.optimizers, but for adamw with bfloat16 weights: one that rounds them stochastically or keeps masters,
    which begin as the parameters are here. Raises InputError as check_optimizer does.
    """
    check_optimizer(options)
    trainable = [p for p in parameters.values() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]  # a LoRA has matrices alone
    name, rate = options.optimizer, options.learning_rate
    narrow = options.weights == "bfloat16" and options.adapter is None  # an adapter's own weights are float32 always
    if name == "adamw" and (narrow or options.moments != "float32"):
        moments = getattr(torch, options.moments)
        return AdamW(groups, rate, options.betas, master_weights=options.master_weights, moments=moments, seed=options.seed)
    kind = OPTIMIZERS[name]
    module, target = kind.target.split(":")
    made = getattr(package(module, f"train.optimizer={name}"), target)
    return made(groups, lr=rate, **({"betas": options.betas} if kind.betas else {}), **kind.keywords)


def learning_rate(step: int, options: TrainOptions) -> float:
    """The rate of optimizer step `step` (from 0): linear warm-up over warmup_steps, then the decay to 0 at `steps`."""
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    progress = (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
    factor = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return options.learning_rate * factor[options.decay]


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
