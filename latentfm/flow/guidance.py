"""Velocity fields, and how a conditional and an unconditional one are combined into a guided one."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# u(x [B, ...], t): the velocity at x, of x's shape, at one time t for the whole batch, a scalar float32 tensor.
Field = Callable[[Tensor, Tensor], Tensor]


def classifier_free(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Returns the guided velocity v_u + w (v_c - v_u), with w the scale (notes, eq. 65).

    Scale 0 is the unconditional velocity and 1 the conditional one, both to the last bit; above 1 the samples follow
    the condition more closely than the data do, and below 0 they flee it.

    Args:
        conditional: v_c = u(x, t | y), [B, ...], floating point.
        unconditional: v_u = u(x, t | null), of the same shape.
        scale: the guidance scale w, finite.

    Returns:
        A tensor of that shape, float32 at least: a scale of 5 makes the rounding of bf16 five times as large.

    Raises:
        ValueError: the shapes differ, or scale is infinite or not a number.
    """
    if conditional.shape != unconditional.shape:
        raise ValueError(
            f"conditional and unconditional must have one shape, got {tuple(conditional.shape)} and "
            f"{tuple(unconditional.shape)}"
        )
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    dtype = torch.promote_types(torch.promote_types(conditional.dtype, unconditional.dtype), torch.float32)
    return torch.lerp(unconditional.to(dtype), conditional.to(dtype), scale)
