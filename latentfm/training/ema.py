"""Exponential moving average of a network's parameters."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from latentfm.models.memory import EMA_PART

PART = EMA_PART  # elements whose float32 copies exist at one time


class EMA:
    """float32 moving averages of the trainable parameters of `module`, whatever their precision.

    After step n (counted from 1) the decay is min(decay, (1 + n) / (10 + n)), so early averages forget the
    initial weights (the warm-up of Tensorflow's ExponentialMovingAverage). Parameters that don't train are not copied.
    """

    def __init__(self, module: nn.Module, decay: float = 0.999):
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"EMA decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.shadow = {name: p.detach().to(torch.float32, copy=True) for name, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int, masters: Mapping[str, Tensor] | None = None) -> None:
        """Move the averages towards the parameters after optimizer step `step` (the first is 1).

        `masters` are float32 weights by name that stand for the module's own, which are their rounding.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        current = dict(module.named_parameters()) | dict(masters or {})
        for names in self.parts():
            towards = [current[name].detach().float() for name in names]
            torch._foreach_lerp_([self.shadow[name] for name in names], towards, 1.0 - decay)

    def parts(self) -> Iterator[list[str]]:
        """All names, in lists of at most PART elements or of one tensor."""
        names, size = [], 0
        for name, value in self.shadow.items():
            if names and size + value.numel() > PART:
                yield names
                names, size = [], 0
            names.append(name)
            size += value.numel()
        yield names

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.shadow)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        missing = self.shadow.keys() ^ state.keys()
        if missing:
            raise ValueError(f"EMA state does not match the network; differing names: {sorted(missing)[:5]}")
        for name, value in state.items():
            self.shadow[name].copy_(value)

    @contextmanager
    def applied_to(self, module: nn.Module):
        """Within this context `module` holds the averages; afterwards its own parameters again."""
        named = dict(module.named_parameters())
        kept = {name: named[name].detach().clone() for name in self.shadow}
        copy_into(named, self.shadow.items())
        try:
            yield module
        finally:
            copy_into(named, kept.items())


@torch.no_grad()
def copy_into(parameters: dict[str, Tensor], values: Iterable[tuple[str, Tensor]]) -> None:
    for name, value in values:
        parameters[name].copy_(value)
