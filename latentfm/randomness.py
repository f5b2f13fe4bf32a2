"""Every draw of randomness of a run is a function of (seed, purpose, place): the epoch and the sample, or the step.

So no draw depends on batch, rank, worker or the number of processes, a run resumes exactly, and a new purpose moves no other's numbers.
"""

import hashlib

import numpy as np
import torch


def seed_of(seed: int, purpose: str, *place: int | str) -> int:
    """A number below 2^63 that depends on exactly these: by it a generator of any kind is seeded."""
    parts = [str(part).encode() for part in (seed, purpose, *place)]
    digest = hashlib.blake2b(b"".join(b"%d:%b" % (len(part), part) for part in parts), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniform(seed: int, purpose: str, *place: int | str) -> float:
    """A number drawn uniformly from [0, 1), of 24 bits: exact in float32."""
    return (seed_of(seed, purpose, *place) >> 39) * 2.0**-24


def generator(seed: int, purpose: str, *place: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator on `device`."""
    return torch.Generator(device).manual_seed(seed_of(seed, purpose, *place))


def permutation(count: int, seed: int, purpose: str, *place: int | str) -> np.ndarray:
    """The numbers 0 to count - 1, shuffled."""
    return np.random.default_rng(seed_of(seed, purpose, *place)).permutation(count)
