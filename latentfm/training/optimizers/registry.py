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
from latentfm.training.optimizers.adamw import AdamW

PACKAGES = {  # of the optimizers that PyTorch has not
    "adamw8bit": "bitsandbytes", "paged_adamw": "bitsandbytes", "paged_adamw8bit": "bitsandbytes",
    "prodigy": "prodigyopt", "lion": "lion_pytorch",
}  # fmt: skip
# what looks at more of a parameter than its single numbers, its rows, its norm, blocks of 256: not for parameters split over processes
NOT_SPLIT = ("adamw8bit", "paged_adamw8bit", "adafactor", "prodigy")
LEAST_PRODIGY_RATE = 0.1  # below it somebody gave another optimizer's rate
# Adafactor's smallest variance, whose square float32 still holds (a LoRA's first gradients are 0), and the smallest scale of a weight:
# with 1 an update is the rate itself, as AdamW's, and not a share of the weight's size, which at the start of a LoRA is nothing
ADAFACTOR_EPS = (1e-18, 1.0)
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
    return InputError(f"{option} needs {name.replace('_', '-')}, which is not installed: pip install 'latentfm[optimizers]'")


def check_optimizer(options: TrainOptions) -> None:
    """Raises InputError where train.optimizer is not installed, or cannot use what other options ask of it. Imports nothing."""
    name = options.optimizer
    if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
        raise missing(PACKAGES[name], f"train.optimizer={name}")
    if name == "prodigy" and options.learning_rate < LEAST_PRODIGY_RATE:
        raise InputError(
            f"prodigy finds its own rate and multiplies it by train.learning_rate, which is {options.learning_rate:g}; set it to 1"
        )
    default = TrainOptions.model_fields["betas"].default
    if name == "adafactor" and options.betas != default:
        raise InputError(f"adafactor keeps no momentum and takes no train.betas, got {list(options.betas)}; leave them out")
    if name != "adamw" and options.moments != "float32":
        raise InputError(f"train.moments={options.moments} is for train.optimizer=adamw, not {name}; leave it out")
    if options.master_weights and options.adapter:
        raise InputError("train.master_weights copies bfloat16 weights; those of train.adapter are float32 already: leave it out")


def make_optimizer(parameters: Mapping[str, nn.Parameter], options: TrainOptions) -> torch.optim.Optimizer:
    """The optimizer of train.optimizer over those of the named `parameters` that take a gradient; biases and norms are not decayed.

    adamw: torch's fused AdamW, or, for bfloat16 weights, one that rounds them stochastically or keeps masters, which begin as the
    parameters are here. adamw8bit (Dettmers et al. 2022): moments in 8 bits a number, in
    blocks of 256, for parameters of 4,096 numbers or more. paged_adamw, paged_adamw8bit: their state moves out of a GPU whose memory is
    full; without a GPU they are bitsandbytes' AdamW and adamw8bit. adafactor (Shazeer and Stern 2018): second moments of rows and columns
    alone, no first ones; torch's class, its rate the rate itself. prodigy (Mishchenko and Defazio 2023): learning_rate times a rate it
    finds. lion (Chen et al. 2023): steps of equal size in every weight. Raises InputError as check_optimizer does.
    """
    check_optimizer(options)
    trainable = [p for p in parameters.values() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]  # a LoRA has matrices alone
    name, rate, betas = options.optimizer, options.learning_rate, options.betas
    if name == "adamw":
        narrow = options.weights == "bfloat16" and options.adapter is None  # an adapter's own weights are float32 always
        if not narrow and options.moments == "float32":
            return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)
        moments = getattr(torch, options.moments)
        return AdamW(groups, rate, betas, master_weights=options.master_weights, moments=moments, seed=options.seed)
    if name == "adafactor":
        return torch.optim.Adafactor(groups, lr=rate, eps=ADAFACTOR_EPS)
    library = package(PACKAGES[name], f"train.optimizer={name}")
    if name == "prodigy":  # as its authors advise for a rate that warms up
        return library.Prodigy(groups, lr=rate, betas=betas, use_bias_correction=True, safeguard_warmup=True)
    if name == "lion":
        return library.Lion(groups, lr=rate, betas=betas)
    kinds = {"adamw8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw8bit": "PagedAdamW8bit"}
    return getattr(library.optim, kinds[name])(groups, lr=rate, betas=betas)


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
