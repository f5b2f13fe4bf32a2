"""Solvers of the flow's ordinary differential equation dX_t = u_t(X_t) dt (notes, eq. 1 and 10).

A solver makes one step and declares what the step costs and how accurate it is; `integrate` walks a grid with it. What it
costs is counted in evaluations of the field, since each is a pass through the network and nothing else takes time:

    solver             order   evaluations a step   looks at u_t
    Euler                1             1            at the start of the step
    AdamsBashforth2      2             1            at the start of the step, and remembers the one before
    Midpoint             2             2            at the start and half way
    Heun                 2             2            at both ends
    RK4                  4             4            at the start, twice half way, and at the end

`integrate_adaptive` chooses its own steps for a tolerance. Run on a decreasing grid, from data to noise, any of them
inverts the sampling. Methods that look at the end of a step need a field that is finite there: at t = 1, the velocity of
a network that predicts velocity is, and that of one that predicts the denoiser is not (`fields.velocity_field`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from latentfm.flow.fields import Field

# step(field, x [B, ...], t, t_next): the state at t_next, given the state x at t (scalar tensors).
Step = Callable[[Field, Tensor, Tensor, Tensor], Tensor]


class Solver(Protocol):
    """A method with fixed steps: the error over an interval shrinks like the step to the power `order`."""

    order: ClassVar[int]
    evaluations_per_step: ClassVar[int]

    def stepper(self) -> Step:
        """Returns the step of one new integration: a function that may remember the steps it has made."""
        ...


class OneStep:
    """What the methods share that need no memory: their `stepper` is the method `step` itself."""

    def step(self, field: Field, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """Returns the state at t_next, of x's shape, given the state x [B, ...] at t (scalar tensors)."""
        raise NotImplementedError

    def stepper(self) -> Step:
        """Returns `step`."""
        return self.step


@dataclass(frozen=True)
class Euler(OneStep):
    """The explicit Euler method X_{t+h} = X_t + h u_t(X_t) (notes, eq. 4 and Alg. 1)."""

    order: ClassVar[int] = 1
    evaluations_per_step: ClassVar[int] = 1

    def step(self, field: Field, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """Returns x + (t_next - t) field(x, t), of x's shape; the times are scalar tensors."""
        return x + (t_next - t) * field(x, t)


@dataclass(frozen=True)
class Midpoint(OneStep):
    """The explicit midpoint method: a trial half step of Euler, and a whole step with the velocity found there."""

    order: ClassVar[int] = 2
    evaluations_per_step: ClassVar[int] = 2

    def step(self, field: Field, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """Returns x + h field(x + h/2 field(x, t), t + h/2) for h = t_next - t."""
        half = (t_next - t) / 2
        return x + (t_next - t) * field(x + half * field(x, t), t + half)


@dataclass(frozen=True)
class Heun(OneStep):
    """Heun's method: a trial step of Euler, and a whole step with the mean of the velocities at its ends (notes, after eq. 4)."""

    order: ClassVar[int] = 2
    evaluations_per_step: ClassVar[int] = 2

    def step(self, field: Field, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """Returns x + h/2 (u + field(x + h u, t_next)) for h = t_next - t and u = field(x, t)."""
        h, first = t_next - t, field(x, t)
        return x + h / 2 * (first + field(x + h * first, t_next))


@dataclass(frozen=True)
class RK4(OneStep):
    """The classical Runge-Kutta method: Simpson's rule over the step, its midpoint visited twice (Kutta 1901)."""

    order: ClassVar[int] = 4
    evaluations_per_step: ClassVar[int] = 4

    def step(self, field: Field, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """Returns x + h/6 (k1 + 2 k2 + 2 k3 + k4) for h = t_next - t."""
        h, middle = t_next - t, t + (t_next - t) / 2
        k1 = field(x, t)
        k2 = field(x + h / 2 * k1, middle)
        k3 = field(x + h / 2 * k2, middle)
        k4 = field(x + h * k3, t_next)
        return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


@dataclass(frozen=True)
class AdamsBashforth2:
    """The two-step Adams-Bashforth method: second order for the price of Euler, by remembering one velocity.

    The velocity is taken to change over this step as it did over the last one, linearly in t, and integrated:

        X_{t+h} = X_t + h (u_t + h / (2 h') (u_t - u_{t-h'}))        h' = the step before, of any length

    The first step has nothing to remember and is Euler's; its error h^2, made once, leaves the order at 2. If a state is
    replaced between two steps, the remembered velocity is still that of the old one: the order is Euler's there.
    """

    order: ClassVar[int] = 2
    evaluations_per_step: ClassVar[int] = 1

    def stepper(self) -> Step:
        """Returns a step function that remembers the last time and the velocity there."""
        past: tuple[Tensor, Tensor] | None = None

        def step(field: Field, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
            nonlocal past
            h, velocity = t_next - t, field(x, t)
            before, past = past, (t, velocity)
            if before is None:
                return x + h * velocity
            t_before, velocity_before = before
            return x + h * (velocity + h / (2 * (t - t_before)) * (velocity - velocity_before))

        return step


SOLVERS: dict[str, type[Solver]] = {
    "euler": Euler,
    "midpoint": Midpoint,
    "heun": Heun,
    "rk4": RK4,
    "adams_bashforth2": AdamsBashforth2,
}

_EULER = Euler()


def integrate(
    field: Field,
    x: Tensor,
    grid: Tensor,
    solver: Solver = _EULER,
    on_step: Callable[[int, Tensor, Tensor], Tensor | None] | None = None,
    host_times: bool = False,
) -> Tensor:
    """Returns the state at the last time of the grid, given the state x at its first (notes, Alg. 1).

    State and times are float32 throughout, whatever the dtype of the network, or float64 if x is. The host never waits for
    the device inside the loop; the grid is checked once, before it (leave it on the CPU, where the grids are made).
    Gradients are recorded unless the caller turns them off.

    Args:
        field: the velocity u(x [B, ...], t scalar tensor of the state's dtype, on x's device), of x's shape and any floating dtype.
        x: the state at grid[0], [B, ...], floating point: noise, where grid[0] = 0.
        grid: times [n + 1], n >= 1, strictly increasing (noise to data) or strictly decreasing (data to noise).
        solver: the method of each step.
        on_step: called as on_step(i, t_next, x) after step i = 0, ..., n - 1 with the time and the state reached;
            a tensor that it returns replaces the state.
        host_times: the field and on_step are given times on the CPU, not on x's device: a field that looks something up by the time
            then need not wait for the device to know it. Beside a state on another device such a scalar is as good as a number.

    Raises:
        ValueError: the grid is not as above once in float32, x is not floating point, or the field or on_step
            returns another shape than x's.
    """
    _check_grid(grid)
    x, velocity = _state_and_velocity(field, x)
    times = grid.to(device="cpu" if host_times else x.device, dtype=x.dtype).unbind()
    step = solver.stepper()
    for i in range(len(times) - 1):
        x = step(velocity, x, times[i], times[i + 1])
        if on_step is not None:
            replacement = on_step(i, times[i + 1], x)
            if replacement is not None:
                x = _like_state(replacement, x, "on_step")
    return x


def evaluations(solver: Solver, grid: Tensor) -> int:
    """Returns how often `integrate` calls the field on this grid: the solver's cost a step times the intervals.

    Raises:
        ValueError: the grid is not one that `integrate` takes.
    """
    _check_grid(grid)
    return solver.evaluations_per_step * (len(grid) - 1)


class Integrated(NamedTuple):
    """The state reached, of the start's shape, and how often the field was called to get there."""

    x: Tensor
    evaluations: int


def integrate_adaptive(
    field: Field, x: Tensor, start: float = 0.0, end: float = 1.0, rtol: float = 1e-5, atol: float = 1e-5
) -> Integrated:
    """Returns the state at time `end`, given the state x at `start`, and the evaluations it took.

    The method is that of Dormand and Prince (1980), of order 5, through torchdiffeq. Each step's error is estimated and the
    step chosen so that its root mean square, in units of atol + rtol |x|, is below 1: the tolerance is on each step,
    and what the steps add up to may be ten times as much. That mean runs over the whole batch, so a sample's result depends,
    within the tolerance, on the others. The host reads the error at each step.

    Args:
        field, x: see `integrate`. The field is asked at times between start and end only, ends included.
        start, end: times, of which the first may be the larger (data to noise).
        rtol, atol: the relative and the absolute tolerance. In float32 below about 1e-6 rounding is mistaken for error, and
            the steps shrink to nothing; float64 states go on to about 1e-13.

    Raises:
        ValueError: the times are equal or not finite, a tolerance is not positive and finite, or x or the field is wrong.
        ImportError: torchdiffeq is not installed.
    """
    if not (math.isfinite(start) and math.isfinite(end) and start != end):
        raise ValueError(f"start and end must be finite and differ, got {start} and {end}")
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be positive and finite, got {value}")
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError("integrate_adaptive needs torchdiffeq: pip install torchdiffeq") from error
    x, velocity = _state_and_velocity(field, x)
    low, high = min(start, end), max(start, end)
    calls = 0

    def derivative(t: Tensor, state: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        # only the guess of the first step can look past the end
        return velocity(state, t.clamp(low, high).to(state.dtype))

    times = torch.tensor([start, end], dtype=torch.float64, device=x.device)
    # without step_t the last step would overshoot the end, where there may be no field, and be interpolated
    path = odeint(derivative, x, times, rtol=rtol, atol=atol, method="dopri5", options={"step_t": times[1:]})
    return Integrated(x=path[-1], evaluations=calls)


@dataclass(frozen=True)
class DormandPrince(OneStep):
    """Each interval of a grid by `integrate_adaptive`: as many evaluations as the tolerance needs, at times that it chooses."""

    rtol: float = 1e-4
    atol: float = 1e-4

    def step(self, field: Field, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """Returns the state at t_next, given x at t, to the tolerances; see `integrate_adaptive` for its errors."""
        return integrate_adaptive(field, x, float(t), float(t_next), self.rtol, self.atol).x


def _state_and_velocity(field: Field, x: Tensor) -> tuple[Tensor, Field]:
    """x in the dtype of the state, float32 at least, and the field with its answers checked and in that dtype."""
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, got {x.dtype}")

    def velocity(state: Tensor, t: Tensor) -> Tensor:
        return _like_state(field(state, t), state, "field")

    return x.to(torch.promote_types(x.dtype, torch.float32)), velocity


def _like_state(value: Tensor, state: Tensor, source: str) -> Tensor:
    """The value in the state's dtype; raises ValueError, naming the source, if it has another shape."""
    if value.shape != state.shape:
        raise ValueError(f"{source} returned shape {tuple(value.shape)} for a state of shape {tuple(state.shape)}")
    return value.to(state.dtype)


def _check_grid(grid: Tensor) -> None:
    """Returns nothing; raises ValueError unless the grid is two times or more, finite and strictly monotone."""
    if grid.ndim != 1 or len(grid) < 2 or not grid.is_floating_point():
        raise ValueError(f"grid must be [n + 1] floating-point times, n >= 1, got {grid.dtype} {tuple(grid.shape)}")
    steps = grid.to(torch.float32).diff()
    if not (torch.isfinite(grid).all() and ((steps > 0).all() or (steps < 0).all())):
        raise ValueError(f"grid must be finite and strictly monotone in float32, got {grid.tolist()}")
