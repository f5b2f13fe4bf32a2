"""The figures of an optimizer step: summed on the device while it goes on, brought to the host once, and how fast the steps come."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from accelerate import Accelerator
from torch import Tensor

from latentfm import flow
from latentfm.data.loader import Batch

INTERVALS = 8  # of t, for the loss by t in the log
STEPS_OF_PACE = 50  # that pictures a second are counted over


@dataclass(frozen=True)
class StepFigures:
    """A step's figures over all processes. prior_loss: unweighted, None where no sample of a regularisation set was drawn."""

    loss: float
    gradient_norm: float
    prior_loss: float | None
    loss_by_t: list[float | None]
    count_by_t: list[int]
    stop: bool  # whether any process was asked to


@dataclass
class StepSums:
    """What one process adds up of a step's forward passes: float32 tensors on its device, of no dimension or [INTERVALS]."""

    loss: Tensor
    stop: Tensor
    prior_loss: Tensor
    prior_count: Tensor
    loss_by_t: Tensor
    count_by_t: Tensor

    @classmethod
    def zero(cls, device: torch.device) -> "StepSums":
        return cls(*(torch.zeros(INTERVALS if field.name.endswith("by_t") else (), device=device) for field in fields(cls)))

    def add(self, losses: Tensor, t: Tensor, loss: Tensor, batch: Batch) -> None:
        """Adds a forward pass: each sample's loss and time, [B], and the one that is minimised. Does not wait for the device."""
        self.loss += loss
        if batch.prior is not None:
            self.prior_loss += torch.where(batch.prior, losses, 0.0).sum()
            self.prior_count += batch.prior.sum()
        means, counts = flow.by_time(losses, t, INTERVALS)
        self.loss_by_t += torch.where(counts > 0, means * counts, 0.0)
        self.count_by_t += counts

    def over_all_ranks(self, accelerator: Accelerator, stop: bool, gradient_norm: Tensor) -> StepFigures:
        """The step's figures, in one sum over the processes and one wait of the host for the device: the only one of a step."""
        self.stop.fill_(stop)
        own = [getattr(self, field.name) for field in fields(self)]
        summed = accelerator.reduce(torch.cat([tensor.reshape(-1) for tensor in own]), "sum")
        numbers = iter(torch.cat([summed, gradient_norm.view(1)]).tolist())
        loss, stopped, prior_loss, prior_count = (next(numbers) for _ in range(4))
        by_t, counts = ([next(numbers) for _ in range(INTERVALS)] for _ in range(2))
        return StepFigures(
            loss=loss / accelerator.num_processes,
            gradient_norm=next(numbers),
            prior_loss=prior_loss / prior_count if prior_count else None,
            loss_by_t=[value / count if count else None for value, count in zip(by_t, counts, strict=True)],
            count_by_t=[int(count) for count in counts],
            stop=stopped > 0,
        )


class Pace:
    """Pictures a second over the last steps; what goes on within `pause` is no training time."""

    def __init__(self, pictures: int):
        self.pictures, self.paused = pictures, 0.0
        self.times = deque([time.monotonic()], STEPS_OF_PACE + 1)

    def step(self) -> float:
        """Counts a step of `pictures`; returns the pictures a second."""
        self.times.append(time.monotonic() - self.paused)
        return (len(self.times) - 1) * self.pictures / (self.times[-1] - self.times[0])

    @contextmanager
    def pause(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.paused += time.monotonic() - began
