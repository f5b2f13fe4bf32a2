"""Every draw of randomness of a run is a function of (seed, purpose, place): the epoch and the sample, or the step.

So no draw depends on batch, rank, worker or the number of processes, a run resumes exactly, and a new purpose moves no other's numbers.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch


def encoded(*parts: int | str) -> bytes:
    """The parts of a place as bytes, none of which runs into the next; those of two places follow one another."""
    return b"".join(b"%d:%b" % (len(part), part) for part in (str(part).encode() for part in parts))


def hashed(place: bytes) -> int:
    """A number below 2^63 that depends on what was encoded."""
    return int.from_bytes(hashlib.blake2b(place, digest_size=8).digest(), "little") >> 1


def seed_of(seed: int, purpose: str, *place: int | str) -> int:
    """A number below 2^63 that depends on exactly these: by it a generator of any kind is seeded."""
    return hashed(encoded(seed, purpose, *place))


def uniform(seed: int, purpose: str, *place: int | str) -> float:
    """A number drawn uniformly from [0, 1), of 24 bits: exact in float32."""
    return uniforms(encoded(seed, purpose), [encoded(*place)])[0]


def uniforms(purpose: bytes, places: Sequence[bytes]) -> list[float]:
    """`uniform` at many places, encoded as seed and purpose are."""
    return [(hashed(purpose + place) >> 39) * 2.0**-24 for place in places]


def generator(seed: int, purpose: str, *place: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator on `device`."""
    return torch.Generator(device).manual_seed(seed_of(seed, purpose, *place))


def permutation(count: int, seed: int, purpose: str, *place: int | str) -> np.ndarray:
    """The numbers 0 to count - 1, shuffled."""
    return np.random.default_rng(seed_of(seed, purpose, *place)).permutation(count)
