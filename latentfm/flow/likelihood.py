"""How likely the model finds a datum: log p_1(x), by the change of variables along the flow.

The density is carried by the flow as the points are. Along a trajectory, the continuity equation (notes, eq. 23) divided by
p_t says that it falls where the field spreads points out (Chen et al. 2018, "Neural Ordinary Differential Equations", Thm 1):

    d/dt log p_t(X_t) = d_t log p_t + u_t . grad log p_t = -div u_t(X_t)

So a datum x is followed back to its noise x_0, and the divergence met on the way is added up:

    log p_1(x) = log N(x_0; 0, I) - integral_0^1 div u_t(X_t) dt

The divergence, the trace of the Jacobian du/dx, costs a backward pass for each dimension. Hutchinson's estimate costs one:
e . (du/dx) e has the trace as its mean if the probe e has E[e e^T] = I. The probe is held fixed along a trajectory, which
leaves the integrand smooth in t and the estimate unbiased (Grathwohl et al. 2019, "FFJORD", section 3.1).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from latentfm.flow.fields import Field
from latentfm.flow.ode import RK4, Solver, integrate

_RK4 = RK4()


class Likelihood(NamedTuple):
    """log p_1(x) in nats, [B], and the noise x_0 that the flow carries to x, of x's shape."""

    log_p: Tensor
    noise: Tensor


def log_likelihood(field: Field, x: Tensor, grid: Tensor, solver: Solver = _RK4, probe: Tensor | None = None) -> Likelihood:
    """Returns log p_1(x) of the flow that starts from N(0, I), in nats, and the noise it starts from to reach x.

    Exact up to the solver's error without a probe, at the price of D backward passes through the field for each of its
    evaluations; an unbiased estimate of the integral, for one, with a probe. The work is done in float32, or float64 if x
    is. Gradients are recorded unless the caller turns them off.

    Args:
        field: the velocity, differentiable in x, where a sample's velocity depends on no other sample of the batch.
        x: data, [B, ...] with D numbers a sample, floating point.
        grid: times [n + 1], n >= 1, increasing, from 0 to 1: a sampling grid. It is walked from its end to its start.
            On a part of [0, 1], x is taken to be at its last time and N(0, I) to be the density at its first.
        solver: the method of each step, for x and the integral alike.
        probe: None for the exact divergence, or e, of x's shape, each sample's drawn on its own with mean 0 and
            covariance I: torch.randn, or `rademacher_like`, whose estimate varies less.

    Raises:
        ValueError: the grid is not increasing or not one that `integrate` takes, x is not floating point, or the probe
            or the velocity is not of x's shape.
    """
    if not (grid.diff() > 0).all():
        raise ValueError(f"grid must increase, from noise to data; it is walked backward from x, got {grid.tolist()}")
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, got {x.dtype}")

    # one state for both, [B, D + 1]: the point and the integral so far, which any solver then treats alike
    def joint(state: Tensor, t: Tensor) -> Tensor:
        velocity, div = divergence(field, state[:, :-1].reshape(x.shape), t, probe)
        return torch.cat([velocity.reshape(len(x), -1), div[:, None]], dim=1)

    flat = x.reshape(len(x), -1)
    end = integrate(joint, torch.cat([flat, flat.new_zeros(len(x), 1)], dim=1), grid.flip(0), solver)
    noise, minus_integral = end[:, :-1], end[:, -1]  # minus, for the walk goes backward in t
    log_normal = -noise.square().sum(1) / 2 - flat.shape[1] / 2 * math.log(2 * math.pi)
    return Likelihood(log_p=log_normal + minus_integral, noise=noise.reshape(x.shape))


def divergence(field: Field, x: Tensor, t: Tensor, probe: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns u_t(x), [B, ...], and its divergence sum_i du_i/dx_i, [B] (notes, eq. 22), or Hutchinson's estimate of that.

    Args:
        field, probe: see `log_likelihood`.
        x: points [B, ...], float32 or float64.
        t: one time, a scalar tensor.

    Raises:
        ValueError: the probe or the velocity is not of x's shape.
    """
    if probe is not None and probe.shape != x.shape:
        raise ValueError(f"the probe must have the shape of x, got {tuple(probe.shape)} for {tuple(x.shape)}")
    velocity, pull_back = torch.func.vjp(lambda points: field(points, t), x)
    if velocity.shape != x.shape:
        raise ValueError(f"field returned shape {tuple(velocity.shape)} for points of shape {tuple(x.shape)}")
    if probe is not None:
        probe = probe.to(velocity)
        return velocity, (pull_back(probe)[0] * probe).reshape(len(x), -1).sum(1)
    total, dims = x.new_zeros(len(x)), x[0].numel()
    for i in range(dims):
        # row i of every sample's Jacobian in one backward pass, since samples do not meet
        pick = torch.zeros_like(velocity).reshape(len(x), dims)
        pick[:, i] = 1
        total = total + pull_back(pick.reshape(x.shape))[0].reshape(len(x), dims)[:, i]
    return velocity, total


def rademacher_like(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Returns signs, +1 or -1 with equal probability, of x's shape, dtype and device: a probe for `log_likelihood`.

    Of all probes with independent entries theirs is the estimate of least variance: it is exact for a Jacobian that is
    diagonal, where a Gaussian probe's is not (Hutchinson 1990).
    """
    return torch.randint(0, 2, x.shape, generator=generator, device=x.device).to(x.dtype) * 2 - 1


def dequantize(levels: Tensor, u: Tensor) -> Tensor:
    """Returns 2 (k + u) / 256 - 1, in [-1, 1): each level k spread evenly over the bin of width 2 / 256 that it stands for.

    On the levels themselves, points of a grid, a model's density may grow without bound; spread out, the data have one
    that `bits_per_dim` turns into a code length. With K draws of u, one has K such sets.

    Args:
        levels: k = 0, ..., 255, uint8, any shape.
        u: draws from the uniform law on [0, 1), of that shape, float32 or float64.

    Raises:
        ValueError: levels is not uint8, or the shapes differ.
    """
    if levels.dtype != torch.uint8 or levels.shape != u.shape:
        raise ValueError(
            f"levels must be uint8 and of the shape of u, got {levels.dtype} {tuple(levels.shape)} and {tuple(u.shape)}"
        )
    return (levels + u) / 128 - 1


def bits_per_dim(log_p: Tensor, dims: int) -> Tensor:
    """Returns -log p / (D ln 2) + 7, the bits a dimension that 8-bit data, scaled to [-1, 1], take to encode; [B].

    A bin of width 2 / 256 holds the probability p 2^-7 a dimension, hence the 7. Data of no structure take 8.
    With K draws of the dequantisation, the bins' probabilities are the means of p over the draws: the figure is an upper
    bound of the true one (in expectation, by Jensen's inequality) that falls as K grows, so say K beside it.

    Args:
        log_p: log-densities in nats of dequantised data (`dequantize`): [B], or [K, B] for K draws of each sample.
        dims: D, the numbers a sample has (channels x height x width).

    Raises:
        ValueError: dims is not an integer of at least 1, or log_p is neither [B] nor [K, B].
    """
    if not isinstance(dims, int) or isinstance(dims, bool) or dims < 1:
        raise ValueError(f"dims must be an integer of at least 1, got {dims!r}")
    if log_p.ndim not in (1, 2) or len(log_p) == 0:
        raise ValueError(f"log_p must be [B] or [K, B], got {tuple(log_p.shape)}")
    if log_p.ndim == 2:
        log_p = torch.logsumexp(log_p, dim=0) - math.log(len(log_p))
    return -log_p / (dims * math.log(2)) + 7
