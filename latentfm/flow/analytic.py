"""Data whose marginal fields are known in closed form, the oracle of everything else in this room.

For z from a mixture of isotropic Gaussians, sum_k w_k N(mu_k, s_k^2 I), the marginal path is a mixture as well,
p_t = sum_k w_k N(alpha mu_k, v_k I) with v_k = alpha^2 s_k^2 + beta^2, and x tells which component it came from with
probability r_k(x, t), a softmax. Every marginal field is the mean of the components' own under r (notes, eq. 18 and 38):

    E[z|x] = sum_k r_k (mu_k + alpha s_k^2 / v_k (x - alpha mu_k))     E[eps|x] = sum_k r_k beta / v_k (x - alpha mu_k)

A finite dataset is the mixture with every s_k = 0: its exact field is the one that a network with no limit would learn.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from latentfm.flow.fields import Field
from latentfm.flow.path import Ends, Quantity, expand_like
from latentfm.flow.schedules import Coefficients, CondOT, Schedule

_COND_OT = CondOT()


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """The data distribution sum_k w_k N(mu_k, s_k^2 I), and its marginal path under any schedule.

    Points x are [B, ...] with the shape of a mean behind the batch; t is a scalar, or [B]. The work is done in the widest
    dtype of x, t and the means, never below float32, and takes B K numbers beside the points (times a point's where t is [B]).

    Args:
        means: mu_k, [K, ...], floating point.
        stds: s_k >= 0, [K]; one number for all of them; 0 is a point.
        weights: w_k > 0, [K], of any sum; equal if not given.

    Raises:
        ValueError: no component, shapes that do not match, a negative std, or a weight that is not positive.
    """

    means: Tensor
    stds: Tensor | float = 1.0
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        if self.means.ndim < 2 or len(self.means) == 0 or not self.means.is_floating_point():
            raise ValueError(f"means must be [K, ...], floating point, K >= 1, got {self.means.dtype} {tuple(self.means.shape)}")
        count = self.means.shape[:1]
        stds = torch.as_tensor(self.stds, dtype=self.means.dtype, device=self.means.device)
        stds = stds.expand(count) if stds.ndim == 0 else stds
        weights = self.means.new_ones(count) if self.weights is None else self.weights.to(stds)
        proper = torch.isfinite(stds).all() and (stds >= 0).all() and torch.isfinite(weights).all() and (weights > 0).all()
        if stds.shape != count or weights.shape != count or not proper:
            raise ValueError(
                "stds must be >= 0, weights > 0, both finite and one for each mean, "
                f"got {stds.tolist()} and {weights.tolist()} for {len(self.means)} means"
            )
        object.__setattr__(self, "stds", stds)
        object.__setattr__(self, "weights", weights / weights.sum())

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Returns draws of the data, [count, ...]."""
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, *self.means.shape[1:], generator=generator, dtype=self.means.dtype, device=self.means.device)
        return self.means[which] + expand_like(self.stds[which], noise) * noise

    def log_density(self, x: Tensor, t: Tensor | float = 1.0, schedule: Schedule = _COND_OT) -> Tensor:
        """Returns log p_t(x) in nats, [B]: of the data itself at t = 1, where a finite dataset has no density (a huge number)."""
        _, _, logits, log_volume = self._components(x, t, schedule)
        return torch.logsumexp(logits - log_volume, dim=1)

    def responsibilities(self, x: Tensor, t: Tensor | float, schedule: Schedule = _COND_OT) -> Tensor:
        """Returns r_k(x, t), the probability that x came from component k, [B, K]."""
        _, _, logits, log_volume = self._components(x, t, schedule)
        return torch.softmax(logits - log_volume, dim=1)

    def ends(self, x: Tensor, t: Tensor | float, schedule: Schedule = _COND_OT) -> Ends:
        """Returns E[z|x] and E[eps|x] at (x, t), both of x's shape; the first is the denoiser (notes, eq. 43)."""
        at, variance, logits, log_volume = self._components(x, t, schedule)
        share = torch.softmax(logits - log_volume, dim=1)
        flat, means = x.flatten(1).to(share.dtype), self.means.flatten(1).to(share.dtype)
        # sum_k r_k c_k (x - alpha mu_k), with c_k the pull of each component, as two matrix products
        slack = share * (at.alpha * self.stds.to(share).square() / variance)
        noise = share * (at.beta / variance)
        z = share @ means + slack.sum(1, keepdim=True) * flat - at.alpha * (slack @ means)
        eps = noise.sum(1, keepdim=True) * flat - at.alpha * (noise @ means)
        return Ends(z=z.reshape(x.shape), eps=eps.reshape(x.shape))

    def quantity(self, name: Quantity, x: Tensor, t: Tensor | float, schedule: Schedule = _COND_OT) -> Tensor:
        """Returns the exact marginal "velocity" (eq. 18), "score", "denoiser" or "noise" at (x, t), of x's shape."""
        if name == "score":  # from the components, and not as -eps / beta, which a Gaussian at t = 1 has no use for
            at, variance, logits, log_volume = self._components(x, t, schedule)
            pull = torch.softmax(logits - log_volume, dim=1) / variance
            means = self.means.flatten(1).to(pull.dtype)
            return (at.alpha * (pull @ means) - pull.sum(1, keepdim=True) * x.flatten(1).to(pull.dtype)).reshape(x.shape)
        z, eps = self.ends(x, t, schedule)
        if name == "denoiser":
            return z
        if name == "noise":
            return eps
        if name != "velocity":
            raise ValueError(f"name must be velocity, score, denoiser or noise, got {name!r}")
        at = schedule(self._time(x, t))
        shape = (-1, *(1,) * (x.ndim - 1))
        return at.d_alpha.reshape(shape) * z + at.d_beta.reshape(shape) * eps

    def field(self, schedule: Schedule = _COND_OT) -> Field:
        """Returns the exact marginal velocity as a field u(x, t) to integrate."""
        return lambda x, t: self.quantity("velocity", x, t, schedule)

    def _time(self, x: Tensor, t: Tensor | float) -> Tensor:
        """t as a column [1, 1] or [B, 1] in the dtype of the work."""
        dtype = torch.promote_types(torch.promote_types(x.dtype, self.means.dtype), torch.float32)
        t = t.to(x.device) if isinstance(t, Tensor) else torch.tensor(t, dtype=dtype, device=x.device)
        if t.ndim and t.shape != x.shape[:1]:
            raise ValueError(f"t must be a scalar or [B], got {tuple(t.shape)} for x {tuple(x.shape)}")
        return t.to(torch.promote_types(dtype, t.dtype)).reshape(-1, 1)

    def _components(self, x: Tensor, t: Tensor | float, schedule: Schedule) -> tuple[Coefficients, Tensor, Tensor, Tensor]:
        """(schedule at t, v_k, log w_k - |x - alpha mu_k|^2 / 2 v_k, log of the normaliser of N(., v_k I)), broadcasting over [B, K]."""
        if x.shape[1:] != self.means.shape[1:]:
            raise ValueError(f"x must be [B, {', '.join(map(str, self.means.shape[1:]))}], got {tuple(x.shape)}")
        at = schedule(self._time(x, t))
        flat, means = x.flatten(1).to(at.alpha.dtype), self.means.flatten(1).to(at.alpha.dtype)
        variance = (at.alpha * self.stds.to(means)).square() + at.beta.square()
        # points have no width at t = 1: they get one far below beta^2 at any earlier t, and the nearest takes all with no 0 / 0
        variance = variance.clamp(min=torch.finfo(means.dtype).eps ** 4)
        # squared distances from differences: by |x|^2 - 2 x.m + |m|^2 they would be noise where v_k is small
        if len(at.alpha) == 1:
            apart = torch.cdist(flat, at.alpha * means, compute_mode="donot_use_mm_for_euclid_dist").square()
        else:
            apart = (flat[:, None] - at.alpha[:, None] * means).square().sum(2)
        log_volume = means.shape[1] / 2 * torch.log(2 * math.pi * variance)
        return at, variance, self.weights.to(means).log() - apart / (2 * variance), log_volume


def finite_dataset(points: Tensor, weights: Tensor | None = None) -> GaussianMixture:
    """Returns the distribution that puts its mass on the points [N, ...] alone; exact fields for t < 1.

    At t = 1 the denoiser is the nearest point, and the noise, of which x no longer tells anything, is given as 0.
    """
    return GaussianMixture(points, 0.0, weights)
