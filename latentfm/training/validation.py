"""The loss on pictures that are not trained on: at fixed times, with fixed noise, the same for any number of processes."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from latentfm.data.loader import Batch, Reader
from latentfm.data.sources import Sample
from latentfm.errors import Failure, InputError
from latentfm.models import text
from latentfm.training.step import Objective, losses_at

EPOCH = -1  # whose draws (caption, crop, flip and noise) the held-out pictures have, at every validation the same
NAMED = 5  # pictures in an error


def split_held_out(samples: Sequence[Sample], count: int, seed: int) -> tuple[list[int], list[int]]:
    """(indices of the samples to train on, indices of `count` samples held out), both ascending.

    Held out are the samples with the smallest hash of (seed, id), regularisation sets apart: which they are depends neither on the
    order of the samples nor on how many there are, and a picture that comes or goes moves one of them at most. Only ids are
    looked at: of two files with the same picture one may be held out and the other trained on; `latentfm data check` names duplicates.

    Raises InputError when `count` leaves no picture to train on.
    """
    own = [index for index, sample in enumerate(samples) if not sample.share.regularisation]
    if count and count >= len(own):
        raise InputError(
            f"validation.held_out {count} of {len(own)} pictures leaves none to train on (regularisation sets are not held out); "
            f"hold out at most {max(0, len(own) - 1)}"
        )

    def rank(index: int) -> bytes:
        return hashlib.blake2b(samples[index].id.encode(), key=f"held out {seed}".encode(), digest_size=16).digest()

    held_out = set(sorted(own, key=rank)[:count])
    return [index for index in range(len(samples)) if index not in held_out], sorted(held_out)


@dataclass(frozen=True)
class Validation:
    """The held-out loss at `times` values of t: the middles of as many equal shares of the density that training draws t from.

    objective: the training's; of it the density, the shift and the latents' scale are used, not the weighting.
    reader: reader[members, t5_length] -> Batch, members being [(epoch, sample index, turn), ...].
    samples, bucket_of: what the reader counts by, and the bucket of each; a batch has one bucket.
    indices: of the held-out samples, at least one.
    t5_length: tokens of the prompts, padding included.
    batch_size: the most pictures in a forward pass of one process.
    ready: brings the reader's batch to the device, encoded.
    """

    times: int
    objective: Objective
    reader: Reader
    samples: Sequence[Sample]
    bucket_of: Sequence[int]
    indices: Sequence[int]
    t5_length: int
    batch_size: int
    ready: Callable[[Batch], Batch]

    def grid(self) -> Tensor:
        """The times, ascending, float32 [times]."""
        middles = (torch.arange(self.times, dtype=torch.float64) + 0.5) / self.times
        return self.objective.times(middles).float().flip(0)  # t falls as u rises

    def passes(self, rank: int, world: int) -> list[tuple[list[int], int]]:
        """The forward passes of one process: (places in `indices`, how many of them count), the rest repeating one of the same bucket.

        All processes have as many passes, of as many rows each: FSDP gathers the weights in every pass, all processes together.
        """
        by_bucket: dict[int, list[int]] = {}
        for place, index in enumerate(self.indices):
            by_bucket.setdefault(int(self.bucket_of[index]), []).append(place)
        found = []
        for _, places in sorted(by_bucket.items()):
            count = math.ceil(len(places) / (world * self.batch_size))
            rows = math.ceil(len(places) / (world * count))
            for number in range(count):
                first = (number * world + rank) * rows
                own = places[first : first + rows]
                found.append((own + places[:1] * (rows - len(own)), len(own)))
        return found

    def run(self, network: nn.Module, rank: int, world: int, reduce: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """{"validation_loss": mean, "by_t": {"0.06": mean, ...}, "stderr": of the mean over the pictures, if there are several}.

        The loss is the mean squared error of the velocity (notes, eq. 31), not weighted, with no encoder dropped, in evaluation mode; the
        mean is over pictures and times, in float64. Call it on every process; `reduce` adds a float32 tensor on the device up over
        them, and all get the same. The losses come together in one table, so that the processes and batches they were computed in
        leave no trace but the rounding of the network.

        Raises InputError, on every process, naming the pictures whose loss is not finite.
        """
        table = reduce(self.table(network, rank, world)).cpu().double()  # here alone the host waits for the device
        self.refuse_non_finite(table)
        return self.summary(table)

    @torch.no_grad()
    def table(self, network: nn.Module, rank: int, world: int) -> Tensor:
        """The losses of all pictures at all times, [held out, times] float32 on the device: zeros where another process has them."""
        grid, losses, cells = self.grid().tolist(), [], []
        with evaluating(network):
            for places, counted in self.passes(rank, world):
                members = [(EPOCH, self.indices[place], 0) for place in places]
                batch = replace(self.ready(self.reader[members, self.t5_length]), kept=None)
                for number, t in enumerate(grid):
                    at = torch.full((len(places),), t, device=batch.eps.device)
                    losses.append(losses_at(network, batch, at, batch.parts, self.objective)[:counted])
                    cells += [place * len(grid) + number for place in places[:counted]]
        found = torch.cat(losses)
        table = found.new_zeros(len(self.indices) * len(grid))
        table[torch.tensor(cells, dtype=torch.long).to(table.device, non_blocking=True)] = found
        return table.view(len(self.indices), len(grid))

    def summary(self, table: Tensor) -> dict[str, Any]:
        """What `run` returns, from the losses of all pictures at all times, [held out, times] float64."""
        by_picture = table.mean(dim=1)
        by_t = dict(zip(names(self.grid()), table.mean(dim=0).tolist(), strict=True))
        result: dict[str, Any] = {"validation_loss": by_picture.mean().item(), "by_t": by_t}
        if len(by_picture) > 1:
            result["stderr"] = (by_picture.std() / math.sqrt(len(by_picture))).item()
        return result

    def refuse_non_finite(self, table: Tensor) -> None:
        """Raises Failure when a loss is not finite: of which pictures, at which times."""
        bad = [
            f"{self.samples[index].id} (t = {', '.join(name for name, good in zip(names(self.grid()), row, strict=True) if not good)})"
            for index, row in zip(self.indices, torch.isfinite(table).tolist(), strict=True)
            if not all(row)
        ]
        if bad:
            more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
            raise Failure(f"the validation loss is not finite for {', '.join(bad[:NAMED])}{more}; the newest checkpoint is untouched")


def names(grid: Tensor) -> list[str]:
    """The times in as few digits, two or more after the point, as tell them apart."""
    for digits in range(2, 10):
        found = [f"{t:.{digits}f}" for t in grid.tolist()]
        if len(set(found)) == len(found):
            break
    return found


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """A context with the network in evaluation mode and nothing compiled; afterwards each module is in the mode it was in."""
    # compiling again for a few forward passes takes longer than they do
    with text.evaluating(network), torch.compiler.set_stance("force_eager"):
        yield
