"""How often each sample is drawn in an epoch, when sources have repeats and weights: a pure function of (seed, epoch).

The samples of one source and one bucket are a group. In a group of n samples with rate r = repeats x weight every sample is drawn
floor(r) times an epoch. Of what is left, f = r - floor(r) of a draw a sample, epoch e has floor((e + 1) n f) - floor(e n f) draws;
they are the next stretch of an endless sequence of permutations of the group. So E epochs have floor(E n r) draws of the group, with
no minimum, and the counts of two of its samples differ by at most one. Draws of one sample in one epoch are numbered, and the number,
its turn, is part of their randomness.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from latentfm.data.sources.base import Sample
from latentfm.randomness import permutation


def exact(rate: float) -> Fraction:
    """The rate as it was written: 3 x 0.1 in floating point is 3/10, and not a little more."""
    return Fraction(rate).limit_denominator(10**9) or Fraction(rate)


@dataclass(frozen=True, eq=False)
class Group:
    """The samples of one source and one bucket: their indices [n], their rate, and the run's seed."""

    indices: np.ndarray
    rate: Fraction
    seed: int = 0
    source: str = ""
    bucket: int = 0

    def before(self, epoch: int) -> int:
        """Draws in all epochs before `epoch`."""
        return epoch * len(self.indices) * self.rate.numerator // self.rate.denominator

    def left_over(self, epoch: int) -> int:
        """Those of them that are not one of the floor(rate) of each sample."""
        return self.before(epoch) - epoch * len(self.indices) * int(self.rate)

    def draws(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(sample index, turn) of each draw of `epoch`, two arrays of int32."""
        n, whole = len(self.indices), int(self.rate)
        first, last = self.left_over(epoch), self.left_over(epoch + 1)
        turn, place = divmod(first, n)
        rest = self.round(turn)[place : place + last - first] if last > first else np.empty(0, dtype=np.int64)
        more = self.round(turn + 1)[: last - first - len(rest)] if last - first > len(rest) else rest[:0]
        places = np.concatenate([np.tile(np.arange(n), whole), rest, more])
        # a sample that ends one round and begins the next has both draws in this epoch
        turns = [np.repeat(np.arange(whole), n), np.full(len(rest), whole), whole + np.isin(more, rest)]
        return self.indices[places].astype(np.int32), np.concatenate(turns).astype(np.int32)

    def round(self, number: int) -> np.ndarray:
        """The order in which round `number` draws the group."""
        return permutation(len(self.indices), self.seed, "mixture", self.source, self.bucket, number)


@dataclass(frozen=True, eq=False)
class Mixture:
    """The draws of each epoch, by bucket. `Mixture.of` makes it of samples, `Mixture.plain` of their number."""

    groups: tuple[Group, ...]

    @classmethod
    def of(cls, samples: Sequence[Sample], seed: int, buckets: Sequence[int] | np.ndarray | None = None) -> "Mixture":
        """The mixture of samples by the share of their source, and by bucket: one index a sample, None is one bucket for all.

        A sample in a bucket below 0 is never drawn: it is held out.
        Where every rate is 1, draw i of an epoch is sample i, or of a bucket its i-th sample.
        """
        if buckets is not None and len(buckets) != len(samples):
            raise ValueError(f"{len(samples)} samples and {len(buckets)} buckets: give one bucket a sample")
        if all(sample.share.rate == 1 for sample in samples):
            return cls.plain(len(samples), buckets)
        names: dict[str, int] = {}
        rates: list[Fraction] = []
        sources = np.empty(len(samples), dtype=np.int32)
        for index, sample in enumerate(samples):
            sources[index] = names.setdefault(sample.share.source, len(names))
            if len(rates) < len(names):
                rates.append(exact(sample.share.rate))
        labels = np.zeros(len(samples), dtype=np.int32) if buckets is None else np.asarray(buckets, dtype=np.int32)
        groups = []
        for bucket in np.unique(labels[labels >= 0]).tolist():
            for (name, source), rate in zip(names.items(), rates, strict=True):
                indices = np.flatnonzero((labels == bucket) & (sources == source)).astype(np.int32)
                if len(indices):
                    groups.append(Group(indices, rate, seed, name, bucket))
        return cls(tuple(groups))

    @classmethod
    def plain(cls, count: int, buckets: Sequence[int] | np.ndarray | None = None) -> "Mixture":
        """`count` samples, each once an epoch; those in a bucket below 0 never."""
        labels = np.zeros(count, dtype=np.int32) if buckets is None else np.asarray(buckets, dtype=np.int32)
        found = [(bucket, np.flatnonzero(labels == bucket).astype(np.int32)) for bucket in np.unique(labels[labels >= 0]).tolist()]
        return cls(tuple(Group(indices, Fraction(1), bucket=bucket) for bucket, indices in found))

    @property
    def buckets(self) -> list[int]:
        """The buckets that have samples, ascending."""
        return sorted({group.bucket for group in self.groups})

    def per_epoch(self, bucket: int | None = None) -> float:
        """Draws an epoch, in the mean over many; of one bucket, where it is given."""
        return float(sum(len(group.indices) * group.rate for group in self.groups if bucket in (None, group.bucket)))

    def before(self, epoch: int, bucket: int) -> int:
        """Draws of a bucket in all epochs before `epoch`."""
        return sum(group.before(epoch) for group in self.groups if group.bucket == bucket)

    def draws(self, epoch: int, bucket: int) -> tuple[np.ndarray, np.ndarray]:
        """(sample index, turn) of each draw of a bucket in `epoch`, two arrays of int32, group by group."""
        found = [group.draws(epoch) for group in self.groups if group.bucket == bucket]
        return np.concatenate([indices for indices, _ in found]), np.concatenate([turns for _, turns in found])
