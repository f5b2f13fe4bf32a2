"""The ordered times that sampling visits, from noise (t = 0) to data (t = 1).

A grid of n steps is n + 1 times, both ends exact, one interval a step: what `ode.integrate` walks. Each is stated on the
noise level sigma = 1 - t, where the shift acts (see `timesteps`), computed in float64 and turned into t once.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from latentfm.flow.timesteps import require_count, shift_sigma, solve_increasing


def uniform_grid(steps: int, shift: float = 1.0) -> Tensor:
    """Returns steps + 1 times from 0 to 1, both included: float32, increasing, even in sigma before the shift.

    Args:
        steps: the number of intervals, hence of network evaluations for the Euler method.
        shift: see `shift_sigma`; above 1 spends more of the steps near noise.

    Raises:
        ValueError: steps is not an integer of at least 1, or shift is not positive and finite.
    """
    require_count("steps", steps, 1)
    sigma = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return (1 - shift_sigma(sigma, shift)).to(torch.float32)


def diffusers_grid(steps: int, shift: float = 1.0, num_train_timesteps: int = 1000) -> Tensor:
    """Returns, as steps + 1 times from 0 to 1, what diffusers' FlowMatchEulerDiscreteScheduler(shift=shift) visits.

    The reference pictures of SD3 and SD3.5 were made on this grid. It differs from `uniform_grid` in its last step:
    diffusers spaces the sigmas evenly between the ends of its table of training sigmas, which is already shifted, and
    shifts them again, then appends 0. The smallest positive sigma is so shifted twice (for 1,000 entries and
    shift 3, 0.0089 in place of 0.0030). For shifts of 0.5 and above, 1 - t equals the scheduler's `sigmas` to float32
    rounding (6e-8); below, diffusers' own rounding makes it start short of pure noise, which is not copied.

    Args:
        steps: the number of intervals, `num_inference_steps` there.
        shift: the scheduler's `shift`.
        num_train_timesteps: the length of the scheduler's table, at least 2.

    Raises:
        ValueError: steps or num_train_timesteps is not an integer large enough, or shift is not positive and finite.
    """
    require_count("steps", steps, 1)
    require_count("num_train_timesteps", num_train_timesteps, 2)
    table_ends = torch.tensor([1, 1 / num_train_timesteps], dtype=torch.float64)
    first, last = shift_sigma(table_ends, shift).tolist()
    sigma = shift_sigma(torch.linspace(first, last, steps, dtype=torch.float64), shift).to(torch.float32)
    return torch.cat([1 - sigma, torch.ones(1)])


def karras_grid(steps: int, shift: float = 1.0, rho: float = 7.0, sigma_min: float = 1e-3) -> Tensor:
    """Returns steps + 1 times from 0 to 1 whose sigma^(1/rho) is evenly spaced, with a last step to sigma = 0.

    The ramp is Karras et al. 2022, eq. 5. There sigma is the noise over the signal and runs from 80 to 0.002; for a
    flow, as in diffusers' FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True), the same ramp is put on sigma = 1 - t,
    from 1 to `sigma_min` and then 0. It crowds the steps near data. At shift 1 it is diffusers' grid; there any
    other shift moves only the smallest sigma (it is taken before the ramp), here it moves the whole grid.

    Args:
        steps: the number of intervals; one interval goes straight from 0 to 1.
        shift: see `shift_sigma`.
        rho: 1 spaces sigma evenly, more crowds it towards data; at least 1.
        sigma_min: the noise level at which the last step starts, in (0, 1), before the shift.

    Raises:
        ValueError: an argument is not as above.
    """
    if not 1 <= rho < float("inf"):
        raise ValueError(f"rho must be at least 1 and finite, got {rho}")
    _check(steps, sigma_min)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    return _times((1 + ramp * (sigma_min ** (1 / rho) - 1)) ** rho, shift)


def beta_grid(steps: int, shift: float = 1.0, shape: float = 0.6, sigma_min: float = 1e-3) -> Tensor:
    """Returns steps + 1 times from 0 to 1, spaced like the quantiles of a Beta law, with a last step to sigma = 0.

    From Lee et al. 2024, "Beta Sampling is All You Need": for a shape below 1 the steps crowd at both ends.
    As in diffusers' FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True), the quantiles of Beta(shape, shape) at even
    probabilities are put on sigma from 1 to `sigma_min`, then 0. For the shift see `karras_grid`.

    Args:
        steps: the number of intervals; one interval goes straight from 0 to 1.
        shift: see `shift_sigma`.
        shape: both parameters of the Beta law, from 0.5 to 10; 1 is the uniform law.
        sigma_min: the noise level at which the last step starts, in (0, 1), before the shift.

    Raises:
        ValueError: an argument is not as above.
    """
    if not 0.5 <= shape <= 10:  # below, neighbouring times near data would merge in float32
        raise ValueError(f"shape must lie in [0.5, 10], got {shape}")
    _check(steps, sigma_min)
    quantile = _symmetric_beta_quantile(torch.linspace(1, 0, steps, dtype=torch.float64), shape)
    return _times(1 - (1 - sigma_min) * (1 - quantile), shift)  # 1 exactly where the quantile is 1


GRIDS: dict[str, Callable[[int, float], Tensor]] = {
    "uniform": uniform_grid,
    "diffusers": diffusers_grid,
    "karras": karras_grid,
    "beta": beta_grid,
}


def _symmetric_beta_quantile(probability: Tensor, shape: float) -> Tensor:
    """Returns the x below which Beta(shape, shape) has the probability given, float64.

    Its distribution function is the integral of (s (1 - s))^(a - 1), over its value at x = 1. Expanding (1 - s)^(a - 1) in the
    binomial series and integrating term by term gives sum_n c_n x^(a + n) / (a + n), with c_n = c_(n-1) (n - a) / n, whose
    terms halve or better for x <= 1/2. The upper half follows by symmetry, and so does the value at 1, twice that at 1/2.
    """
    terms = range(60)
    coefficients = [1.0]
    for n in terms[1:]:
        coefficients.append(coefficients[-1] * (n - shape) / n)

    def integral(x: Tensor) -> Tensor:
        powers = sum(c * x**n / (shape + n) for n, c in zip(terms, coefficients, strict=True))
        return x**shape * powers

    total = 2 * integral(torch.tensor(0.5, dtype=torch.float64))
    nearer = torch.minimum(probability, 1 - probability)
    x = solve_increasing(lambda x: integral(x) / total, nearer, high=0.5)
    return torch.where(probability > 0.5, 1 - x, x)


def _times(sigma: Tensor, shift: float) -> Tensor:
    """The grid through the noise levels sigma, which fall from 1, and then through 0."""
    return torch.cat([(1 - shift_sigma(sigma, shift)).to(torch.float32), torch.ones(1)])


def _check(steps: int, sigma_min: float) -> None:
    """Returns nothing; raises ValueError for a number of steps or a smallest sigma that makes no grid."""
    require_count("steps", steps, 1)
    if not 0 < sigma_min < 1:
        raise ValueError(f"sigma_min must lie between 0 and 1, got {sigma_min}")
