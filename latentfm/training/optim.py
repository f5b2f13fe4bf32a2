"""The optimizer and the learning rate's course."""

import math

import torch
from torch import nn

from latentfm.config import TrainOptions


def make_optimizer(network: nn.Module, options: TrainOptions) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `network`; weight decay on matrices only (biases and norms have none)."""
    trainable = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=options.betas, fused=True)


def learning_rate(step: int, options: TrainOptions) -> float:
    """The rate of optimizer step `step` (from 0): linear warm-up over warmup_steps, then the decay to 0 at `steps`."""
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    progress = (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
    factor = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return options.learning_rate * factor[options.decay]
