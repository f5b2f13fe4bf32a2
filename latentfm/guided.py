"""The velocity that a pipeline's call integrates, and the rows of conditions that it is asked for."""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from latentfm.models.mmdit import MMDiT
from latentfm.models.schedule import Precomputed
from latentfm.models.text import Condition
from latentfm.models.velocity import timesteps, velocity
from latentfm.sampling import Sampler

if TYPE_CHECKING:
    from latentfm.pipeline import LatentFMPipeline


class GuidedVelocity:
    """The field that a call's solver integrates: the network's velocity at (x, t) for the condition, guided as the sampler says.

    condition: of a guided call the rows guided against, then the prompts'; with a reference network the prompts' alone.
    """

    def __init__(self, pipe: "LatentFMPipeline", sampler: Sampler, grid: Tensor, condition: Condition, reference: torch.nn.Module | None):
        self.pipe, self.sampler, self.condition, self.reference = pipe, sampler, condition, reference
        self.moving_from, self.times = grid[sampler.zero_init], sampler.times(grid)
        self.precomputed = self.precompute()

    def precompute(self) -> Precomputed | None:
        """What an MMDiT will compute once for all the times it is asked at; None for another network."""
        return Precomputed(timesteps(self.times)) if isinstance(self.pipe.transformer, MMDiT) else None

    def cache(self) -> AbstractContextManager[None]:
        """The context diffusers' feature caches (transformer.enable_cache) work in; nothing where none is on."""
        network = self.pipe.transformer
        return network.cache_context("guided") if getattr(network, "is_cache_enabled", False) else nullcontext()

    def change(self, embeds: Tensor | None, pooled: Tensor | None) -> None:
        """Takes on a condition that a callback gave; None is as before."""
        before = self.condition
        self.condition = Condition(before.embeds if embeds is None else embeds, before.pooled if pooled is None else pooled)
        if self.condition.embeds is not before.embeds or self.condition.pooled is not before.pooled:
            self.precomputed = self.precompute()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        pipe, sampler, network = self.pipe, self.sampler, self.pipe.transformer
        if pipe.interrupt or (sampler.zero_init and t < self.moving_from):
            return torch.zeros_like(x)
        pipe._evaluations += 1
        guiding = pipe.do_classifier_free_guidance and sampler.guides_at(t)  # asked at each step, since a callback may end it
        with self.cache():
            if guiding and self.reference is None:
                weaker, conditional = velocity(network, torch.cat([x, x]), t, self.condition, precomputed=self.precomputed).chunk(2)
            else:
                whole = len(self.condition.embeds) == len(x)
                rows = self.condition if whole else last_rows(self.condition, len(x))
                conditional = velocity(network, x, t, rows, precomputed=self.precomputed if whole else None)
        if not guiding:
            return conditional
        if self.reference is not None:
            weaker = velocity(self.reference, x, t, self.condition)
        return sampler.guided(conditional, weaker, x, t, pipe.guidance_scale)


def repeated(condition: Condition, times: int, device: torch.device) -> Condition:
    """Each row `times` times, next to each other, on `device`."""
    return Condition(*(v.to(device).repeat_interleave(times, dim=0) for v in (condition.embeds, condition.pooled)))


def last_rows(condition: Condition, count: int) -> Condition:
    """The last `count` rows: of a guided batch, those of the prompts."""
    return Condition(condition.embeds[-count:], condition.pooled[-count:])


def joined(first: Condition, second: Condition) -> Condition:
    """The rows of both, as one batch."""
    return Condition(torch.cat([first.embeds, second.embeds]), torch.cat([first.pooled, second.pooled]))
