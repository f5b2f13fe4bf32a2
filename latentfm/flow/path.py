"""Points of the conditional probability path and the velocity that carries them (notes, eq. 16 and eq. 20).

This is the one noising function: training, validation and evaluation all call `sample_path`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from latentfm.flow.schedules import CondOT, Schedule

_COND_OT = CondOT()


class PathSample(NamedTuple):
    """A point x_t of the path and its conditional velocity u_t(x_t|z), both of z's shape [B, ...]."""

    x_t: Tensor
    velocity: Tensor


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


def expand_like(t: Tensor, x: Tensor) -> Tensor:
    """Returns the view [B, 1, ..., 1] of t [B] that broadcasts, sample by sample, against x [B, ...].

    Raises:
        ValueError: t is not one number for each sample of x.
    """
    if x.ndim == 0 or t.shape != x.shape[:1]:
        raise ValueError(f"t must be [B], one value a sample of x [B, ...], got {tuple(t.shape)} for {tuple(x.shape)}")
    return t.reshape(-1, *(1,) * (x.ndim - 1))
