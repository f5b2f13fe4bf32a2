"""Noise schedules alpha_t, beta_t of a Gaussian conditional path p_t(x|z) = N(alpha_t z, beta_t^2 I) (notes, eq. 15).

A schedule is any callable from t to `Coefficients`; alpha runs from 0 to 1 and beta from 1 to 0 as t runs from noise
(t = 0) to data (t = 1). The four numbers travel together because the velocity needs all of them (notes, eq. 20).
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Coefficients(NamedTuple):
    """The schedule at t: alpha_t, beta_t and their derivatives in t, each a tensor of t's shape, dtype and device."""

    alpha: Tensor
    beta: Tensor
    d_alpha: Tensor
    d_beta: Tensor


class Schedule(Protocol):
    """A map from times t in [0, 1], of any shape, to the `Coefficients` at those times."""

    def __call__(self, t: Tensor) -> Coefficients: ...


@dataclass(frozen=True)
class CondOT:
    """The linear schedule alpha_t = t, beta_t = 1 - t: conditional optimal transport, rectified flow (notes, Alg. 3).

    Its conditional paths are straight lines run at constant speed z - eps.
    """

    def __call__(self, t: Tensor) -> Coefficients:
        """Returns (t, 1 - t, 1, -1), each of t's shape, for floating-point t in [0, 1]."""
        one = torch.ones_like(t)
        return Coefficients(alpha=t, beta=1 - t, d_alpha=one, d_beta=-one)
