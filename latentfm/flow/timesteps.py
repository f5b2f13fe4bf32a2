"""The random times that training draws: densities of t, the shift, stratified draws. For sampling's times see `grids`.

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


@dataclass(frozen=True)
class Mode:
    """The law of f(u) = 1 - u - s (cos^2(pi u / 2) - 1 + u) for a uniform u and the scale s (SD3 paper, section 3.1).

    A positive scale favours middling noise and a negative one the ends; 0 is the uniform density. Unlike LogitNormal's, the
    density stays positive at both ends. The paper's f falls from 1 to 0, and f(1 - u) = 1 - f(u): the law is
    symmetric about 1/2, and 1 - f is its increasing inverse distribution function.

    Raises:
        ValueError: scale is outside [-1, 2 / (pi - 2)] = [-1, 1.7519], where f is not monotone.
    """

    scale: float = 1.29

    def __post_init__(self) -> None:
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise ValueError(f"scale must lie in [-1, {2 / (math.pi - 2):.6f}], where the map is monotone, got {self.scale}")

    def icdf(self, u: Tensor) -> Tensor:
        """Returns 1 - f(u) = u + s (u - sin^2(pi u / 2)), which is 0 and 1 exactly at u = 0 and u = 1."""
        return u + self.scale * (u - torch.sin(math.pi / 2 * u).square())

    def pdf(self, sigma: Tensor) -> Tensor:
        """Returns one over the slope of `icdf` at the u where it is sigma, 1 / (1 + s (1 - pi sin(pi u) / 2)).

        It is infinite where that slope is 0: at both ends for the smallest scale, in the middle for the largest.
        """
        u = solve_increasing(self.icdf, sigma)
        slope = 1 + self.scale * (1 - math.pi / 2 * torch.sin(math.pi * u))
        return 1 / slope.clamp(min=0)


@dataclass(frozen=True)
class CosMap:
    """The law that gives the linear schedule the signal-to-noise ratios of the cosine one (SD3 paper, section 3.1).

    For a uniform u it is the sigma where sigma / (1 - sigma) = tan(pi u / 2): the noise over the signal of CondOT and Cosine.
    """

    def icdf(self, u: Tensor) -> Tensor:
        """Returns 1 - 1 / (tan(pi u / 2) + 1), written as a share of sine and cosine, which are finite at u = 1."""
        sine, cosine = torch.sin(math.pi / 2 * u), torch.sin(math.pi / 2 * (1 - u))
        return sine / (sine + cosine)

    def pdf(self, sigma: Tensor) -> Tensor:
        """Returns 2 / (pi (1 - 2 sigma + 2 sigma^2)): twice as high in the middle as at the ends."""
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma.square()))


DENSITIES: dict[str, type[Density]] = {"uniform": Uniform, "logit_normal": LogitNormal, "mode": Mode, "cosmap": CosMap}


def solve_increasing(function: Callable[[Tensor], Tensor], value: Tensor, high: float = 1.0) -> Tensor:
    """Returns x in [0, high] with function(x) = value, of value's shape and dtype, for an increasing function.

    By bisection, 60 halvings: exact to the rounding of float64, free of the derivative and of its zeros. A value beyond the
    function's range gives the nearer end.
    """
    low, high = torch.zeros_like(value), torch.full_like(value, high)
    for _ in range(60):
        middle = (low + high) / 2
        below = function(middle) < value
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


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
    _require_shift(shift)
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


def pdf_t(t: Tensor, density: Density, shift: float = 1.0) -> Tensor:
    """Returns the density, at times t in [0, 1], of what `draw_t` draws with the same law and shift; of t's shape and dtype.

    The shift s carries the law along: the sigma that it sends to 1 - t is shift_sigma(1 - t, 1 / s), and the slope of
    that in 1 - t multiplies the density there.

    Raises:
        ValueError: shift is not positive and finite.
    """
    _require_shift(shift)
    sigma = 1 - t
    return density.pdf(shift_sigma(sigma, 1 / shift)) * shift / (shift + (1 - shift) * sigma).square()


def stratified(u: Tensor, index: Tensor, count: int, rotation: float) -> Tensor:
    """Returns uniform draws of which one falls in each of the `count` equal strata of [0, 1): float64, of u's shape.

    The sample at place i of the global batch takes stratum k = (i + r) mod count, r being the share `rotation` of count
    rounded down, and its own u places it inside: (k + u) / count. Over the steps r is uniform, so that each draw alone is
    uniform too and its stratum has nothing to do with its place; within a step the draws cover [0, 1) evenly, and the mean
    of a smooth function over them has a variance of order count^-3, against count^-1 for independent draws. The result
    does not depend on how the batch is split over processes or accumulation steps. Neighbours in the batch take
    neighbouring strata; where neighbours are alike (pictures of one size, say), shuffle the places.

    Args:
        u: each sample's own draw from the uniform law on [0, 1), float32 or float64, [B].
        index: its place in the global batch, 0 to count - 1, integers, [B]. Checked on the CPU only, as is u in `draw_t`.
        count: the size of the global batch.
        rotation: one draw from the uniform law on [0, 1), the same for the whole batch and new at each step.

    Returns:
        float64, which `draw_t` takes: in float32 the largest u would round up into the next stratum, or to 1.

    Raises:
        ValueError: shapes differ, index is not of integers below count, count is not an integer of at least 1, or rotation is
            outside [0, 1).
    """
    require_count("count", count, 1)
    if not 0 <= rotation < 1:
        raise ValueError(f"rotation must lie in [0, 1), got {rotation}")
    if u.shape != index.shape:
        raise ValueError(f"u and index must have one shape, got {tuple(u.shape)} and {tuple(index.shape)}")
    if index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(f"index must be of integers, got {index.dtype}")
    if index.device.type == "cpu":
        outside = index[(index < 0) | (index >= count)]
        if outside.numel():
            raise ValueError(f"index must lie in 0 to {count - 1}, got {outside[:4].tolist()}")
    stratum = (index + int(rotation * count)) % count
    return (stratum + u.double()) / count


def shift_from_tokens(tokens: int, low: tuple[int, float] = (256, 0.5), high: tuple[int, float] = (4096, 1.15)) -> float:
    """Returns the shift s = e^mu for a picture of `tokens` image tokens, mu linear in their number (Flux).

    Args:
        tokens: the length of the image sequence, at least 1: 4096 for 1024 x 1024 pixels, where a token is 16 x 16 of them.
        low, high: two points (tokens, mu) of the line; by default Flux's, shifts of 1.65 and 3.16.

    Raises:
        ValueError: tokens is not an integer of at least 1, or the two points have the same number of tokens.
    """
    require_count("tokens", tokens, 1)
    if low[0] == high[0]:
        raise ValueError(f"low and high must be at different numbers of tokens, got {low} and {high}")
    slope = (high[1] - low[1]) / (high[0] - low[0])
    return math.exp(low[1] + slope * (tokens - low[0]))


def shift_from_resolution(pixels: int, base_pixels: int) -> float:
    """Returns the shift sqrt(m / n) from n = base_pixels to m = pixels (SD3 paper, section 5.3.2, eq. 23).

    A picture of one colour, seen through noise on m pixels, is known up to sigma / (1 - sigma) / sqrt(m); this shift gives
    the larger picture the uncertainty that the smaller one had. Where the shift in use at n pixels is not 1, the two
    multiply. The rule of `shift_from_tokens` is another: there the logarithm of the shift is linear in the size, here in
    the logarithm of the size.

    Raises:
        ValueError: either number is not an integer of at least 1.
    """
    require_count("pixels", pixels, 1)
    require_count("base_pixels", base_pixels, 1)
    return math.sqrt(pixels / base_pixels)


def require_count(name: str, value: int, least: int) -> None:
    """Returns nothing; raises ValueError unless `value` is an integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def _require_shift(shift: float) -> None:
    """Returns nothing; raises ValueError unless the shift is positive and finite."""
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"shift must be positive and finite, got {shift}")
