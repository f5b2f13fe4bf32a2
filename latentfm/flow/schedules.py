"""Noise schedules alpha_t, beta_t of a Gaussian conditional path p_t(x|z) = N(alpha_t z, beta_t^2 I) (notes, eq. 15).

A schedule is any callable from t to `Coefficients`; alpha rises to 1 and beta falls to 0 as t runs from noise (t = 0) to
data (t = 1). The four numbers travel together because the velocity needs all of them (notes, eq. 20). What the schedules
here offer beside is the time at a given signal-to-noise ratio, by which a field trained on one is sampled on another.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Coefficients(NamedTuple):
    """The schedule at t: alpha_t, beta_t and their derivatives in t, each a tensor of t's shape, dtype and device."""

    alpha: Tensor
    beta: Tensor
    d_alpha: Tensor
    d_beta: Tensor


class Schedule(Protocol):
    """A map from times t in [0, 1], of any shape, to the `Coefficients` at those times."""

    def __call__(self, t: Tensor) -> Coefficients: ...


class InvertibleSchedule(Schedule, Protocol):
    """A schedule that also knows when it has a given signal-to-noise ratio."""

    def time_at(self, log_snr: Tensor) -> Tensor:
        """Returns the t in [0, 1] where log(alpha^2 / beta^2) is log_snr; the nearest end where it is nowhere."""
        ...


@dataclass(frozen=True)
class CondOT:
    """The linear schedule alpha_t = t, beta_t = 1 - t: conditional optimal transport, rectified flow (notes, Alg. 3).

    Its conditional paths are straight lines run at constant speed z - eps.
    """

    def __call__(self, t: Tensor) -> Coefficients:
        """Returns (t, 1 - t, 1, -1), each of t's shape, for floating-point t in [0, 1]."""
        one = torch.ones_like(t)
        return Coefficients(alpha=t, beta=1 - t, d_alpha=one, d_beta=-one)

    def time_at(self, log_snr: Tensor) -> Tensor:
        """Returns sigmoid(log_snr / 2)."""
        return torch.sigmoid(log_snr / 2)


@dataclass(frozen=True)
class Cosine:
    """The schedule alpha_t = sin(pi t / 2), beta_t = cos(pi t / 2), for which alpha^2 + beta^2 = 1 at every time."""

    def __call__(self, t: Tensor) -> Coefficients:
        """Returns the sine and cosine of pi t / 2 and their derivatives; both ends are 0 and 1 exactly."""
        rate = math.pi / 2
        # the cosine as the sine of the complement: it is 0 at t = 1, where cos(pi / 2) rounds to -4e-8
        alpha, beta = torch.sin(rate * t), torch.sin(rate * (1 - t))
        return Coefficients(alpha=alpha, beta=beta, d_alpha=rate * beta, d_beta=-rate * alpha)

    def time_at(self, log_snr: Tensor) -> Tensor:
        """Returns (2 / pi) atan(exp(log_snr / 2))."""
        return torch.atan(torch.exp(log_snr / 2)) * (2 / math.pi)


@dataclass(frozen=True)
class Polynomial:
    """The schedule alpha_t = t^n, beta_t = 1 - t^n: straight paths, which leave noise slowly where n > 1.

    Raises:
        ValueError: n is below 1, where the speed at t = 0 would be infinite, or not finite.
    """

    n: float = 2.0

    def __post_init__(self) -> None:
        if not (self.n >= 1 and math.isfinite(self.n)):
            raise ValueError(f"n must be at least 1 and finite, got {self.n}")

    def __call__(self, t: Tensor) -> Coefficients:
        """Returns (t^n, 1 - t^n, n t^(n - 1), -n t^(n - 1))."""
        alpha, slope = t**self.n, self.n * t ** (self.n - 1)
        return Coefficients(alpha=alpha, beta=1 - alpha, d_alpha=slope, d_beta=-slope)

    def time_at(self, log_snr: Tensor) -> Tensor:
        """Returns sigmoid(log_snr / 2)^(1 / n)."""
        return torch.sigmoid(log_snr / 2) ** (1 / self.n)


@dataclass(frozen=True)
class VariancePreserving:
    """The schedule of the variance preserving diffusion dX = -b(s) X / 2 ds + sqrt(b(s)) dW, at s = 1 - t.

    With T = integral_0^s b and b rising linearly from `low` to `high`: alpha = exp(-T / 2), beta = sqrt(1 - exp(-T)),
    so that alpha^2 + beta^2 = 1 (Song et al. 2021, eq. 33; the articles' second scheduler). Two of its limits are not the
    other schedules': at t = 0 a trace of the data is left (alpha = 0.0066 for the default rates), and at t = 1 the
    slope of beta, which is a square root there, is infinite. That one slope is taken at s = `shortest` at the least,
    the distance from the data at which such diffusions are stopped. Nearer to t = 1 a marginal field is off by up to
    `low` / 2 times the score: a grid for a method that looks at its last time ends at 1 - `shortest`.

    Raises:
        ValueError: not 0 < low <= high, or not 0 < shortest < 1.
    """

    low: float = 0.1
    high: float = 20.0
    shortest: float = 1e-5

    def __post_init__(self) -> None:
        if not (0 < self.low <= self.high and math.isfinite(self.high)):
            raise ValueError(f"the rates must be 0 < low <= high, got {self.low} and {self.high}")
        if not 0 < self.shortest < 1:
            raise ValueError(f"shortest must lie between 0 and 1, got {self.shortest}")

    def __call__(self, t: Tensor) -> Coefficients:
        """Returns alpha, beta and their derivatives; all finite."""
        s = 1 - t
        alpha, beta = torch.exp(-self._total(s) / 2), torch.sqrt(-torch.expm1(-self._total(s)))
        near = s.clamp(min=self.shortest)
        slope = -self._rate(near) * torch.exp(-self._total(near)) / (2 * torch.sqrt(-torch.expm1(-self._total(near))))
        return Coefficients(alpha=alpha, beta=beta, d_alpha=self._rate(s) * alpha / 2, d_beta=slope)

    def time_at(self, log_snr: Tensor) -> Tensor:
        """Returns 1 - s for the s where exp(-T) = sigmoid(log_snr), a root of T(s) = softplus(-log_snr)."""
        total = F.softplus(-log_snr).clamp(max=(self.low + self.high) / 2)  # T(1): there is no more noise than at t = 0
        s = 2 * total / (self.low + torch.sqrt(self.low**2 + 2 * (self.high - self.low) * total))
        return (1 - s).clamp(0, 1)

    def _rate(self, s: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * s

    def _total(self, s: Tensor) -> Tensor:
        return s * (self.low + (self.high - self.low) * s / 2)


SCHEDULES: dict[str, type[InvertibleSchedule]] = {
    "condot": CondOT,
    "cosine": Cosine,
    "polynomial": Polynomial,
    "variance_preserving": VariancePreserving,
}


def log_snr(schedule: Schedule, t: Tensor) -> Tensor:
    """Returns log(alpha_t^2 / beta_t^2), increasing in t, of t's shape and dtype.

    It is infinite where alpha or beta is 0. There, the smallest normal number of the dtype stands for that 0, and the
    result is finite: -175 and 175 at the ends in float32.
    """
    at = schedule(t)
    smallest = torch.finfo(t.dtype).tiny
    return 2 * (torch.log(at.alpha.clamp(min=smallest)) - torch.log(at.beta.clamp(min=smallest)))
