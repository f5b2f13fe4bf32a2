"""Exponential moving average of trained parameters."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from latentfm.bounds import EMA_CHUNK


class EMA:
    """float32 moving averages of named parameters, whatever their precision, on their own devices or all on `device`.

    After step n (counted from 1) the decay is min(decay, (1 + n) / (10 + n)), so early averages forget the
    initial weights (the warm-up of Tensorflow's ExponentialMovingAverage).
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float = 0.999, device: torch.device | None = None):
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"EMA decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.shadow = {name: p.detach().to(device or p.device, torch.float32, copy=True) for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor], step: int, masters: Mapping[str, Tensor] | None = None) -> None:
        """Move the averages towards the parameters after optimizer step `step` (the first is 1).

        `masters` are float32 weights by name that stand for the parameters, which are their rounding.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        current = dict(parameters) | dict(masters or {})
        for names in self.groups():
            towards = [current[name].detach().to(self.shadow[name].device, torch.float32) for name in names]
            torch._foreach_lerp_([self.shadow[name] for name in names], towards, 1.0 - decay)

    def groups(self) -> Iterator[list[str]]:
        """All names, in lists of at most EMA_CHUNK elements or of one tensor."""
        names, size = [], 0
        for name, value in self.shadow.items():
            if names and size + value.numel() > EMA_CHUNK:
                yield names
                names, size = [], 0
            names.append(name)
            size += value.numel()
        yield names

    @contextmanager
    def applied_to(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """Within this context `parameters` hold the averages; afterwards their own values again."""
        kept = {name: parameters[name].detach().clone() for name in self.shadow}
        copy_into(parameters, self.shadow.items())
        try:
            yield
        finally:
            copy_into(parameters, kept.items())


@torch.no_grad()
def copy_into(parameters: Mapping[str, Tensor], values: Iterable[tuple[str, Tensor]]) -> None:
    for name, value in values:
        parameters[name].copy_(value)
