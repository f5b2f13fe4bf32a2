"""The order in which a run draws its samples: a pure function of (seed, step), the same for any number of processes.

Each bucket is one endless stream: its draws of epoch 0 in a random order, then those of epoch 1, and so on, N_b(e) of them before epoch
e (`latentfm.data.mixture`). Its k-th batch covers the positions [k G, (k + 1) G) for a global batch of G, so a batch has one shape, may
lie across epochs, and nothing is dropped, padded or repeated at an epoch's end. Epoch e of the run holds the batches that are
completed in it, floor(N_b(e + 1) / G) - floor(N_b(e) / G) of bucket b, in a random order of their buckets. Nothing but the step is
needed to resume.
"""

from bisect import bisect_right
from dataclasses import dataclass, field

import numpy as np

from latentfm.data.mixture import Mixture
from latentfm.errors import InputError
from latentfm.randomness import permutation, uniform

Member = tuple[int, int, int]  # (epoch, sample index, how many times it was drawn before in this epoch)


@dataclass(frozen=True, eq=False)
class Stream:
    """The global batches of a mixture's draws, `batch_size` each. Raises ValueError without a draw to make."""

    mixture: Mixture
    batch_size: int
    seed: int
    _kept: dict[tuple, tuple] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        if self.batch_size < 1 or not self.mixture.groups:
            raise ValueError(f"a stream needs samples and a batch of at least 1, not {self.batch_size}")

    def members(self, step: int) -> list[Member]:
        """The global batch of optimizer step `step`, counted from 0: members of one bucket, in order."""
        bucket, number = self.batch(step)
        first = number * self.batch_size
        found: list[Member] = []
        while len(found) < self.batch_size:
            epoch, place = self.locate("stream", bucket, position=first + len(found))
            indices, turns = self.order(epoch, bucket)
            here = slice(place, place + self.batch_size - len(found))
            found += [(epoch, index, turn) for index, turn in zip(indices[here].tolist(), turns[here].tolist(), strict=True)]
        return found

    def batch(self, step: int) -> tuple[int, int]:
        """(bucket, number of the batch in its stream) of `step`."""
        epoch, cursor = self.place(step)
        buckets, numbers = self.labels(epoch)
        return int(buckets[cursor]), int(numbers[cursor])

    def place(self, step: int) -> tuple[int, int]:
        """(epoch, number of the step within it) of `step`. An epoch too small to complete a batch has no step."""
        if step < 0:
            raise ValueError(f"steps count from 0, not {step}")
        return self.locate("steps", position=step)

    def locate(self, what: str, bucket: int = 0, *, position: int) -> tuple[int, int]:
        """(epoch, place within it) of a position among all steps, or in the stream of a bucket: empty epochs hold none."""
        epoch, first, stop = self._kept.get((what, bucket), (0, 0, 0))
        if not first <= position < stop:

            def before(epoch: int) -> int:
                return self.steps_before(epoch) if what == "steps" else self.mixture.before(epoch, bucket)

            end = 1
            while before(end) <= position:
                end *= 2
            epoch = bisect_right(range(end), position, key=before) - 1
            first, stop = before(epoch), before(epoch + 1)
            self._kept[what, bucket] = epoch, first, stop
        return epoch, position - first

    def steps_before(self, epoch: int) -> int:
        """Steps in all epochs before `epoch`."""
        return sum(self.mixture.before(epoch, bucket) // self.batch_size for bucket in self.mixture.buckets)

    def steps_in(self, epoch: int) -> int:
        """Steps of one epoch: it varies by one a bucket, as batches lie across epochs."""
        return self.steps_before(epoch + 1) - self.steps_before(epoch)

    def labels(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(bucket, number of the batch in its stream) of each step of an epoch, two arrays."""
        if ("labels", epoch) not in self._kept:
            buckets, numbers = [], []
            for bucket in self.mixture.buckets:
                first, stop = (self.mixture.before(e, bucket) // self.batch_size for e in (epoch, epoch + 1))
                numbers.append(np.arange(first, stop))
                buckets.append(np.full(stop - first, bucket))
            sorted_buckets, sorted_numbers = np.concatenate(buckets), np.concatenate(numbers)
            order = np.arange(len(sorted_buckets))
            if len(buckets) > 1:
                order = permutation(len(order), self.seed, "buckets", epoch)
            shuffled = sorted_buckets[order]
            in_order = np.empty_like(sorted_numbers)
            in_order[np.argsort(shuffled, kind="stable")] = sorted_numbers  # the j-th of a bucket is its j-th batch
            self.keep("labels", epoch, value=(shuffled, in_order))
        return self._kept["labels", epoch]

    def order(self, epoch: int, bucket: int) -> tuple[np.ndarray, np.ndarray]:
        """(sample index, turn) of a bucket's draws of an epoch, shuffled: two arrays of int32."""
        if ("order", bucket, epoch) not in self._kept:
            indices, turns = self.mixture.draws(epoch, bucket)
            order = permutation(len(indices), self.seed, "order", epoch, bucket)
            self.keep("order", bucket, epoch, value=(indices[order], turns[order]))
        return self._kept["order", bucket, epoch]

    def keep(self, *key: str | int, value: tuple) -> None:
        """Remembers an epoch's arrays, forgetting all but one other of their kind: a batch lies across two epochs, or very small ones."""
        others = sorted(old for old in self._kept if old[:-1] == key[:-1])
        for old in others[:-1]:
            del self._kept[old]
        self._kept[key] = value

    def choose(self, step: int, shares: dict[int, float]) -> int:
        """One key of `shares` for the whole step, drawn with those probabilities from (seed, step)."""
        keys = sorted(shares)
        weights = np.array([shares[key] for key in keys], dtype=float)
        draw = uniform(self.seed, "t5_length", step)
        return keys[min(int(np.searchsorted(np.cumsum(weights / weights.sum()), draw, side="right")), len(keys) - 1)]

    def state(self, step: int) -> dict[str, int]:
        """Where the run is before `step`, for a checkpoint: {"seed", "step", "epoch", "cursor"}, the cursor counting steps in the epoch."""
        epoch, cursor = self.place(step)
        return {"seed": self.seed, "step": step, "epoch": epoch, "cursor": cursor}

    def step_of(self, state: dict[str, int]) -> int:
        """The step that `state` was made before. Raises InputError where its numbers show another seed, batch size or number of samples."""
        names = ("seed", "step", "epoch", "cursor")
        if set(state) < set(names):
            raise InputError(f"a state of the data should hold {', '.join(names)}, not {', '.join(map(str, state)) or 'nothing'}")
        here = self.state(state["step"])
        for name in names:
            if state[name] != here[name]:
                raise InputError(
                    f"the data of this run are not the checkpoint's: at step {state['step']} its {name} is {state[name]}, "
                    f"here it is {here[name]}; resume with the same seed, batch size, sources and buckets, or start a new run"
                )
        return state["step"]
