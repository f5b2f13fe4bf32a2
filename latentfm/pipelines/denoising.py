"""From noise to latents: the guided velocity that a call integrates, and the steps through it, by a solver or a scheduler."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentfm.errors import InputError
from latentfm.models.mmdit import MMDiT
from latentfm.models.schedule import Precomputed
from latentfm.models.text import Condition
from latentfm.models.velocity import time_at, timesteps, velocity
from latentfm.pipelines.arguments import names, real_number, tensor, told, whole_number
from latentfm.sampling import Sampler, set_timesteps

if TYPE_CHECKING:
    from latentfm.pipelines.starting import Kept
    from latentfm.pipelines.text_to_image import LatentFMPipeline


@dataclass(frozen=True)
class SkipLayers:
    """SD3.5's skip-layer guidance: away from what the network says without some of its blocks, over a part of the steps.

    layers: the blocks left out. start, stop: the step after which it works, and the one before which.
    """

    layers: list[int]
    start: float
    stop: float

    @classmethod
    def of(cls, layers: Any, start: Any, stop: Any, steps: int, network: torch.nn.Module) -> "SkipLayers | None":
        """The guidance of a run of so many steps, start and stop being shares of it; None for no layers. Raises InputError."""
        first = steps * real_number("skip_layer_guidance_start", start, "from 0 to 1")
        last = steps * real_number("skip_layer_guidance_stop", stop, "from 0 to 1")
        if layers is None:
            return None
        blocks = len(network.transformer_blocks)
        if not isinstance(layers, list | tuple):
            raise InputError(f"skip_guidance_layers must be a list of blocks, as [7, 8, 9], not {told(layers)}")
        return cls([whole_number("skip_guidance_layers", layer, least=0, most=blocks - 1) for layer in layers], first, last)


class GuidedVelocity:
    """The field that a call's solver integrates: the network's velocity at (x, t) for the condition, guided as the sampler says.

    condition: of a guided call the rows guided against, then the prompts'; with a reference network the prompts' alone.
    attention: joint_attention_kwargs, whose tensors have the condition's rows. channels [B, ...]: what an inpainting network reads behind
    the latents' own channels.
    """

    def __init__(
        self,
        pipe: "LatentFMPipeline",
        sampler: Sampler,
        times: "Times",
        condition: Condition,
        reference: torch.nn.Module | None = None,
        skip: SkipLayers | None = None,
        attention: dict[str, Any] | None = None,
        channels: Tensor | None = None,
    ):
        self.pipe, self.sampler, self.condition, self.reference, self.skip = pipe, sampler, condition, reference, skip
        self.times, self.attention, self.channels = times, attention, channels
        self.step = 0  # of the run; whoever makes the steps counts
        self.denoised: Tensor | None = None  # the estimate of x_1 when it was last asked
        self.precomputed = self.precompute()

    def precompute(self) -> Precomputed | None:
        """What an MMDiT will compute once for all the times it is asked at; None for another network."""
        return Precomputed(self.times.timesteps.float()) if isinstance(self.pipe.transformer, MMDiT) else None

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
        still = self.pipe.interrupt or self.step < self.sampler.zero_init
        found = torch.zeros_like(x) if still else self.guided(x, t)
        self.denoised = x + (1.0 - t) * found
        return found

    def guided(self, x: Tensor, t: Tensor) -> Tensor:
        """The guided velocity at (x, t)."""
        pipe, sampler = self.pipe, self.sampler
        guiding = pipe.do_classifier_free_guidance and sampler.guides_at(t)  # asked at each step, since a callback may end it
        with self.cache():
            if guiding and self.reference is None:
                weaker, conditional = self.ask(pipe.transformer, torch.cat([x, x]), t, self.condition).chunk(2)
            else:
                conditional = self.ask(pipe.transformer, x, t, self.condition)
        if not guiding:
            return conditional
        if self.reference is not None:
            weaker = self.ask(self.reference, x, t, self.condition)
        found = sampler.guided(conditional, weaker, x, t, pipe.guidance_scale)
        if self.skip is None or not self.skip.start < self.step < self.skip.stop:
            return found
        without = self.ask(pipe.transformer, x, t, self.condition, skip_layers=self.skip.layers)
        return found + pipe.skip_layer_guidance_scale * (conditional - without)

    def ask(self, network: torch.nn.Module, x: Tensor, t: Tensor, condition: Condition, **extra: Any) -> Tensor:
        """The network's velocity for the last rows of the condition, as many as x has: the prompts' where x is no guided batch."""
        self.pipe._evaluations += network is self.pipe.transformer
        whole = len(condition.embeds) == len(x)
        if whole and network is self.pipe.transformer and not extra:
            extra["precomputed"] = self.precomputed
        if self.attention:
            extra["joint_attention_kwargs"] = {name: last_rows(value, len(x)) for name, value in self.attention.items()}
        if self.channels is not None:
            x = torch.cat([x, self.channels.repeat(len(x) // len(self.channels), 1, 1, 1)], dim=1)
        rows = condition if whole else Condition(last_rows(condition.embeds, len(x)), last_rows(condition.pooled, len(x)))
        return velocity(network, x, t, rows, **extra)


@dataclass(frozen=True)
class Times:
    """The times of a run, to which the pipeline's scheduler is set.

    timesteps: every one that the network will be asked at, as far as is known. grid: the times t of the steps for a solver of ours, or None
    where the scheduler makes them. first: the place in the scheduler's timesteps where the run begins. steps: how many it makes.
    """

    timesteps: Tensor
    grid: Tensor | None
    first: int
    steps: int

    @classmethod
    def of(
        cls, pipe: "LatentFMPipeline", sampler: Sampler, tokens: int, left_out: int, sigmas: Any = None, mu: float | None = None
    ) -> "Times":
        """The times of a run of `sampler` for a picture of so many tokens, the first `left_out` steps of it left out."""
        scheduler = pipe.scheduler
        if sampler.by_scheduler:
            set_timesteps(scheduler, sampler.num_inference_steps, tokens, sigmas, mu)
            grid, first = None, left_out * getattr(scheduler, "order", 1)
            asked = scheduler.timesteps[first:]
        else:
            grid, first = sampler.grid(scheduler, tokens, sigmas, mu)[left_out:], left_out
            asked = timesteps(sampler.times(grid))
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        return cls(asked, grid, first, len(scheduler.timesteps) - first)

    def reversed(self) -> "Times":
        """The same run from data to noise, for a solver of ours."""
        return replace(self, grid=self.grid.flip(0))


# on_step(i, timestep, x): called after step i with the timestep it began at and the state reached; what it returns replaces the state
OnStep = Callable[[int, Tensor, Tensor], Tensor]


def integrate(
    pipe: "LatentFMPipeline", sampler: Sampler, times: Times, field: GuidedVelocity, x: Tensor, generator: Any, on_step: OnStep
) -> Tensor:
    """The state at the end of a run, in float32, given x at its beginning.

    Any flow-matching scheduler of diffusers' makes the steps where it is its run: asked, as in StableDiffusion3Pipeline, with eps - z at
    its own timesteps, and drawing what noise it needs from torch's global generator. `generator` is for the noise of an SDE of ours.
    """
    scheduler = pipe.scheduler
    if times.grid is not None:

        def after(i: int, t: Tensor, x: Tensor) -> Tensor | None:
            field.step, scheduler._step_index = i + 1, times.first + i + 1
            return None if pipe.interrupt else on_step(i, timesteps(times.grid[i]), x)

        return sampler.integrate(field, x, times.grid, generator, after)
    x = x.float()
    for i, timestep in enumerate(scheduler.timesteps[times.first :]):
        if pipe.interrupt:
            continue
        x = scheduler.step(-field(x, time_at(timestep)), timestep, x, return_dict=False)[0]
        field.step = i + 1
        x = on_step(i, timestep, x)
    return x


# callback(pipeline, step, timestep, tensors): looks after each step, and may return other tensors for some of them
StepCallback = Callable[["LatentFMPipeline", int, Tensor, dict[str, Any]], dict[str, Any]]


@dataclass
class StepEnd:
    """What happens after each step: what is kept of a picture is put back, the bar goes on, the caller's function may change the state."""

    pipe: "LatentFMPipeline"
    field: GuidedVelocity
    times: Times
    bar: Any
    callback: StepCallback | None
    wanted: list[str]
    kept: "Kept | None"

    def __call__(self, i: int, timestep: Tensor, x: Tensor) -> Tensor:
        if self.kept is not None:
            last = i == self.times.steps - 1
            x = self.kept.put_into(x, 0.0 if last else self.pipe.scheduler.sigmas[self.times.first + i + 1].item())
        if self.pipe.num_evaluations != i + 1:
            self.bar.set_postfix(evaluations=self.pipe.num_evaluations, refresh=False)
        self.bar.update()
        return x if self.callback is None else self.answer(i, timestep, x)

    def answer(self, i: int, timestep: Tensor, x: Tensor) -> Tensor:
        """The state after the callback looked at it, in the pipeline's dtype. What it leaves alone stays float32."""
        condition = self.field.condition
        dtype, half = condition.embeds.dtype, len(condition.embeds) - len(x)  # rows guided against
        seen = x.to(dtype)
        version = seen._version
        tensors = {
            "latents": lambda: seen,
            "prompt_embeds": lambda: condition.embeds,
            "pooled_prompt_embeds": lambda: condition.pooled,
            "negative_prompt_embeds": lambda: condition.embeds[:half],
            "negative_pooled_prompt_embeds": lambda: condition.pooled[:half],
            "denoised": lambda: self.field.denoised.to(dtype),
        }
        given = {name: tensors[name]() for name in self.wanted}
        answer = self.callback(self.pipe, i, timestep, dict(given))
        answer = {} if answer is None else answer
        if not isinstance(answer, dict):
            raise InputError(f"callback_on_step_end must return a dict of tensors or nothing, not {told(answer)}")
        names("what callback_on_step_end returns", list(answer), tensors)
        changed = {name: value for name, value in answer.items() if name not in given or value is not given[name]}
        for name, value in changed.items():
            rows, *rest = tensors[name]().shape
            wanted = (None if name in ("prompt_embeds", "pooled_prompt_embeds") else rows, *rest)  # of these it may return half
            if tensor(f"{name} of callback_on_step_end", value, wanted, "as it was given") is None:
                raise InputError(f"callback_on_step_end returns None for {name}; leave it out where it does not change")
        if "denoised" in changed:
            raise InputError("callback_on_step_end returns another denoised, an estimate that nothing is drawn from; return latents")
        self.field.change(*(with_negative(changed.get(part), changed.get(f"negative_{part}"), before) for part, before in (
            ("prompt_embeds", condition.embeds), ("pooled_prompt_embeds", condition.pooled),
        )))  # fmt: skip
        latents = changed.get("latents", seen)
        return x if latents is seen and seen._version == version else latents.float()


def with_negative(rows: Tensor | None, negative: Tensor | None, before: Tensor) -> Tensor | None:
    """The rows of a guided batch, the new or those from `before`, with other rows to guide against; None where neither is new."""
    if negative is None:
        return rows
    return torch.cat([negative, (before if rows is None else rows)[len(negative) :]])


def repeated(condition: Condition, times: int, device: torch.device) -> Condition:
    """Each row `times` times, next to each other, on `device`."""
    return Condition(*(v.to(device).repeat_interleave(times, dim=0) for v in (condition.embeds, condition.pooled)))


def last_rows(value: Any, count: int) -> Any:
    """The last `count` rows of a tensor: of a guided batch, those of the prompts. Anything else as it is."""
    return value[-count:] if isinstance(value, Tensor) else value


def joined(first: Condition, second: Condition) -> Condition:
    """The rows of both, as one batch."""
    return Condition(torch.cat([first.embeds, second.embeds]), torch.cat([first.pooled, second.pooled]))
