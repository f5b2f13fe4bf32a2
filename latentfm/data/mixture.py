"""How often each sample is drawn in an epoch, when sources have repeats and weights: a pure function of (seed, epoch).

A source of n samples with rate r = repeats x weight has D = max(1, round(n r)) draws an epoch. Each of its samples comes
floor(D / n) times; the D mod n draws left over go round: epoch after epoch they take the next stretch of a random order of the
samples, and begin another order when it is used up. So with r >= 1 every sample comes at least once an epoch, a whole r is exactly
r times, and with r < 1 every sample comes once in a round of n / D epochs. Draws of one sample in one epoch are numbered, and the
number is part of their randomness.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from latentfm.data.sources.base import Sample


@dataclass(frozen=True)
class Part:
    """A source's samples: their indices, its rate, and the seed of its rounds."""

    indices: np.ndarray
    rate: float
    seed: tuple[int, ...]

    @property
    def draws(self) -> int:
        """Draws an epoch."""
        return max(1, round(len(self.indices) * self.rate))

    def members(self, epoch: int) -> list[int]:
        """The sample index of each draw of `epoch`."""
        n = len(self.indices)
        whole, rest = divmod(self.draws, n)
        first, place = divmod(epoch * rest, n)
        rounds = [np.random.default_rng((*self.seed, turn)).permutation(n) for turn in (first, first + 1)]
        places = np.concatenate([np.tile(np.arange(n), whole), np.concatenate(rounds)[place : place + rest]])
        return self.indices[places.astype(int)].tolist()


@dataclass(frozen=True)
class Mixture:
    """The draws of each epoch, from parts that do not overlap."""

    parts: tuple[Part, ...]
    plain: bool  # every sample exactly once: draw i is sample i
    _made: dict[int, list[tuple[int, int]]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, samples: Sequence[Sample], seed: int) -> "Mixture":
        """The mixture of samples by the share of their source."""
        groups: dict[str, list[int]] = {}
        for index, sample in enumerate(samples):
            groups.setdefault(sample.share.source, []).append(index)
        rates = [samples[indices[0]].share.rate for indices in groups.values()]
        parts = tuple(
            Part(np.array(indices), rate, (seed, 11, *name.encode()))
            for (name, indices), rate in zip(groups.items(), rates, strict=True)
        )
        return cls(parts, all(rate == 1 for rate in rates))

    @property
    def count(self) -> int:
        """Draws an epoch, of all parts."""
        return sum(part.draws for part in self.parts)

    def draw(self, epoch: int, number: int) -> tuple[int, int]:
        """(sample index, how many times it was drawn before in this epoch) of draw `number` of `epoch`."""
        if self.plain:
            return number, 0
        if epoch not in self._made:
            if len(self._made) > 1:  # a batch may lie across two epochs
                self._made.pop(min(self._made))
            turns: Counter[int] = Counter()
            made = []
            for index in [index for part in self.parts for index in part.members(epoch)]:
                made.append((index, turns[index]))
                turns[index] += 1
            self._made[epoch] = made
        return self._made[epoch][number]
