"""The optimizer that moves the trained weights, and the course of its rate."""

import importlib
import importlib.util
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from latentfm.config import TrainOptions
from latentfm.errors import InputError
from latentfm.optimizers import OPTIMIZERS
from latentfm.training.optimizers.adamw import AdamW

COOLING = 0.2  # of all steps: where train.decay=wsd falls


def package(name: str, option: str) -> Any:
    """The optional package `name`, imported. Raises InputError saying that `option` needs it and how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise missing(name, option) from error


def missing(name: str, option: str) -> InputError:
    """What to say where `option` needs the package `name` and it is not installed."""
    return InputError(f"{option} needs {name.split('.')[0].replace('_', '-')}, which is not installed: pip install 'latentfm[optimizers]'")


def without_blocks(name: str) -> InputError:
    """What to say where an optimizer of the blocks' matrices has none."""
    return InputError(f"train.optimizer={name} moves the matrices of an MM-DiT's blocks, and none trains here; take adamw")


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
    name, rate = options.optimizer, options.learning_rate
    kind = OPTIMIZERS[name]
    trainable = {name: p for name, p in parameters.items() if p.requires_grad}
    apart = {name for name, p in trainable.items() if kind.matrices and p.ndim == 2 and "transformer_blocks." in name}
    if kind.matrices and not apart:
        raise without_blocks(name)
    groups = [
        {"params": [p for name, p in trainable.items() if name in apart], "weight_decay": options.weight_decay, "muon": True},
        {"params": [p for name, p in trainable.items() if name not in apart and p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in trainable.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]  # a LoRA has matrices alone
    narrow = options.weights == "bfloat16" and options.adapter is None  # an adapter's own weights are float32 always
    if name == "adamw" and (narrow or options.moments != "float32"):
        moments = getattr(torch, options.moments)
        return AdamW(groups, rate, options.betas, master_weights=options.master_weights, moments=moments, seed=options.seed)
    module, target = kind.target.split(":")
    made = getattr(package(module, f"train.optimizer={name}"), target)
    return made(groups, lr=rate, **({"betas": options.betas} if kind.betas else {}), **kind.keywords)


def learning_rate(step: int, options: TrainOptions) -> float:
    """The rate of optimizer step `step` (from 0): linear warm-up over warmup_steps, then the decay to 0 at `steps`.

    "wsd", warm-up, stable, decay, is constant but for the last fifth, which is linear (Hu et al. 2024, "MiniCPM", section 4).
    """
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    left = 1.0 - (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
    factor = {
        "constant": 1.0, "linear": left, "cosine": 0.5 * (1.0 - math.cos(math.pi * left)),
        "wsd": min(1.0, (options.steps - step) / (COOLING * options.steps)),
    }  # fmt: skip
    return options.learning_rate * factor[options.decay]
