"""latentfm.flow beside torchcfm and Meta's flow_matching: the same network, budget and seeds, in one process.

    pip install --no-deps torchcfm flow_matching && pip install POT torchdiffeq     # the peers; without their notebooks' needs
    python scripts/bench_toy2d.py                                                  # minutes on two CPU cores

Every library makes the training batches its own way and the rest is shared: data, network, optimizer, sampler, measurements
(those of toy2d.py). The order of the libraries rotates with the seed. Printed, as the mean over the seeds and their standard deviation:
W2 to fresh data, path energy, excess energy (NPE), and seconds per 1,000 training steps; last, the ratio of ours to the best
peer. flow_matching has no optimal transport coupling; there it is left out.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import toy2d
from torch import Tensor

from latentfm import flow

# batch(z, eps): the network's input x_t and t, and its target
Batch = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def ours(coupling: str) -> Batch:
    couple = flow.COUPLINGS[coupling]

    def batch(z: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = torch.rand(len(z))
        x_t, velocity = flow.sample_path(z, couple(z, eps), t)
        return x_t, t, velocity

    return batch


def torchcfm(coupling: str) -> Batch:
    from torchcfm import ConditionalFlowMatcher, ExactOptimalTransportConditionalFlowMatcher

    matcher = {"independent": ConditionalFlowMatcher, "optimal_transport": ExactOptimalTransportConditionalFlowMatcher}[coupling](sigma=0.0)

    def batch(z: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t, x_t, velocity = matcher.sample_location_and_conditional_flow(eps, z)
        return x_t, t, velocity

    return batch


def flow_matching(coupling: str) -> Batch | None:
    if coupling != "independent":
        return None
    from flow_matching.path import AffineProbPath
    from flow_matching.path.scheduler import CondOTScheduler

    path = AffineProbPath(scheduler=CondOTScheduler())

    def batch(z: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = torch.rand(len(z))
        sample = path.sample(x_0=eps, x_1=z, t=t)
        return sample.x_t, t, sample.dx_t

    return batch


LIBRARIES = {"latentfm": ours, "torchcfm": torchcfm, "flow_matching": flow_matching}


def train(batch_of: Batch, data: toy2d.Draw, steps: int, size: int, seed: int) -> tuple[toy2d.Velocity, float]:
    """(The trained network, seconds per 1,000 steps.)"""
    generator = torch.Generator().manual_seed(seed)
    started: list[float] = []  # when each step began: making the network and its optimizer is not counted

    def draw_batch() -> tuple[Tensor, Tensor, Tensor]:
        started.append(time.perf_counter())
        return batch_of(data(size, generator), torch.randn(size, 2, generator=generator))

    network = toy2d.fit(draw_batch, steps, seed)
    return network, (time.perf_counter() - started[0]) / steps * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*", metavar="DATA", default=["8gaussians", "moons"], help=f"of {', '.join(toy2d.DATA)}")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    for name in options.data:
        if name not in toy2d.DATA:
            parser.error(f"unknown data {name!r}; there are {', '.join(toy2d.DATA)}")
    for name in options.data:
        for coupling in flow.COUPLINGS:
            makers = {library: made for library, make in LIBRARIES.items() if (made := make(coupling)) is not None}
            rows: dict[str, list[dict[str, float]]] = {library: [] for library in makers}
            order = list(makers)
            for seed in range(options.seeds):
                for library in order[seed % len(order) :] + order[: seed % len(order)]:
                    network, seconds = train(makers[library], toy2d.DATA[name], options.steps, options.batch, seed)
                    rows[library].append(toy2d.measure(network, toy2d.DATA[name], seed=1000 + seed) | {"seconds": seconds})
                    print(f"\r{name}, {coupling}: seed {seed + 1}/{options.seeds}, {library:14}", end="", flush=True)
            print(f"\r{name}, {coupling} coupling, {options.steps} steps of {options.batch}, {options.seeds} seeds" + " " * 20)
            shown = {"w2": "W2", "energy": "path energy", "npe": "NPE", "seconds": "s per 1,000 steps"}
            print(f"  {'':15}" + "".join(f"{title:>20}" for title in shown.values()))
            means = {}
            for library, found in rows.items():
                cells = []
                for key in shown:
                    values = [row[key] for row in found]
                    means[library, key] = statistics.mean(values)
                    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
                    cells.append(f"{means[library, key]:.3f} +- {spread:.3f}")
                print(f"  {library:15}" + "".join(f"{cell:>20}" for cell in cells))
            ratios = [means["latentfm", key] / min(means[library, key] for library in rows if library != "latentfm") for key in shown]
            print(f"  {'ours / best':15}" + "".join(f"{ratio:>20.2f}" for ratio in ratios), flush=True)
            print(f"  data to data W2: {statistics.mean(row['w2_data'] for row in rows['latentfm']):.3f}")


if __name__ == "__main__":
    main()
