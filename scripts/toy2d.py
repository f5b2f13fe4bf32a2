"""Flow matching in the plane: train a small network, and see what the lecture notes draw.

    python scripts/toy2d.py                               # the checkerboard; under a minute on two CPU cores
    python scripts/toy2d.py 8gaussians moons --steps 8000
    python scripts/toy2d.py --coupling optimal_transport --schedule cosine
    python scripts/toy2d.py --reflow 2                    # and what reflow does to few steps, twice: a table besides

For each data set one picture, OUT/toy2d-NAME.png, and four numbers. The picture's rows:
    1  the conditional path p_t(x|z) of one datum z, in time                          (notes, figure 5, top)
    2  the marginal path p_t(x), in time                                              (figure 5, bottom; figure 7, top)
    3  samples of the trained network's ODE, in time: row 2 if it has learnt          (figure 7, bottom)
    4  the conditional path: draws of it, its ODE, its SDE, and their trajectories    (figures 6 and 9, top)
    5  the same for the marginal path and the trained network                         (figures 6 and 9, bottom)
The numbers: W2, the Wasserstein distance of samples to fresh data, beside that of data to data, which is what chance leaves;
the path energy and its excess over the least possible one; and log p of fresh data under the model.

--reflow K (Liu et al. 2022): a network of the linear path is trained anew on pairs of noise and what the one before carries it to, K times;
and, from each of them all, one on the single step from the noise to the end of its pair. The table: how much of the paths' energy is
bending, and W2 of samples in 1, 2, 4 and 8 steps of Euler's method.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from latentfm import flow

FEW = (1, 2, 4, 8)  # steps
SHOWN_TIMES = (0.0, 0.25, 0.5, 0.75, 1.0)
Draw = Callable[[int, torch.Generator], Tensor]  # count points of a data set
LEFT_OUT = 1e-3  # of the conditional path, whose velocity is singular at t = 1


def checkerboard(count: int, generator: torch.Generator) -> Tensor:
    """Points [count, 2], uniform on the eight dark squares of a 4 x 4 board of side 8."""
    column = torch.randint(4, (count,), generator=generator)
    row = 2 * torch.randint(2, (count,), generator=generator) + column % 2
    return 2 * (torch.stack([column, row], dim=1) + torch.rand(count, 2, generator=generator)) - 4


def eight_gaussians(count: int, generator: torch.Generator) -> Tensor:
    """Points [count, 2] of eight Gaussians of variance 0.1 around a circle of radius 5."""
    angle = torch.randint(8, (count,), generator=generator) * (math.pi / 4)
    return 5 * torch.stack([angle.cos(), angle.sin()], dim=1) + math.sqrt(0.1) * torch.randn(count, 2, generator=generator)


def two_moons(count: int, generator: torch.Generator) -> Tensor:
    """Points [count, 2] of two interlocking half circles of radius 3, with noise of deviation 0.3."""
    angle = math.pi * torch.rand(count, generator=generator)
    upper = torch.rand(count, generator=generator) < 0.5
    arc = torch.stack([angle.cos(), angle.sin()], dim=1)
    points = torch.where(upper[:, None], arc, torch.tensor([1.0, 0.5]) - arc)
    return 3 * (points - torch.tensor([0.5, 0.25])) + 0.3 * torch.randn(count, 2, generator=generator)


DATA: dict[str, Draw] = {
    "checkerboard": checkerboard,
    "8gaussians": eight_gaussians,
    "moons": two_moons,
}


class Velocity(nn.Module):
    """A small perceptron u(x [B, 2], t) -> [B, 2], of the size of the articles'; t is [B] or one scalar for all."""

    def __init__(self, width: int = 192):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([x, t.expand(len(x))[:, None]], dim=1))


def train(
    data: Draw,
    coupling: Callable[[Tensor, Tensor], Tensor],
    schedule: flow.Schedule,
    steps: int,
    batch: int,
    seed: int,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Velocity:
    """A network trained by Algorithm 3 of the notes; `on_step` is told the step and the loss every 100 steps."""
    generator = torch.Generator().manual_seed(seed)

    def draw_batch() -> tuple[Tensor, Tensor, Tensor]:
        z = data(batch, generator)
        eps = coupling(z, torch.randn(z.shape, generator=generator))
        t = torch.rand(batch, generator=generator)
        x_t, velocity = flow.sample_path(z, eps, t, schedule)
        return x_t, t, velocity

    return fit(draw_batch, steps, seed, on_step)


def fit(
    draw_batch: Callable[[], tuple[Tensor, Tensor, Tensor]],
    steps: int,
    seed: int,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    start: Velocity | None = None,
) -> Velocity:
    """A network fitted to batches of x_t, t and the velocity to predict there; it begins as `start` is, or anew."""
    torch.manual_seed(seed)
    network = Velocity()
    if start is not None:
        network.load_state_dict(start.state_dict())
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.0, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(1, steps + 1):
        x_t, t, velocity = draw_batch()
        loss = flow.cfm_loss(network(x_t, t), velocity).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        if step % 100 == 0:
            on_step(step, loss.item())
    return network.eval().requires_grad_(False)


def walk(field: flow.Field, x: Tensor, grid: Tensor, diffusion: flow.Diffusion | None = None) -> Tensor:
    """The states at every time of the grid, [n + 1, B, 2]: by the ODE, or with a diffusion by the SDE (notes, Theorem 17)."""
    states = [x]

    def remember(_: int, __: Tensor, state: Tensor) -> None:
        states.append(state)

    if diffusion is None:
        flow.integrate(field, x, grid, on_step=remember)
    else:
        flow.integrate_sde(field, x, grid, diffusion, generator=torch.Generator().manual_seed(9), on_step=remember)
    return torch.stack(states)


PAIRS, CARRIED = 100_000, 50  # of a round, and the steps of the midpoint method that make them


def reflowed(teacher: Velocity, steps: int, batch: int, seed: int, one_step: bool = False) -> Velocity:
    """A network trained on pairs of noise and what the teacher's flow carries it to; of one step at t = 0 alone."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(PAIRS, 2, generator=generator)
    pairs = flow.reflow_pairs(teacher, noise, flow.uniform_grid(CARRIED), flow.Midpoint())

    def draw_batch() -> tuple[Tensor, Tensor, Tensor]:
        chosen = torch.randint(PAIRS, (batch,), generator=generator)
        t = torch.zeros(batch) if one_step else torch.rand(batch, generator=generator)
        x_t, velocity = flow.sample_path(pairs.z[chosen], pairs.eps[chosen], t)
        return x_t, t, velocity

    return fit(draw_batch, steps, seed, start=teacher)


def few_steps(network: Velocity, data: Draw, points: int = 2048, seed: int = 1) -> tuple[float, list[float]]:
    """(The share of the path energy that is bending, W2 of samples in 1, 2, 4 and 8 steps of Euler's method to fresh data.)"""
    generator = torch.Generator().manual_seed(seed)
    fresh, start = data(points, generator), torch.randn(points, 2, generator=generator)
    paths = flow.measure_paths(network, start, flow.uniform_grid(100), flow.Midpoint())
    found = [flow.wasserstein2(flow.integrate(network, start, flow.uniform_grid(steps)), fresh).item() for steps in FEW]
    return (paths.straightness.mean() / paths.energy.mean()).item(), found


def tell_few_steps(network: Velocity, data: Draw, rounds: int, steps: int, batch: int, seed: int) -> None:
    """Prints the table of --reflow."""

    def row(name: str, network: Velocity) -> None:
        bending, found = few_steps(network, data)
        print(f"{name:22}{bending:>9.2%}" + "".join(f"{w2:>9.3f}" for w2 in found), flush=True)

    print(f"{'':22}{'bending':>9}" + "".join(f"{f'W2 in {count}':>9}" for count in FEW))
    row("flow matching", network)
    row("  one step of it", reflowed(network, steps, batch, seed + 100, one_step=True))
    for number in range(1, rounds + 1):
        network = reflowed(network, steps, batch, seed + number)
        row(f"reflow {number}", network)
        row("  one step of it", reflowed(network, steps, batch, seed + 100 + number, one_step=True))


def measure(network: Velocity, data: Draw, points: int = 2048, seed: int = 1) -> dict[str, float]:
    """W2 and its floor, the path energy and its excess over the least, log p in nats, on `points` fresh points."""
    generator = torch.Generator().manual_seed(seed)
    fresh, other, start = data(points, generator), data(points, generator), torch.randn(points, 2, generator=generator)
    grid = flow.uniform_grid(100)
    paths = flow.measure_paths(network, start, grid, flow.Midpoint())
    likelihood = flow.log_likelihood(network, fresh[:1024], grid, flow.Midpoint())
    return {
        "w2": flow.wasserstein2(paths.x_1, fresh).item(),
        "w2_data": flow.wasserstein2(other, fresh).item(),
        "energy": paths.energy.mean().item(),
        "npe": flow.normalized_path_energy(paths.energy, flow.wasserstein2(start, other)).item(),
        "log_p": likelihood.log_p.mean().item(),
    }


def draw(name: str, network: Velocity, data: Draw, schedule: flow.Schedule, path: Path) -> None:
    """Write the picture described at the top of this file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    generator = torch.Generator().manual_seed(2)
    count, few = 20_000, 60
    z, eps = data(count, generator), torch.randn(count, 2, generator=generator)
    datum = z[:1].expand(count, 2)
    limit = 1.15 * z.abs().max().item()
    box = [[-limit, limit], [-limit, limit]]
    grid = flow.uniform_grid(100)
    figure, axes = plt.subplots(5, 5, figsize=(15, 15.5), layout="constrained")

    def histogram(axis, points: Tensor, title: str) -> None:
        axis.hist2d(*points.T.numpy(), bins=100, range=box, cmap="magma")
        axis.set_title(title, fontsize=10)

    def moment(points: Tensor, t: float) -> Tensor:
        return flow.sample_path(points, eps, torch.full((count,), t), schedule).x_t

    learnt = walk(network, eps, grid)
    for column, t in enumerate(SHOWN_TIMES):
        histogram(axes[0, column], moment(datum, t), f"conditional path, t = {t:g}")
        histogram(axes[1, column], moment(z, t), f"marginal path, t = {t:g}")
        histogram(axes[2, column], learnt[int(t * 100)], f"the network's ODE, t = {t:g}")

    def conditional(x: Tensor, t: Tensor) -> Tensor:
        return flow.conditional_velocity(x, z[:1].expand_as(x), t, schedule)

    colours = plt.get_cmap("viridis")
    for row, (field, target) in enumerate(((conditional, datum), (network, z)), start=3):
        label = "conditional" if row == 3 else "marginal"
        stop = flow.uniform_grid(300)
        stop = stop * (1 - LEFT_OUT) if row == 3 else stop
        ode = walk(field, eps[:1000], stop)
        sde = walk(field, eps[:1000], stop, flow.PowerOfBeta(1.0))
        truth = torch.stack([moment(target, t)[:1000] for t in SHOWN_TIMES])
        at_times = [round(t * 300) for t in SHOWN_TIMES]
        for column, (states, title) in enumerate(((truth, "drawn"), (ode[at_times], "ODE"), (sde[at_times], "SDE"))):
            for place, t in enumerate(SHOWN_TIMES):
                axes[row, (0, 1, 3)[column]].scatter(*states[place].T.numpy(), s=1, color=colours(t), label=f"t = {t:g}")
            axes[row, (0, 1, 3)[column]].set_title(f"{label} path: {title}", fontsize=10)
        for column, states in ((2, ode), (4, sde)):
            axes[row, column].scatter(*target[:1000].T.numpy(), s=1, color="tab:blue", alpha=0.3)
            for i in range(few):
                axes[row, column].plot(*states[:, i].T.numpy(), linewidth=0.5, color="black", alpha=0.6)
            axes[row, column].scatter(*states[0, :few].T.numpy(), s=4, color="tab:red", zorder=3)
            axes[row, column].set_title(f"{label} path: {'ODE' if column == 2 else 'SDE'} trajectories", fontsize=10)
        axes[row, 0].legend(markerscale=6, fontsize=7, loc="upper right")
    for axis in axes.flat:
        axis.set(xlim=box[0], ylim=box[1], xticks=[], yticks=[], aspect="equal")
    figure.suptitle(f"{name}: data, paths and a trained flow", fontsize=13)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*", metavar="DATA", default=["checkerboard"], help=f"{', '.join(DATA)}; the first if none is named")
    parser.add_argument("--schedule", choices=flow.SCHEDULES, default="condot")
    parser.add_argument("--coupling", choices=flow.COUPLINGS, default="independent", help="which noise goes with which datum")
    parser.add_argument("--reflow", type=int, default=0, metavar="K", help="rounds of reflow after it; with --schedule condot")
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/toy2d"), help="folder of the pictures")
    options = parser.parse_args()
    for name in options.data:
        if name not in DATA:
            parser.error(f"unknown data {name!r}; there are {', '.join(DATA)}")
    for name in ("steps", "batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.reflow < 0 or (options.reflow and options.schedule != "condot"):
        parser.error("--reflow takes 0 rounds or more, and straight lines: --schedule condot")
    options.out.mkdir(parents=True, exist_ok=True)
    schedule = flow.SCHEDULES[options.schedule]()
    for name in options.data:
        began = time.monotonic()

        def say(step: int, loss: float, name: str = name) -> None:
            print(f"\r{name}: step {step}/{options.steps} loss {loss:.3f} ", end="", flush=True)

        network = train(DATA[name], flow.COUPLINGS[options.coupling], schedule, options.steps, options.batch, options.seed, say)
        trained = time.monotonic() - began
        found = measure(network, DATA[name])
        path = options.out / f"toy2d-{name}.png"
        draw(name, network, DATA[name], schedule, path)
        print(
            f"\r{name}: W2 {found['w2']:.3f} (data to data {found['w2_data']:.3f}), path energy {found['energy']:.2f} "
            f"(excess over the least {found['npe']:.1%}), log p {found['log_p']:.3f} nats; "
            f"trained in {trained:.0f} s, all in {time.monotonic() - began:.0f} s; {path}"
        )
        if options.reflow:
            tell_few_steps(network, DATA[name], options.reflow, options.steps, options.batch, options.seed)


if __name__ == "__main__":
    main()
