"""Sampling by a stochastic differential equation with the same marginals as the flow, from the velocity alone.

For any diffusion coefficient sigma_t >= 0 the process (notes, Theorem 17, eq. 44)

    dX_t = [u_t(X_t) + sigma_t^2 / 2 grad log p_t(X_t)] dt + sigma_t dW_t,        X_0 ~ N(0, I)

has X_t ~ p_t at every t, as the flow's ODE has, which is the case sigma = 0. The score is in the velocity already (Prop. 1),
so nothing else is trained. What differs is what becomes of errors: noise lets a sample forget where a wrong velocity or
a long step has put it, and asks for more steps in return. sigma_t may be chosen freely, after training:

    PowerOfBeta(scale, power)    sigma_t = scale beta_t^power: 0 constant, 1/2 dying out with the noise, 1 at a constant rate
    Memoryless()                 sigma_t^2 = 2 a_t: X_1 is independent of X_0; the diffusion of DDPM

The rate at which noise is forgotten, sigma_t^2 / (2 beta_t^2), is what the steps must resolve. At t = 1 the score does not
exist, and at t = 0 the state is pure noise, which more noise would leave as it is. So an interval that begins at alpha = 0
or ends at beta = 0 is a step of the ODE: Theorem 17 for a sigma_t that is 0 there, and no approximation beyond.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from latentfm.flow.fields import Field
from latentfm.flow.ode import Euler, Heun, OneStep, Step, integrate
from latentfm.flow.path import convert
from latentfm.flow.schedules import CondOT, Schedule

_COND_OT = CondOT()


class Diffusion(Protocol):
    """A diffusion coefficient, given as its square: sigma_t^2 >= 0 for times t, of t's shape and dtype."""

    def __call__(self, t: Tensor, schedule: Schedule) -> Tensor: ...


@dataclass(frozen=True)
class PowerOfBeta:
    """The diffusion coefficient sigma_t = scale beta_t^power, finite at every t.

    Noise is forgotten at the rate scale^2 / 2 beta^(2 power - 2). For power 1 that is constant. For power 1/2 it is
    scale^2 / (2 beta), which even steps of CondOT resolve to the end for a scale up to 2. For power 0, the constant
    coefficient, it grows like 1 / beta^2: the last interval, which is noiseless, must be a long one, and the noisy steps
    before it, of length h, must begin where beta^2 > scale^2 h / 3.

    Args:
        scale: 0 is the ODE.
        power: 0, 1/2 and 1 are the usual ones.

    Raises:
        ValueError: scale or power is negative or not finite.
    """

    scale: float = 1.0
    power: float = 0.5

    def __post_init__(self) -> None:
        for name, value in (("scale", self.scale), ("power", self.power)):
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be at least 0 and finite, got {value}")

    def __call__(self, t: Tensor, schedule: Schedule) -> Tensor:
        """Returns scale^2 beta_t^(2 power), of t's shape."""
        return self.scale**2 * schedule(t).beta ** (2 * self.power)


@dataclass(frozen=True)
class Memoryless:
    """The diffusion coefficient sigma_t^2 = 2 a_t = 2 beta (alpha' beta - alpha beta') / alpha, a_t as in Prop. 1 (notes, eq. 41).

    With it the drift is b_t x + 2 a_t grad log p_t, the reversal of a forward process that turns data into noise with no trace
    left: X_0 and X_1 are independent (Domingo-Enrich et al. 2024, "Adjoint Matching", who name it so). On the variance
    preserving schedule it is the rate b(1 - t) of the diffusion itself, the reverse process of Song et al. 2021 and DDPM.
    It is infinite where alpha = 0, at t = 0 for most schedules; for CondOT it is 2 (1 - t) / t. The first step begins there and is
    noiseless; it must be about half as long as the second at least, or as long for Polynomial(2).
    """

    def __call__(self, t: Tensor, schedule: Schedule) -> Tensor:
        """Returns 2 beta (alpha' beta - alpha beta') / alpha, of t's shape."""
        at = schedule(t)
        return 2 * at.beta * (at.d_alpha * at.beta - at.alpha * at.d_beta) / at.alpha


def sde_drift(field: Field, diffusion: Diffusion, schedule: Schedule = _COND_OT) -> Field:
    """Returns the drift u_t(x) + sigma_t^2 / 2 grad log p_t(x) of Theorem 17 (notes, eq. 44) for the velocity field u.

    The score comes from the velocity by `path.convert`, and exists where that does: for alpha > 0 and beta > 0.
    """

    def drift(x: Tensor, t: Tensor) -> Tensor:
        velocity = field(x, t)
        return velocity + diffusion(t, schedule) / 2 * convert(velocity, x, t, "velocity", "score", schedule)

    return drift


class Scheme(Protocol):
    """A method for SDEs with additive noise: means of smooth functions of the state err like the step to the power `weak_order`."""

    weak_order: ClassVar[int]
    evaluations_per_step: ClassVar[int]
    noiseless: ClassVar[OneStep]  # the solver that this is where sigma = 0

    def step(self, drift: Field, variance: Callable[[Tensor], Tensor], x: Tensor, t: Tensor, t_next: Tensor, noise: Tensor) -> Tensor:
        """Returns the state at t_next > t, given the state x at t, sigma^2 as a function of time, and noise ~ N(0, I), of x's shape."""
        ...


@dataclass(frozen=True)
class EulerMaruyama:
    """The Euler-Maruyama method X_{t+h} = X_t + h b_t(X_t) + sqrt(h) sigma_t eps (notes, eq. 9 and Alg. 2), b the drift."""

    weak_order: ClassVar[int] = 1
    evaluations_per_step: ClassVar[int] = 1
    noiseless: ClassVar[OneStep] = Euler()

    def step(self, drift: Field, variance: Callable[[Tensor], Tensor], x: Tensor, t: Tensor, t_next: Tensor, noise: Tensor) -> Tensor:
        """Returns x + h drift(x, t) + sqrt(h sigma_t^2) noise, for h = t_next - t."""
        h = t_next - t
        return x + h * drift(x, t) + torch.sqrt(h * variance(t)) * noise


@dataclass(frozen=True)
class StochasticHeun:
    """Heun's method with one draw of noise, in the trial step and in the step (Kloeden and Platen 1992, section 15.1).

    For noise that does not depend on the state, as here, the mean and the variance that a step adds are right to h^2: weak order
    2. The variance of the draw is the trapezoidal rule's for the integral of sigma^2.
    """

    weak_order: ClassVar[int] = 2
    evaluations_per_step: ClassVar[int] = 2
    noiseless: ClassVar[OneStep] = Heun()

    def step(self, drift: Field, variance: Callable[[Tensor], Tensor], x: Tensor, t: Tensor, t_next: Tensor, noise: Tensor) -> Tensor:
        """Returns x + h/2 (b + drift(x + h b + kick, t_next)) + kick, for b = drift(x, t) and kick = sqrt(h mean sigma^2) noise."""
        h, first = t_next - t, drift(x, t)
        kick = torch.sqrt(h * (variance(t) + variance(t_next)) / 2) * noise
        return x + h / 2 * (first + drift(x + h * first + kick, t_next)) + kick


SCHEMES: dict[str, type[Scheme]] = {"euler_maruyama": EulerMaruyama, "stochastic_heun": StochasticHeun}

_EULER_MARUYAMA = EulerMaruyama()


def integrate_sde(
    field: Field,
    x: Tensor,
    grid: Tensor,
    diffusion: Diffusion,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    scheme: Scheme = _EULER_MARUYAMA,
    schedule: Schedule = _COND_OT,
    on_step: Callable[[int, Tensor, Tensor], Tensor | None] | None = None,
    host_times: bool = False,
) -> Tensor:
    """Returns a draw of the state at the last time of the grid, given the state x at its first (notes, Alg. 2 and Thm 17).

    Evaluations, dtypes, `on_step` and the host are as with `ode.integrate`; with sigma = 0 the result is that of
    `scheme.noiseless`. Intervals that begin at alpha = 0 or end at beta = 0 are noiseless (see the module): of a grid from 0 to 1,
    the first for most schedules, and the last.

    Args:
        field: the velocity u(x [B, ...], t scalar tensor), which the path of `schedule` has; guided ones are used the same way.
        x: the state at grid[0], [B, ...], floating point: noise, where grid[0] = 0.
        grid: times [n + 1], n >= 1, in [0, 1], strictly increasing.
        diffusion: sigma_t^2.
        generator: the source of the noise: one for the batch, or one for each sample, which then is the same whatever batch it
            is in; torch's own if not given. Numbers are drawn on the generator's device: from another device than x's they are
            copied at each step, for which the host waits.
        scheme: the method of each noisy step.
        schedule: the path that the field belongs to; linear (CondOT) by default.
        on_step, host_times: see `ode.integrate`.

    Raises:
        ValueError: the grid is decreasing, leaves [0, 1] or is not as `ode.integrate` takes it; a noisy step is too long to be stable
            (the message says which); or the generators are not one for each sample.
    """
    noisy = _noisy_intervals(grid, diffusion, schedule)
    if isinstance(generator, Sequence) and len(generator) != len(x):
        raise ValueError(f"there must be one generator for each sample, got {len(generator)} for {len(x)} samples")
    return integrate(field, x, grid, _Walk(diffusion, generator, scheme, schedule, noisy), on_step, host_times)


@dataclass(frozen=True)
class _Walk:
    """A scheme with its noise, as a solver for `integrate`."""

    diffusion: Diffusion
    generator: torch.Generator | Sequence[torch.Generator] | None
    scheme: Scheme
    schedule: Schedule
    noisy: list[bool]

    def stepper(self) -> Step:
        """Returns a step function that knows the number of its interval, and draws noise where that one is noisy."""
        remaining = iter(self.noisy)

        def step(field: Field, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
            if not next(remaining):
                return self.scheme.noiseless.step(field, x, t, t_next)
            drift = sde_drift(field, self.diffusion, self.schedule)
            noise = _standard_normal(x, self.generator)
            return self.scheme.step(drift, lambda time: self.diffusion(time, self.schedule), x, t, t_next, noise)

        return step


def _noisy_intervals(grid: Tensor, diffusion: Diffusion, schedule: Schedule) -> list[bool]:
    """For each interval of the grid, whether noise is added in it; raises ValueError if one of those is too long.

    With the denoiser D held still, x - alpha D shrinks in a step of Euler by the factor 1 - h (sigma^2 / 2 beta^2 - beta' / beta), which
    must not be below -1; Heun's method has the same limit.
    """
    if grid.ndim != 1 or len(grid) < 2 or not grid.is_floating_point() or not (grid.min() >= 0 and grid.max() <= 1):
        raise ValueError(f"grid must be [n + 1] floating-point times in [0, 1], n >= 1, got {grid.dtype} {grid.tolist()}")
    if not (grid.diff() > 0).all():
        raise ValueError(f"grid must increase, from noise to data (an SDE cannot be run backward), got {grid.tolist()}")
    times = grid.to(torch.float64)
    at, h = schedule(times), times.diff()
    noisy = (at.alpha[:-1] > 0) & (at.beta[1:] > 0)
    variance = diffusion(times, schedule)[:-1]
    rate = variance / (2 * at.beta[:-1].square()) - at.d_beta[:-1] / at.beta[:-1]
    too_long = (noisy & (variance > 0) & ~(h * rate <= 2)).nonzero().flatten()
    if len(too_long):
        i = too_long[0]
        raise ValueError(
            f"the step from t = {times[i]:.4g} to {times[i + 1]:.4g} is too long for sigma^2 = {variance[i]:.4g} there: at most "
            f"{2 / rate[i]:.3g} is stable. Take a smaller sigma, more steps, or a longer last step, which has no noise"
        )
    return noisy.tolist()


def _standard_normal(x: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    """Noise of x's shape and dtype, on x's device, drawn on the generators'."""
    if isinstance(generator, Sequence):
        rows = [torch.randn(x.shape[1:], generator=one, dtype=x.dtype, device=one.device) for one in generator]
        return torch.stack(rows).to(x.device)
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)
