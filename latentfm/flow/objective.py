"""The conditional flow matching loss (notes, eq. 26 and Theorem 12), what else may be regressed, and how t is weighted.

A network may predict any of the four quantities of `path`, since each gives the others at (x, t). An error dv in the
velocity is an error dq = (dq/dv) dv in the quantity q, with x held fixed (u = alpha' z + beta' eps, x = alpha z + beta eps):

    velocity  1        denoiser  beta / k        noise  -alpha / k        score  alpha / (beta k)        k = alpha' beta - alpha beta'

For CondOT k = 1: a denoiser's loss is (1 - t)^2 times the velocity's, and a noise predictor's is t^2 times it. So the choice of
quantity, the weight w(t) of the loss and the density that t is drawn from are one choice made in three places, and
`effective_weight` says what they come to. A weighted loss, per sample:

    losses = weighting(t, schedule) * cfm_loss(network(x_t, t), regression_target(z, eps, t, "noise", schedule))
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from latentfm.flow.path import QUANTITIES, SMALLEST_DIVISOR, Quantity, expand_like, sample_path
from latentfm.flow.schedules import CondOT, Schedule
from latentfm.flow.timesteps import Density, pdf_t, require_count

# w(t [B], schedule) -> [B], finite and >= 0 for every t in [0, 1]: the weight of the loss of a sample at time t.
Weighting = Callable[[Tensor, Schedule], Tensor]

_COND_OT = CondOT()


def cfm_loss(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns the mean squared error of each sample, [B] float32 (notes, eq. 31; Alg. 3 and, with labels, Alg. 5).

    The notes sum over the dimensions of x; the mean is that sum over their number, so that one learning rate serves
    every resolution. The batch is left unreduced for the caller to weight, average or report by t.

    Args:
        prediction: the network's velocity u(x_t, t), [B, ...], any floating dtype.
        target: the conditional velocity `sample_path(...).velocity`, of the same shape.
        mask: the weight of each element, >= 0, [B, 1, ...]: one for all channels; None is 1 everywhere. A sample's loss is the mean
            under its own mask, sum(mask * error^2) / sum(mask), so that a small region counts as much as a large one; 0 where the mask
            is 0 everywhere.

    Raises:
        ValueError: the shapes differ (they are never broadcast, but for the mask's channel) or have no batch dimension.
    """
    if prediction.shape != target.shape or prediction.ndim == 0:
        raise ValueError(
            f"prediction and target must have one shape [B, ...], got {tuple(prediction.shape)} and "
            f"{tuple(target.shape)}"
        )
    squared = (prediction.float() - target.float()).square()
    if mask is not None:
        if mask.shape != (*target.shape[:1], 1, *target.shape[2:]):
            raise ValueError(f"mask must be [B, 1, ...] of a target {tuple(target.shape)}, got {tuple(mask.shape)}")
        weights = mask.float().expand_as(squared).flatten(1)
        return (weights * squared.flatten(1)).sum(1) / weights.sum(1).clamp(min=torch.finfo(torch.float32).tiny)
    return squared.unsqueeze(-1).flatten(1).mean(1)


def regression_target(z: Tensor, eps: Tensor, t: Tensor, quantity: Quantity, schedule: Schedule = _COND_OT) -> Tensor:
    """Returns what a network that predicts `quantity` is trained to predict at x_t = alpha z + beta eps, of z's shape.

    The velocity alpha' z + beta' eps (notes, eq. 31), the noise eps (Alg. 4, its second loss), the denoiser's z (eq. 43) or
    the score -eps / beta (Alg. 4, its first loss). The first three are exact at every t. The score is infinite where beta = 0 (t = 1):
    there, and wherever beta is smaller, `path.SMALLEST_DIVISOR` stands for beta. Weight its loss by `beta_squared`, which takes
    the infinity away again: beta^2 |s + eps / beta|^2 = |beta s + eps|^2 is the loss of the noise predictor -beta s.

    Args and errors: see `path.sample_path`, and ValueError for another name of a quantity.
    """
    if quantity not in QUANTITIES:
        raise ValueError(f"quantity must be one of {', '.join(QUANTITIES)}, got {quantity!r}")
    velocity = sample_path(z, eps, t, schedule).velocity  # checks the arguments
    if quantity == "velocity":
        return velocity
    if quantity == "denoiser":
        return z.to(velocity.dtype)
    if quantity == "noise":
        return eps.to(velocity.dtype)
    return -eps / schedule(expand_like(t, z)).beta.clamp(min=SMALLEST_DIVISOR)


def constant(t: Tensor, schedule: Schedule = _COND_OT) -> Tensor:
    """Returns 1 at every t: the loss as it is derived ("none" in diffusers' SD3 training)."""
    return torch.ones_like(t)


def beta_squared(t: Tensor, schedule: Schedule = _COND_OT) -> Tensor:
    """Returns beta_t^2, which makes the score's loss the noise predictor's (the constant dropped in notes, Example 22)."""
    return schedule(t).beta.square()


def inverse_beta_squared(t: Tensor, schedule: Schedule = _COND_OT) -> Tensor:
    """Returns 1 / beta_t^2, at most 10^6: with a denoiser and CondOT, the loss of the velocity.

    It is sigma^-2, "sigma_sqrt" in diffusers' SD3 training, which there meets no sigma below 1/1000. That is the bound here
    too: unbounded, it is infinite at t = 1.
    """
    return schedule(t).beta.clamp(min=1e-3) ** -2


def cosmap(t: Tensor, schedule: Schedule = _COND_OT) -> Tensor:
    """Returns 2 / (pi (alpha_t^2 + beta_t^2)), for CondOT the density `timesteps.CosMap` (SD3 paper, section 3.1).

    To weight uniform times by a density is, in the mean, to draw the times from it, at a higher variance.
    """
    at = schedule(t)
    return 2 / (math.pi * (at.alpha.square() + at.beta.square()))


@dataclass(frozen=True)
class MinSNR:
    """The weighting that gives the denoiser's loss the weight min(SNR, gamma), SNR = alpha^2 / beta^2.

    From Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy". Its form for the other quantities is
    that weight times (dD/dq)^2, so that one and the same thing is minimised whatever the network predicts:
    noise min(1, gamma / SNR), score beta^2 times that, velocity min(alpha^2, gamma beta^2) / k^2.

    Args:
        gamma: the bound, positive; 5 in the paper.
        quantity: what the network predicts.

    Raises:
        ValueError: gamma is not positive and finite, or another name of a quantity.
    """

    gamma: float = 5.0
    quantity: Quantity = "velocity"

    def __post_init__(self) -> None:
        if not (self.gamma > 0 and math.isfinite(self.gamma)):
            raise ValueError(f"gamma must be positive and finite, got {self.gamma}")
        if self.quantity not in QUANTITIES:
            raise ValueError(f"quantity must be one of {', '.join(QUANTITIES)}, got {self.quantity!r}")

    def __call__(self, t: Tensor, schedule: Schedule = _COND_OT) -> Tensor:
        """Returns the weight at t, of t's shape, finite at both ends."""
        at = schedule(t)
        signal, noise = at.alpha.square(), at.beta.square()
        if self.quantity == "velocity":
            k = (at.d_alpha * at.beta - at.alpha * at.d_beta).clamp(min=SMALLEST_DIVISOR)
            return torch.minimum(signal, self.gamma * noise) / k.square()
        if self.quantity == "denoiser":
            return (signal / noise).clamp(max=self.gamma)
        capped = (self.gamma * noise / signal).clamp(max=1)
        return capped if self.quantity == "noise" else noise * capped


WEIGHTINGS: dict[str, Weighting] = {
    "constant": constant,
    "beta_squared": beta_squared,
    "inverse_beta_squared": inverse_beta_squared,
    "cosmap": cosmap,
    "min_snr": MinSNR(),  # of a network that predicts velocity
}


def effective_weight(
    t: Tensor, quantity: Quantity, weighting: Weighting, density: Density, shift: float = 1.0, schedule: Schedule = _COND_OT
) -> Tensor:
    """Returns the weight, at time t, of the velocity's squared error in a training that is stated otherwise; of t's shape.

    It is w(t) (dq/dv)^2 p(t): training minimises its integral over t times E |v - u_t|^2, v being the velocity that the
    network's prediction amounts to. Equal effective weights, up to a factor, are equal trainings in the mean.

    Args:
        t: times in [0, 1], any shape.
        quantity: what the network predicts, q.
        weighting: w, the weight of its loss.
        density, shift: the law p that t is drawn from, as in `timesteps.draw_t`.
        schedule: alpha and beta; linear (CondOT) by default.

    Returns:
        A tensor of t's dtype. Where dq/dv divides by 0 (the score where beta = 0, all but the velocity where k = 0),
        `path.SMALLEST_DIVISOR` stands for that 0.

    Raises:
        ValueError: another name of a quantity, or shift is not positive and finite.
    """
    if quantity not in QUANTITIES:
        raise ValueError(f"quantity must be one of {', '.join(QUANTITIES)}, got {quantity!r}")
    at = schedule(t)
    slope = torch.ones_like(t)
    if quantity != "velocity":
        k = (at.d_alpha * at.beta - at.alpha * at.d_beta).clamp(min=SMALLEST_DIVISOR)
        slope = (at.beta if quantity == "denoiser" else at.alpha) / k
    if quantity == "score":
        slope = slope / at.beta.clamp(min=SMALLEST_DIVISOR)
    return weighting(t, schedule) * slope.square() * pdf_t(t, density, shift)


def by_time(losses: Tensor, t: Tensor, buckets: int) -> tuple[Tensor, Tensor]:
    """Returns the mean loss and the number of samples, [buckets] each, of equal intervals of t; the last includes t = 1.

    The loss has a floor that no training lowers, the variance of the velocity given x_t, and the floor differs from t
    to t: what a network still has to learn shows in the change of a bucket, not in the mean over all. An empty bucket has
    the mean nan and the count 0. A loss that is not finite spoils its own bucket and no other. The host does not wait
    for the device.

    Args:
        losses: one number a sample, [B]; detached.
        t: its time in [0, 1], [B].
        buckets: at least 1.

    Raises:
        ValueError: losses and t are not [B] each, or buckets is not an integer of at least 1.
    """
    require_count("buckets", buckets, 1)
    if losses.ndim != 1 or t.shape != losses.shape:
        raise ValueError(f"losses and t must be [B] each, got {tuple(losses.shape)} and {tuple(t.shape)}")
    bucket = (t * buckets).long().clamp(0, buckets - 1)
    member = bucket[:, None] == torch.arange(buckets, device=t.device)
    count = member.sum(0)
    total = torch.where(member, losses.detach()[:, None], 0).sum(0)
    return total / count, count
