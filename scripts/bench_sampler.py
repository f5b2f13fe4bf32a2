"""What a guided Euler step costs outside the network, beside diffusers' own loop.

    python scripts/bench_sampler.py                     # seconds on a CPU
    python scripts/bench_sampler.py --device cuda

The network is replaced by one that hands back its input, for a latent of 1 x 16 x 16 x 16; all else is what the pipelines do at
each step: batch the two halves of the guidance, make the timestep, combine, step. Both loops take turns; printed is the median
of the repeats, in microseconds a step, and their ratio. On a GPU the loops are timed without waiting for the device, which is the
cost to the host; a check that ours never waits for it runs first.
"""

import argparse
import statistics
import time

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from latentfm import flow
from latentfm.models.text import Condition
from latentfm.models.velocity import velocity

SCALE = 5.0


class Echo(nn.Module):
    """A network that costs nothing: its prediction is its input."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, hidden_states: Tensor, **_: Tensor | bool) -> tuple[Tensor]:
        return (hidden_states,)


def ours(network: Echo, latents: Tensor, condition: Condition, steps: int) -> Tensor:
    """LatentFMPipeline's loop."""

    def field(x: Tensor, t: Tensor) -> Tensor:
        unconditional, conditional = velocity(network, torch.cat([x, x]), t, condition).chunk(2)
        return flow.classifier_free(conditional, unconditional, SCALE)

    return flow.integrate(field, latents, flow.diffusers_grid(steps, 3.0))


def theirs(network: Echo, latents: Tensor, condition: Condition, steps: int) -> Tensor:
    """StableDiffusion3Pipeline's loop."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps, device=latents.device)
    for t in scheduler.timesteps:
        both = torch.cat([latents] * 2)
        prediction = network(
            hidden_states=both,
            timestep=t.expand(both.shape[0]),
            encoder_hidden_states=condition.embeds,
            pooled_projections=condition.pooled,
            return_dict=False,
        )[0]
        unconditional, conditional = prediction.chunk(2)
        prediction = unconditional + SCALE * (conditional - unconditional)
        latents = scheduler.step(prediction, t, latents, return_dict=False)[0]
    return latents


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=21)
    options = parser.parse_args()
    device = torch.device(options.device)
    network = Echo().to(device)
    latents = torch.randn(1, 16, 16, 16, device=device, generator=torch.Generator(device).manual_seed(0))
    condition = Condition(torch.zeros(2, 32, 320, device=device), torch.zeros(2, 320, device=device))
    results = {loop.__name__: loop(network, latents, condition, options.steps) for loop in (ours, theirs)}
    difference = (results["ours"] - results["theirs"]).abs().max() / results["theirs"].abs().max()
    print(f"largest difference of the results, relative: {difference.item():.1e}")
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        ours(network, latents, condition, options.steps)
        torch.cuda.set_sync_debug_mode("default")
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(options.repeats):
        for loop in (ours, theirs):
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            loop(network, latents, condition, options.steps)
            times[loop.__name__].append((time.perf_counter() - began) / options.steps * 1e6)
    own, peer = (statistics.median(times[name]) for name in ("ours", "theirs"))
    print(f"a guided Euler step outside the network: ours {own:.1f} us, diffusers {peer:.1f} us, ratio {peer / own:.2f}")


if __name__ == "__main__":
    main()
