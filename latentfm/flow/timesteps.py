"""Times: the random ones that training draws and the ordered ones that sampling visits.

The SD3 paper (Esser et al. 2024, "Scaling Rectified Flow Transformers") states its densities and its shift for the
noise level sigma = 1 - t. They are written here on sigma, as in the paper, and turned into t in `draw_t` and in the
grids, once each. A shift above 1 moves times towards noise: a larger picture needs more noise to hide it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Density(Protocol):
    """A probability density of the noise level sigma on [0, 1], drawn from by its inverse distribution function."""

    def icdf(self, u: Tensor) -> Tensor:
        """Returns the sigma below which a share u in [0, 1] of the draws falls: increasing, of u's shape and dtype."""
        ...

    def pdf(self, sigma: Tensor) -> Tensor:
        """Returns the density at sigma in [0, 1], of sigma's shape and dtype; its integral over [0, 1] is 1."""
        ...


@dataclass(frozen=True)
class Uniform:
    """The uniform density of the CFM loss as it is derived (notes, eq. 26)."""

    def icdf(self, u: Tensor) -> Tensor:
        """Returns u itself."""
        return u

    def pdf(self, sigma: Tensor) -> Tensor:
        """Returns 1 wherever sigma is in [0, 1]."""
        return torch.ones_like(sigma)


@dataclass(frozen=True)
class LogitNormal:
    """The law of sigmoid(N(mean, std^2)): most draws at middling noise, none at the ends (SD3 paper, section 3.1).

    A negative mean moves the draws towards data (sigma = 0), a positive one towards noise (sigma = 1).

    Raises:
        ValueError: std is not positive, or either number is not finite.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.mean):
            raise ValueError(f"mean must be finite, got {self.mean}")
        if not (self.std > 0 and math.isfinite(self.std)):
            raise ValueError(f"std must be positive and finite, got {self.std}")

    def icdf(self, u: Tensor) -> Tensor:
        """Returns sigmoid(mean + std * Phi^-1(u)), whose limits at u = 0 and u = 1 are 0 and 1 exactly."""
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))

    def pdf(self, sigma: Tensor) -> Tensor:
        """Returns N(logit(sigma); mean, std^2) / (sigma (1 - sigma)), and its limit 0 at both ends."""
        inside = (sigma > 0) & (sigma < 1)
        normal = torch.exp(-(((torch.logit(sigma) - self.mean) / self.std) ** 2) / 2)
        return torch.where(inside, normal / (self.std * math.sqrt(2 * math.pi) * sigma * (1 - sigma)), 0.0)


DENSITIES: dict[str, type[Density]] = {"uniform": Uniform, "logit_normal": LogitNormal}


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Returns s sigma / (1 + (s - 1) sigma) for the shift s (SD3 paper, section 5.3.2), of sigma's shape and dtype.

    Increasing in sigma, fixes 0 and 1, and composes by multiplication: a shift a, then b, is the shift a b. It is
    evaluated as sigma / (sigma + (1 - sigma) / s), the same number, which rounding cannot push out of [0, 1]
    and which a shift of 1 leaves alone to the last bit.

    Args:
        sigma: noise levels in [0, 1], any shape.
        shift: 1 changes nothing, above 1 adds noise.

    Raises:
        ValueError: shift is not positive and finite.
    """
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"shift must be positive and finite, got {shift}")
    return sigma / (sigma + (1 - sigma) / shift)


def draw_t(u: Tensor, density: Density, shift: float = 1.0) -> Tensor:
    """Returns times t = 1 - shift_sigma(density.icdf(u), shift) in [0, 1], float32, of u's shape.

    The randomness is the caller's: u may come from a generator, a hash of the sample's id or a stratified draw.
    Note that t falls as u rises.

    Args:
        u: draws from the uniform law on [0, 1), float32 or float64, any shape. Values are checked on the CPU only; on
            an accelerator the check would make the host wait for the device.
        density: the law of sigma before the shift.
        shift: see `shift_sigma`.

    Raises:
        ValueError: u is of another dtype or leaves [0, 1], or shift is not positive and finite.
    """
    if u.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"u must be float32 or float64, got {u.dtype}")
    if u.device.type == "cpu":
        outside = u[~((u >= 0) & (u <= 1))]  # written so that NaN counts as outside
        if outside.numel():
            raise ValueError(f"u must lie in [0, 1], got {outside[:4].tolist()}")
    return (1 - shift_sigma(density.icdf(u), shift)).to(torch.float32)


def uniform_grid(steps: int, shift: float = 1.0) -> Tensor:
    """Returns steps + 1 times from 0 to 1, both included: float32, increasing, even in sigma before the shift.

    Args:
        steps: the number of intervals, hence of network evaluations for the Euler method.
        shift: see `shift_sigma`; above 1 spends more of the steps near noise.

    Raises:
        ValueError: steps is not an integer of at least 1, or shift is not positive and finite.
    """
    _require_count("steps", steps, 1)
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
    _require_count("steps", steps, 1)
    _require_count("num_train_timesteps", num_train_timesteps, 2)
    table_ends = torch.tensor([1, 1 / num_train_timesteps], dtype=torch.float64)
    first, last = shift_sigma(table_ends, shift).tolist()
    sigma = shift_sigma(torch.linspace(first, last, steps, dtype=torch.float64), shift).to(torch.float32)
    return torch.cat([1 - sigma, torch.ones(1)])


GRIDS: dict[str, Callable[[int, float], Tensor]] = {"uniform": uniform_grid, "diffusers": diffusers_grid}


def _require_count(name: str, value: int, least: int) -> None:
    """Returns nothing; raises ValueError unless `value` is an integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
