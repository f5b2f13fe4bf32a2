"""Pairs of noise and the latents that a teacher draws from it, for reflow (Liu et al. 2022, "Flow Straight and Fast"; InstaFlow).

Pair i has the i-th prompt, counted round, and noise that is a function of (seed, i) alone, so that only the latents are kept: in the
cache, under the hash of the teacher, its sampler, the prompt and the noise. Who makes them, how many at a time, in which order and after
how many stops leaves no trace.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from latentfm.config import DataOptions
from latentfm.data.buckets import DataPlan
from latentfm.data.cache.fill import Job
from latentfm.data.cache.processes import ONE_PROCESS, Processes
from latentfm.data.cache.stat_cache import StatCache
from latentfm.data.cache.store import key_of
from latentfm.data.cached import CachedData, CachedReader
from latentfm.data.inventory import Inventory
from latentfm.data.loader import Batch, Draws, Dropout, Reader, Request, Routing
from latentfm.data.sources import Dataset, Sample
from latentfm.data.table import SampleTable
from latentfm.interchange.frozen import FrozenModels
from latentfm.models.text import PromptParts
from latentfm.randomness import generator


class Teacher(Protocol):
    """What makes pairs; `fingerprint` is a hash of all that decides what it draws."""

    fingerprint: str

    def draw(self, prompts: Sequence[str], noise: Tensor) -> Tensor:
        """The latents [B, C, h, w], on the CPU, that its flow carries the noise of that shape to, for a prompt each."""
        ...

    def release(self) -> None:
        """Gives back its memory until it is asked again."""
        ...


def pair_noise(seed: int, number: int, shape: Sequence[int]) -> Tensor:
    """The noise of pair `number`, float32 of `shape`, standard normal."""
    return torch.randn(*shape, generator=generator(seed, "pair", number))


def pair_dataset(prompts: Sequence[str], count: int, file: Path) -> Dataset:
    """The pairs as samples: their numbers are their ids, their prompts their captions."""
    return Dataset(file, tuple(Sample(file, (prompts[number % len(prompts)],), str(number)) for number in range(count)), ())


class PairInventory(Inventory):
    """Samples without a picture, all of one shape."""

    def find_digests(self, processes: Processes, kept: StatCache) -> None:
        """Nothing: there is no file."""
        self.digests, self.mask_digests = {sample.id: "" for sample in self.dataset.samples}, {}

    def reason(self, sample: Sample) -> str:
        """Why a pair is of no use."""
        return f"pair {sample.id}: the teacher's latents are not finite numbers"


class PairData(CachedData):
    """Pairs, made by `teacher` where the cache has them not."""

    def __init__(
        self, dataset: Dataset, plan: DataPlan, models: FrozenModels, options: DataOptions, teacher: Teacher,
        processes: Processes = ONE_PROCESS,
    ):  # fmt: skip
        inventory = PairInventory(dataset, plan, processes=processes)
        super().__init__(inventory, models, options, sorted(plan.t5_lengths), processes)
        (width, height), channels = plan.buckets.shapes[0], models.outline.config.latent_channels
        self.shape = (channels, height // plan.factor, width // plan.factor)
        self.teacher, self.seed = teacher, options.pairs.seed

    def image_key(self, sample: Sample, flip: bool) -> str:
        """The key of a pair's latents."""
        noise = (str(self.seed), sample.id, str(self.shape))
        return key_of("pair", self.teacher.fingerprint, *noise, sample.captions[0], self.options.cache_dtype)

    def jobs(self) -> list[Job]:
        pairs = [(self.image_key(sample, False), (int(sample.id), sample.captions[0])) for sample in self.samples]
        return [*self.caption_jobs(), Job("pairs", pairs, self.make_pairs, self.options.pairs.at_once)]

    def make_pairs(self, items: Sequence[tuple[int, str]]) -> list[dict[str, Tensor] | None]:
        """The entries of (number, prompt) pairs; None of one whose latents are not finite."""
        # always as many: a pair made again has the bits it had, whatever else was missing then
        padded = [*items, *[items[0]] * (self.options.pairs.at_once - len(items))]
        noise = torch.stack([pair_noise(self.seed, number, self.shape) for number, _ in padded])
        found = self.teacher.draw([prompt for _, prompt in padded], noise)[: len(items)]
        dtype = getattr(torch, self.options.cache_dtype)
        return [{"latents": latents.to(dtype)} if torch.isfinite(latents).all() else None for latents in found]

    def release(self) -> None:
        """Gives back the teacher too."""
        super().release()
        self.teacher.release()

    def identity(self) -> dict[str, str]:
        return super().identity() | {"pictures": key_of(*(self.image_key(sample, False) for sample in self.samples))}

    def reader(self, seed: int, dropout: Dropout, routing: Routing | None = None) -> Reader:
        table, latents = SampleTable.of(self.samples), self.entries(self.keys(self.image_key, self.samples))
        noise = partial(pair_noise, self.seed)
        return PairReader(table, Draws(seed, dropout, routing=routing), latents, self.caption_entries(table), noise=noise)


class PairReader(CachedReader):
    """Micro-batches of pairs: what is drawn for each besides is as of pictures. noise(number, shape) is a pair's."""

    def __init__(self, *parts: object, noise: Callable[[int, Sequence[int]], Tensor]):
        super().__init__(*parts)
        self.noise = noise

    def __getitem__(self, request: Request) -> Batch:
        members, t5_length = request
        latents = self.moments.stack([index for _, index, _ in members])["latents"].float()
        batch, captions, _ = self.draws.make(self.table, members, latents.shape[1:])
        return replace(
            batch,
            latents=latents,
            eps=torch.stack([self.noise(int(name), latents.shape[1:]) for name in batch.ids]),
            parts=PromptParts(**self.prompts[t5_length].stack(captions)),
            t5_length=t5_length,
        )
