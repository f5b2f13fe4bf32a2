"""From a dataset and its cache to training batches, each sample's randomness a function of (seed, epoch, id) alone.

The run is one endless stream of positions: position p is draw permutation_e[p mod N] of epoch e = p div N, of the N draws an epoch
has (`latentfm.data.mixture`; without weights and repeats a draw is a sample). Optimizer step s covers positions [s G, (s + 1) G) for
a global batch of G, whatever the number of processes, and nothing but the step is needed to resume.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from latentfm.data.cache import Cache
from latentfm.data.mixture import Mixture
from latentfm.data.sources import Sample
from latentfm.models.text import PromptParts


def generator_for(seed: int, epoch: int, name: str) -> torch.Generator:
    """A CPU generator that depends on exactly these three."""
    digest = hashlib.blake2b(f"{seed}\0{epoch}\0{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass(frozen=True)
class Stream:
    """The order of an epoch's draws: `count` of them, in global batches of `batch_size`."""

    count: int
    batch_size: int
    seed: int

    def positions(self, step: int) -> list[tuple[int, int]]:
        """(epoch, draw) of each member of the global batch of optimizer step `step`, counted from 0."""
        found = []
        for position in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, place = divmod(position, self.count)
            found.append((epoch, int(self.order(epoch)[place])))
        return found

    def order(self, epoch: int) -> np.ndarray:
        """The permutation of epoch `epoch`."""
        cached = getattr(self, "_order", None)
        if cached is None or cached[0] != epoch:
            cached = (epoch, np.random.default_rng((self.seed, epoch)).permutation(self.count))
            object.__setattr__(self, "_order", cached)
        return cached[1]

    def choose(self, step: int, shares: dict[int, float]) -> int:
        """One key of `shares` for the whole step, drawn with those probabilities from (seed, step)."""
        keys = sorted(shares)
        weights = np.array([shares[key] for key in keys], dtype=float)
        draw = np.random.default_rng((self.seed, 7, step)).random()
        return keys[min(int(np.searchsorted(np.cumsum(weights / weights.sum()), draw, side="right")), len(keys) - 1)]


@dataclass(frozen=True)
class Dropout:
    """Label dropout: `joint` drops the whole condition, `each` every encoder by itself (SD3 paper: 0.464 each, about 10 % of all)."""

    joint: float
    each: float

    def p_unconditional(self, encoders: int) -> float:
        """The probability that a sample is trained without any condition."""
        return self.joint + (1 - self.joint) * self.each**encoders


@dataclass(frozen=True)
class Routing:
    """Token routing (TREAD, Krause et al. 2025): some blocks see a share `keep` of the image tokens, patches of `patch_size` squared."""

    keep: float
    patch_size: int

    def counts(self, height: int, width: int) -> tuple[int, int]:
        """(kept tokens, all tokens) of latents of height x width."""
        tokens = (height // self.patch_size) * (width // self.patch_size)
        return round(self.keep * tokens), tokens

    def draw(self, height: int, width: int, generator: torch.Generator) -> Tensor:
        """The kept tokens, [K] int64 ascending: each set of K is equally likely."""
        kept, tokens = self.counts(height, width)
        return torch.randperm(tokens, generator=generator)[:kept].sort().values


@dataclass
class Batch:
    """What one forward pass needs. moments [B, 2C, h, w]; draws as named, one row a sample; ids for error messages."""

    moments: Tensor
    parts: PromptParts
    dropped: dict[str, Tensor]  # encoder name -> bool [B]
    u: Tensor  # uniform in [0, 1): the draw of t
    vae_noise: Tensor  # [B, C, h, w]
    eps: Tensor  # [B, C, h, w]
    t5_length: int
    ids: list[str]
    kept: Tensor | None = None  # [B, K] int64: the image tokens that routed blocks see; None without routing
    mask: Tensor | None = None  # [B, 1, h, w] float32, the weight of each latent in the loss; None when no sample has one
    prior: Tensor | None = None  # bool [B]: which samples are a regularisation set; None when none is


def choose_caption(sample: Sample, u: float) -> str:
    """The caption that u, uniform in [0, 1), chooses: each with its weight's share of the chance, or all with the same."""
    last = len(sample.captions) - 1
    if not sample.caption_weights:
        return sample.captions[min(int(u * (last + 1)), last)]
    bounds = np.cumsum(sample.caption_weights) / sum(sample.caption_weights)
    return sample.captions[min(int(np.searchsorted(bounds, u, side="right")), last)]


class CachedSamples(TorchDataset):
    """Reads a micro-batch from the cache and makes its random draws; indexed by lists of (epoch, draw), see `batches`."""

    def __init__(
        self,
        samples: tuple[Sample, ...],
        cache: Cache,
        image_key: Callable[[Sample, bool], str],
        caption_key: Callable[[str, int], str],
        seed: int,
        dropout: Dropout,
        flip: bool,
        routing: Routing | None = None,
        mixture: Mixture | None = None,
        mask_key: Callable[[Sample, bool], str | None] | None = None,
    ):
        self.samples, self.cache, self.seed, self.dropout, self.flip = samples, cache, seed, dropout, flip
        self.routing = routing
        self.mixture = mixture or Mixture.of(samples, seed)
        self.image_key, self.caption_key, self.mask_key = image_key, caption_key, mask_key

    def __getitem__(self, request: tuple[list[tuple[int, int]], int]) -> Batch:
        members, t5_length = request
        drawn = [self.mixture.draw(epoch, index) for epoch, index in members]
        rows = [self.sample(epoch, index, t5_length, turn) for (epoch, _), (index, turn) in zip(members, drawn, strict=True)]
        samples = [self.samples[index] for index, _ in drawn]
        masks = [row["mask"] for row in rows]
        masked = [torch.ones(1, *row["moments"].shape[1:]) if mask is None else mask for row, mask in zip(rows, masks, strict=True)]
        prior = [sample.share.regularisation for sample in samples]
        names = [name for name, _ in rows[0]["parts"].items()]
        return Batch(
            moments=torch.stack([row["moments"] for row in rows]),
            parts=PromptParts(**{name: torch.stack([getattr(row["parts"], name) for row in rows]) for name in names}),
            dropped={name: torch.tensor([row["dropped"][name] for row in rows]) for name in rows[0]["dropped"]},
            u=torch.stack([row["u"] for row in rows]),
            vae_noise=torch.stack([row["vae_noise"] for row in rows]),
            eps=torch.stack([row["eps"] for row in rows]),
            t5_length=t5_length,
            ids=[sample.id for sample in samples],
            kept=torch.stack([row["kept"] for row in rows]) if self.routing else None,
            mask=torch.stack(masked) if any(mask is not None for mask in masks) else None,
            prior=torch.tensor(prior) if any(prior) else None,
        )

    def sample(self, epoch: int, index: int, t5_length: int, turn: int = 0) -> dict:
        """One sample's tensors and draws, for the `turn`-th time this epoch, from 0. The order of the draws makes runs repeatable."""
        sample = self.samples[index]
        generator = generator_for(self.seed, epoch, f"{sample.id}\0{turn}" if turn else sample.id)
        uniform = torch.rand(7, generator=generator)
        caption = choose_caption(sample, uniform[0].item())
        flipped = self.flip and bool(uniform[1] < 0.5)
        joint = bool(uniform[2] < self.dropout.joint)
        dropped = {name: joint or bool(uniform[3 + i] < self.dropout.each) for i, name in enumerate(("clip_1", "clip_2", "t5"))}
        moments = self.cache.read(self.image_key(sample, flipped))["moments"]
        mask_key = self.mask_key and self.mask_key(sample, flipped)
        shape = (moments.shape[0] // 2, *moments.shape[1:])
        draws = {
            "moments": moments,
            "mask": None if mask_key is None else self.cache.read(mask_key)["mask"],
            "parts": PromptParts(**self.cache.read(self.caption_key(caption, t5_length))),
            "dropped": dropped,
            "u": uniform[6],
            "vae_noise": torch.randn(shape, generator=generator),
            "eps": torch.randn(shape, generator=generator),
        }
        if self.routing:
            draws["kept"] = self.routing.draw(*moments.shape[1:], generator)  # the last draw: routing changes none of the others
        return draws


def batches(
    data: CachedSamples, stream: Stream, shares: dict[int, float], start: int, stop: int,
    accumulation: int, rank: int, world: int, workers: int,
) -> Iterator[Batch]:  # fmt: skip
    """Yields this rank's micro-batches of optimizer steps start ... stop - 1, `accumulation` of them a step.

    Rank r's micro-batch m of a step is the slice [m W + r, m W + r + 1) * G / (W accumulation) of the global batch.
    """
    micro = stream.batch_size // (world * accumulation)

    def requests() -> Iterator[tuple[list[tuple[int, int]], int]]:
        for step in range(start, stop):
            members, length = stream.positions(step), stream.choose(step, shares)
            for m in range(accumulation):
                first = (m * world + rank) * micro
                yield members[first : first + micro], length

    yield from DataLoader(
        data, sampler=requests(), batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None, persistent_workers=False
    )
