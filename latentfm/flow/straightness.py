"""How straight a flow's paths are, and how far from the shortest: what reflow improves and optimal transport attains.

A path that is straight and run at constant speed is followed exactly by one Euler step. Three numbers say how near to that
a flow is, all in squared units of the data, summed over its dimensions:

    straightness  S  = E integral_0^1 |(X_1 - X_0) - u_t(X_t)|^2 dt       (Liu et al. 2022, "Flow Straight and Fast", eq. 3)
    path energy   PE = E integral_0^1 |u_t(X_t)|^2 dt                     (Tong et al. 2023, arXiv 2302.00482)
    W_2^2            = the least E|X_1 - X_0|^2 of all the ways to pair noise with data

They are one ladder: since the integral of u is X_1 - X_0, PE = E|X_1 - X_0|^2 + S, and E|X_1 - X_0|^2 >= W_2^2. Paths may so
be straight (S = 0) without being the shortest; PE = W_2^2 says that they are both (Benamou and Brenier 2000).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from latentfm.flow.coupling import optimal_transport
from latentfm.flow.fields import Field
from latentfm.flow.ode import RK4, Solver, integrate

_RK4 = RK4()


class PathMeasures(NamedTuple):
    """Where the paths end, x_1 [B, ...], and each path's own straightness and energy, [B]; their means are S and PE."""

    x_1: Tensor
    straightness: Tensor
    energy: Tensor


def measure_paths(field: Field, x_0: Tensor, grid: Tensor, solver: Solver = _RK4) -> PathMeasures:
    """Returns the ends, straightness and energy of the paths of a field that start at x_0.

    What is measured is the polygon through the states on the grid, its velocity on an interval being the chord's
    (x_{i+1} - x_i) / h. No evaluation of the field is added to the solver's, energy = |x_1 - x_0|^2 + straightness holds to
    rounding, and a straight path at constant speed has straightness 0 on any grid. A bent one is seen a little too
    straight, by h^2 / 12 times its mean squared acceleration: a grid of one interval sees nothing. The states are all kept.

    Args:
        field: the velocity.
        x_0: the starts, [B, ...], floating point: noise.
        grid: times [n + 1], n >= 1, increasing from 0 to 1.
        solver: the method of each step. Its error, too, enters the measures.

    Raises:
        ValueError: the grid does not run from 0 to 1 or is not one that `integrate` takes, or x_0 or the field is wrong.
    """
    if grid.ndim != 1 or len(grid) < 2 or grid[0] != 0 or grid[-1] != 1:
        raise ValueError(f"grid must run from 0 to 1, got {grid.tolist()}")
    states: list[Tensor] = []
    x_1 = integrate(field, x_0, grid, solver, on_step=lambda i, t, x: states.append(x))
    return measure_states(torch.stack([x_0.to(x_1.dtype), *states]), grid)


def measure_states(states: Tensor, grid: Tensor) -> PathMeasures:
    """Returns what `measure_paths` does of paths that were walked already: states [n + 1, B, ...] at the grid's times [n + 1].

    Raises:
        ValueError: there is not one state for each time.
    """
    if len(states) != len(grid):
        raise ValueError(f"there must be a state for each time of the grid, got {len(states)} for {len(grid)}")
    path = states.reshape(*states.shape[:2], -1)
    h = grid.diff().to(path)
    chords = path.diff(dim=0) / h[:, None, None]
    bends = (chords - (path[-1] - path[0])).square().sum(2)
    return PathMeasures(x_1=states[-1], straightness=h @ bends, energy=h @ chords.square().sum(2))


def normalized_path_energy(energy: Tensor, w2: Tensor | float) -> Tensor:
    """Returns NPE = |PE - W_2^2| / W_2^2, a scalar: 0 where the flow is the optimal transport (Tong et al. 2023).

    Args:
        energy: the energies of paths that start at draws of the noise, [B] (`measure_paths`); PE is their mean.
        w2: W_2, not squared, between noise and data: between the distributions that the flow should join, and not from
            the samples it makes. In closed form where there is one; `wasserstein2` of two finite sets of draws
            overestimates it, badly in high dimension.

    Raises:
        ValueError: w2 is not positive.
    """
    if not w2 > 0:
        raise ValueError(f"w2 must be positive, got {w2}")
    return (energy.mean() - w2**2).abs() / w2**2


def wasserstein2(a: Tensor, b: Tensor) -> Tensor:
    """Returns W_2, the root of the least mean squared distance over all ways to pair the points of a with those of b; a scalar.

    The pairing is `coupling.optimal_transport`'s, exact: seconds for a few thousand points. Float64.

    Args:
        a, b: two sets of as many points, [N, ...], floating point.

    Raises:
        ValueError: the shapes differ, or a value is not finite.
        ImportError: scipy is not installed.
    """
    a, b = a.double(), b.double()
    return (a - optimal_transport(a, b)).square().reshape(len(a), -1).sum(1).mean().sqrt()
