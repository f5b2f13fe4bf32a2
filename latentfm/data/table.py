"""What the loader's processes know of the samples, in arrays: no Python object a sample, whose reference count would copy its page."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from latentfm.data.sources import Sample


@dataclass(frozen=True, eq=False)
class Texts:
    """Strings by number, as one array of bytes and where each begins."""

    data: np.ndarray
    starts: np.ndarray  # int64 [N + 1]

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Texts":
        encoded = [text.encode() for text in texts]
        return cls(np.frombuffer(b"".join(encoded), np.uint8), np.cumsum([0, *map(len, encoded)], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> str:
        return self.data[self.starts[number] : self.starts[number + 1]].tobytes().decode()


@dataclass(frozen=True, eq=False)
class SampleTable:
    """The samples of a run in arrays, and all their captions, each text once."""

    ids: Texts
    texts: Texts
    first: np.ndarray  # int64 [N + 1]: where each sample's captions begin in `captions`
    captions: np.ndarray  # int32: the number of the text of each caption of each sample
    bounds: np.ndarray  # float64, as long as `captions`: up to where u chooses it, see choose; empty when no sample has weights
    weighted: np.ndarray  # bool [N]: whether the sample's captions have weights
    prior: np.ndarray  # bool [N]: whether it is of a regularisation set

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> "SampleTable":
        texts: dict[str, int] = {}
        captions = np.array([texts.setdefault(text, len(texts)) for sample in samples for text in sample.captions], np.int32)
        weighted = np.array([bool(sample.caption_weights) for sample in samples])
        bounds = [bounds_of(sample) for sample in samples] if weighted.any() else [np.empty(0)]
        return cls(
            Texts.of([sample.id for sample in samples]), Texts.of(list(texts)),
            np.cumsum([0, *(len(sample.captions) for sample in samples)], dtype=np.int64), captions, np.concatenate(bounds), weighted,
            np.array([sample.share.regularisation for sample in samples]),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.weighted)

    def caption(self, index: int, u: float) -> int:
        """The number of the text that u, uniform in [0, 1), chooses for sample `index`."""
        first, stop = self.first[index], self.first[index + 1]
        return int(self.captions[first + choose(u, int(stop - first), self.bounds[first:stop] if self.weighted[index] else None)])

    def digest(self) -> str:
        """SHA-256 of the ids and captions, in order."""
        digest = hashlib.sha256()
        for array in (self.ids.starts, self.ids.data, self.texts.starts, self.texts.data, self.first, self.captions, self.bounds):
            digest.update(array.tobytes())
        return digest.hexdigest()


def bounds_of(sample: Sample) -> np.ndarray:
    """The cumulative chances of a sample's captions by weight, float64; of captions without weights all 1, which nobody reads."""
    if not sample.caption_weights:
        return np.ones(len(sample.captions))
    return np.cumsum(sample.caption_weights) / sum(sample.caption_weights)


def choose(u: float, count: int, bounds: np.ndarray | None) -> int:
    """Which of `count` captions u, uniform in [0, 1), chooses: by `bounds`, or without them each with the same chance."""
    place = int(u * count) if bounds is None else int(np.searchsorted(bounds, u, side="right"))
    return min(place, count - 1)
