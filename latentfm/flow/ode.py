"""Solvers of the flow's ordinary differential equation dX_t = u_t(X_t) dt (notes, eq. 10).

A solver makes one step and declares what the step costs and how accurate it is; `integrate` walks a grid with it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from latentfm.flow.fields import Field


class Solver(Protocol):
    """A one-step method: the error over an interval shrinks like the step to the power `order`."""

    order: ClassVar[int]
    evaluations_per_step: ClassVar[int]

    def step(self, field: Field, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """Returns the state at t_next, given the state x [B, ...] at t (scalar tensors)."""
        ...


@dataclass(frozen=True)
class Euler:
    """The explicit Euler method X_{t+h} = X_t + h u_t(X_t) (notes, eq. 4 and Alg. 1)."""

    order: ClassVar[int] = 1
    evaluations_per_step: ClassVar[int] = 1

    def step(self, field: Field, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """Returns x + (t_next - t) field(x, t), of x's shape; the times are scalar tensors."""
        return x + (t_next - t) * field(x, t)


_EULER = Euler()


def integrate(
    field: Field,
    x: Tensor,
    grid: Tensor,
    solver: Solver = _EULER,
    on_step: Callable[[int, Tensor, Tensor], Tensor | None] | None = None,
) -> Tensor:
    """Returns the state at the last time of the grid, given the state x at its first (notes, Alg. 1), in float32.

    The state is float32 throughout, whatever the dtype of x or of the network. The host never waits for the device
    inside the loop; the grid is checked once, before it (leave it on the CPU, where the grids are made). Gradients are
    recorded unless the caller turns them off.

    Args:
        field: the velocity u(x [B, ...], t scalar float32 tensor on x's device), of x's shape and any floating dtype.
        x: the state at grid[0], [B, ...], floating point: noise, where grid[0] = 0.
        grid: times [n + 1], n >= 1, strictly increasing (noise to data) or strictly decreasing (data to noise).
        solver: the method of each step.
        on_step: called as on_step(i, t_next, x) after step i = 0, ..., n - 1 with the time and the state reached;
            a tensor that it returns replaces the state.

    Raises:
        ValueError: the grid is not as above once in float32, x is not floating point, or the field or on_step
            returns another shape than x's.
    """
    _check_grid(grid)
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, got {x.dtype}")
    shape = x.shape

    def float32_like_x(value: Tensor, source: str) -> Tensor:
        if value.shape != shape:
            raise ValueError(f"{source} returned shape {tuple(value.shape)} for a state of shape {tuple(shape)}")
        return value.to(torch.float32)

    def velocity(state: Tensor, t: Tensor) -> Tensor:
        return float32_like_x(field(state, t), "field")

    x = x.to(torch.float32)
    times = grid.to(device=x.device, dtype=torch.float32)
    for i in range(len(times) - 1):
        x = solver.step(velocity, x, times[i], times[i + 1])
        if on_step is not None:
            replacement = on_step(i, times[i + 1], x)
            if replacement is not None:
                x = float32_like_x(replacement, "on_step")
    return x


def evaluations(solver: Solver, grid: Tensor) -> int:
    """Returns how often `integrate` calls the field on this grid: the solver's cost a step times the intervals.

    Raises:
        ValueError: the grid is not one that `integrate` takes.
    """
    _check_grid(grid)
    return solver.evaluations_per_step * (len(grid) - 1)


def _check_grid(grid: Tensor) -> None:
    """Returns nothing; raises ValueError unless the grid is two times or more, finite and strictly monotone."""
    if grid.ndim != 1 or len(grid) < 2 or not grid.is_floating_point():
        raise ValueError(f"grid must be [n + 1] floating-point times, n >= 1, got {grid.dtype} {tuple(grid.shape)}")
    steps = grid.to(torch.float32).diff()
    if not (torch.isfinite(grid).all() and ((steps > 0).all() or (steps < 0).all())):
        raise ValueError(f"grid must be finite and strictly monotone in float32, got {grid.tolist()}")
