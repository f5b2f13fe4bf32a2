"""Points of the conditional probability path, the velocity that carries them, and what else a network may predict.

`sample_path` is the one noising function: training, validation and evaluation all call it. `convert` passes between the
four quantities that say the same thing at (x, t): given any, x = alpha z + beta eps and its definition are two equations
in the two unknowns z and eps. That holds for a pair (z, eps) and, being linear, for the means over all the pairs that lead to x:

    velocity   u   = alpha' z + beta' eps                       (notes, eq. 20)
    score      s   = grad log p_t(x) = -eps / beta              (eq. 40; Prop. 1 for score <-> velocity)
    denoiser   D   = z, the mean of the data given x            (eq. 43)
    noise      eps                                              (the DDPM network of Alg. 4)
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from latentfm.flow.schedules import Coefficients, CondOT, Schedule

Quantity = Literal["velocity", "score", "denoiser", "noise"]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)

SMALLEST_DIVISOR = 1e-6  # stands for a divisor nearer to 0, in the conversions that are singular there

_COND_OT = CondOT()


class PathSample(NamedTuple):
    """A point x_t of the path and its conditional velocity u_t(x_t|z), both of z's shape [B, ...]."""

    x_t: Tensor
    velocity: Tensor


class Ends(NamedTuple):
    """The two ends of the path through x_t: data z and noise eps, or their means given x_t; each of x_t's shape."""

    z: Tensor
    eps: Tensor


def sample_path(z: Tensor, eps: Tensor, t: Tensor, schedule: Schedule = _COND_OT) -> PathSample:
    """Returns x_t = alpha_t z + beta_t eps and its velocity alpha'_t z + beta'_t eps (notes, eq. 28 and 31; Alg. 3).

    The velocity is eq. 20 at x = x_t. There beta_t cancels: written in z and eps it needs no division, and so is
    exact up to t = 1, where (z - x_t) / (1 - t) is 0 / 0. For CondOT it is z - eps to the last bit.

    Args:
        z: data, [B, ...], floating point.
        eps: noise drawn from N(0, I), the shape of z.
        t: times in [0, 1], [B], float32 or float64: 0 is noise, 1 is data. Values are checked on the CPU only; on an
            accelerator the check would make the host wait for the device.
        schedule: alpha and beta; linear (CondOT) by default.

    Returns:
        Two tensors of z's shape in the widest of the three dtypes, hence never less than float32.

    Raises:
        ValueError: shapes differ, t is not [B], a tensor is not of the stated dtype, or t leaves [0, 1].
    """
    if z.shape != eps.shape:
        raise ValueError(f"z and eps must have one shape, got {tuple(z.shape)} and {tuple(eps.shape)}")
    for name, value in (("z", z), ("eps", eps)):
        if not value.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {value.dtype}")
    if t.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"t must be float32 or float64 (half precision merges neighbouring times), got {t.dtype}")
    per_sample = expand_like(t, z)
    if t.device.type == "cpu":
        outside = t[~((t >= 0) & (t <= 1))]  # written so that NaN counts as outside
        if outside.numel():
            raise ValueError(f"t must lie in [0, 1] (0 noise, 1 data), got {outside[:4].tolist()}")
    at = schedule(per_sample)
    return PathSample(x_t=at.alpha * z + at.beta * eps, velocity=at.d_alpha * z + at.d_beta * eps)


def conditional_velocity(x: Tensor, z: Tensor, t: Tensor, schedule: Schedule = _COND_OT) -> Tensor:
    """Returns u_t(x|z) = (alpha' - beta'/beta alpha) z + beta'/beta x at any x, of x's shape (notes, eq. 20).

    It is `convert` from the denoiser z, and singular where beta = 0 as it is. At points drawn from the path,
    `sample_path` gives the same without the division.

    Args and errors: see `convert`.
    """
    return convert(z, x, t, "denoiser", "velocity", schedule)


def ends(value: Tensor, x: Tensor, t: Tensor, source: Quantity, schedule: Schedule = _COND_OT) -> Ends:
    """Returns z and eps, given x and one of the quantities at (x, t).

    Singular, because x and the quantity say the same there: the denoiser where beta = 0 (t = 1), noise and score where
    alpha = 0 (t = 0), and the velocity where alpha beta' = alpha' beta (t = 0 for Polynomial, n > 1). What is undetermined is then
    finite and computed with `SMALLEST_DIVISOR` for the divisor; the other end is exact. Near those times the rounding of
    x and value is magnified by one over the divisor.

    Args and errors: see `convert`.
    """
    return _ends(*_prepare(value, x, t, source, schedule), source)


def convert(
    value: Tensor, x: Tensor, t: Tensor, source: Quantity, target: Quantity, schedule: Schedule = _COND_OT
) -> Tensor:
    """Returns the quantity `target` at (x, t), given the quantity `source` there; of x's shape, float32 at least.

    Converting a quantity to itself returns it. Where `ends` is singular the result is finite but means nothing; so is
    the score where beta = 0, since clean data have none.

    Args:
        value: the quantity `source` at (x, t), of x's shape, floating point.
        x: points of the path, [B, ...].
        t: times in [0, 1], float32 or float64: [B], or one scalar for all.
        source, target: "velocity", "score", "denoiser" or "noise", see the module.
        schedule: alpha and beta; linear (CondOT) by default.

    Raises:
        ValueError: another name, shapes differ, or t is neither [B] nor a scalar.
    """
    if target not in QUANTITIES:
        raise ValueError(f"target must be one of {', '.join(QUANTITIES)}, got {target!r}")
    value, x, at = _prepare(value, x, t, source, schedule)
    if source == target:
        return value
    if {source, target} == {"noise", "score"}:  # the same number up to a factor: no need to find z, which may be singular
        return -value / _away_from_zero(at.beta) if target == "score" else -at.beta * value
    z, eps = _ends(value, x, at, source)
    if target == "velocity":
        return at.d_alpha * z + at.d_beta * eps
    if target == "denoiser":
        return z
    return eps if target == "noise" else -eps / _away_from_zero(at.beta)


def expand_like(t: Tensor, x: Tensor) -> Tensor:
    """Returns the view [B, 1, ..., 1] of t [B] that broadcasts, sample by sample, against x [B, ...].

    Raises:
        ValueError: t is not one number for each sample of x.
    """
    if x.ndim == 0 or t.shape != x.shape[:1]:
        raise ValueError(f"t must be [B], one value a sample of x [B, ...], got {tuple(t.shape)} for {tuple(x.shape)}")
    return t.reshape(-1, *(1,) * (x.ndim - 1))


def _prepare(value: Tensor, x: Tensor, t: Tensor, source: str, schedule: Schedule) -> tuple[Tensor, Tensor, Coefficients]:
    """Returns value, x and the schedule at t, shaped to broadcast against them; all in the widest of the three dtypes.

    The dtype is made explicit because torch ignores that of a scalar t beside an x of lower precision.

    Raises:
        ValueError: a wrong name, shape or dtype.
    """
    if source not in QUANTITIES:
        raise ValueError(f"source must be one of {', '.join(QUANTITIES)}, got {source!r}")
    if value.shape != x.shape:
        raise ValueError(f"the {source} and x must have one shape, got {tuple(value.shape)} and {tuple(x.shape)}")
    if t.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"t must be float32 or float64 (half precision merges neighbouring times), got {t.dtype}")
    at = schedule(t if t.ndim == 0 else expand_like(t, x))
    dtype = torch.promote_types(torch.promote_types(value.dtype, x.dtype), t.dtype)
    return value.to(dtype), x.to(dtype), Coefficients(*(c.to(dtype) for c in at))


def _ends(value: Tensor, x: Tensor, at: Coefficients, source: Quantity) -> Ends:
    """`ends` of what `_prepare` returned."""
    if source == "velocity":
        determinant = _away_from_zero(at.alpha * at.d_beta - at.d_alpha * at.beta)
        z, eps = (at.d_beta * x - at.beta * value) / determinant, (at.alpha * value - at.d_alpha * x) / determinant
        # in the noisier half from x itself, so that eps stays exact where the determinant had to be moved
        return Ends(z=z, eps=torch.where(at.beta > at.alpha, (x - at.alpha * z) / _away_from_zero(at.beta), eps))
    if source == "denoiser":
        return Ends(z=value, eps=(x - at.alpha * value) / _away_from_zero(at.beta))
    eps = value if source == "noise" else -at.beta * value
    return Ends(z=(x - at.beta * eps) / _away_from_zero(at.alpha), eps=eps)


def _away_from_zero(divisor: Tensor) -> Tensor:
    """The divisor, moved to plus or minus `SMALLEST_DIVISOR` where it is nearer to 0; 0 counts as positive."""
    return torch.where(divisor < 0, divisor.clamp(max=-SMALLEST_DIVISOR), divisor.clamp(min=SMALLEST_DIVISOR))
