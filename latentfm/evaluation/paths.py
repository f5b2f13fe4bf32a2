"""How straight the paths are on which a pipeline draws: what reflow improves, and what few steps need."""

from collections.abc import Sequence
from typing import Any

import torch

from latentfm import flow
from latentfm.data.pairs import pair_noise


def pipeline_paths(pipe: Any, prompts: Sequence[str], seed: int = 0, steps: int = 16, guidance: float | None = None) -> flow.PathMeasures:
    """Straightness and energy of the paths from noise to latents, one a prompt, divided by how many numbers the latents have.

    pipe: a LatentFMPipeline. guidance: its own unless given. The paths are those of Euler's method with even steps; see
    `flow.measure_paths` for what so coarse a polygon sees.
    """
    side = pipe.default_sample_size
    noise = torch.stack([pair_noise(seed, number, (pipe.latent_channels, side, side)) for number in range(len(prompts))])
    states = [noise]

    def seen(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
        states.append(tensors["latents"].float().cpu())
        return {}

    size = side * pipe.vae_scale_factor
    x_1 = pipe(
        prompt=list(prompts), latents=noise, height=size, width=size, num_inference_steps=steps, solver="euler", schedule="uniform",
        shift=1.0, output_type="latent", callback_on_step_end=seen, **({} if guidance is None else {"guidance_scale": guidance}),
    ).images  # fmt: skip
    assert len(states) == steps + 1 and torch.equal(states[-1], x_1.float().cpu())
    found = flow.measure_states(torch.stack(states), flow.uniform_grid(steps))
    numbers = noise[0].numel()
    return found._replace(straightness=found.straightness / numbers, energy=found.energy / numbers)
