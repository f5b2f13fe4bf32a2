"""What a training step minimises: the conditional flow-matching loss with label dropout (notes, Algorithm 5)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latentfm import flow
from latentfm.config import TokenRouting, TrainOptions
from latentfm.data.loader import Batch
from latentfm.errors import InputError
from latentfm.models import vae as vae_room
from latentfm.models.routing import TokenRoute
from latentfm.models.text import NullCondition, PromptParts, assemble
from latentfm.models.velocity import velocity


@dataclass(frozen=True)
class Objective:
    """How times are drawn and weighted, what the VAE's latents are scaled by, and which blocks route tokens."""

    density: flow.Density
    t_shift: float
    weighting: flow.Weighting
    latent_shift: float
    latent_scale: float
    routing: TokenRouting | None = None
    one_step: bool = False  # trained at t = 0 alone

    @classmethod
    def of(cls, options: TrainOptions, vae: Any) -> "Objective":
        """The objective of `options` for latents of `vae`. Raises InputError for a parameter of the density out of its range."""
        weighting = flow.WEIGHTINGS[options.loss_weighting]
        return cls(density(options), options.t_shift, weighting, *vae_room.shift_and_scale(vae), options.token_routing, options.one_step)

    def times(self, u: Tensor) -> Tensor:
        """The times t that uniform draws u come to, of u's shape."""
        return torch.zeros_like(u) if self.one_step else flow.draw_t(u, self.density, self.t_shift)


def density(options: TrainOptions) -> flow.Density:
    """The law of sigma that t is drawn from. Raises InputError for a parameter out of its range."""
    try:
        return flow.DENSITIES[options.t_density](**options.t_density_options)
    except ValueError as error:
        raise InputError(f"train.t_density_options of {options.t_density}: {error}") from None


def cfm_losses(network: nn.Module, batch: Batch, null: NullCondition, objective: Objective) -> tuple[Tensor, Tensor]:
    """(the conditional flow-matching loss of each sample, its time), [B] float32 each; the losses are not weighted.

    Times are drawn by the objective's density; dropped encoders read the null condition (notes, Algorithm 5, with the target
    alpha' z + beta' eps).
    """
    t = objective.times(batch.u)
    absent = null.parts(batch.t5_length).map(lambda value: value.to(batch.u.device))
    return losses_at(network, batch, t, batch.parts.drop(batch.dropped, absent), objective), t


def losses_at(network: nn.Module, batch: Batch, t: Tensor, parts: PromptParts, objective: Objective) -> Tensor:
    """The conditional flow-matching loss of each sample at times t [B], [B] float32."""
    prediction, path = predict(network, batch, t, parts, objective)
    return flow.cfm_loss(prediction, path.velocity, batch.mask)


def predict(network: nn.Module, batch: Batch, t: Tensor, parts: PromptParts, objective: Objective) -> tuple[Tensor, flow.PathSample]:
    """(the network's velocity, the sample of the path it was asked at) at times t [B]: the one place where latents are noised.

    z is a draw from the VAE's posterior, scaled, or of a pair what its eps was carried to; x_t and the target come from the CondOT path.
    At t = 0 the mean squared error between the two is |(eps + u) - z|^2: that of one Euler step (reflow's distillation, Liu et al. 2022).
    """
    z = batch.latents
    if z is None:
        z = vae_room.sample_latents(batch.moments, batch.vae_noise, objective.latent_shift, objective.latent_scale)
    path = flow.sample_path(z, batch.eps, t)
    condition = assemble(parts.map(Tensor.float), *condition_widths(network))
    route = None
    if batch.kept is not None:
        route = TokenRoute(batch.kept, *objective.routing.blocks(network_config(network).num_layers))
    return velocity(network, path.x_t, t, condition, token_route=route), path


def weights_of(t: Tensor, prior: Tensor | None, objective: Objective, prior_weight: float) -> Tensor:
    """What each sample's loss counts, [B]: w(t), times prior_weight in a regularisation set (DreamBooth, Ruiz et al. 2023)."""
    weights = objective.weighting(t, flow.CondOT())
    return weights if prior is None else torch.where(prior, prior_weight * weights, weights)


def condition_widths(network: nn.Module) -> tuple[int, int]:
    """(joint_attention_dim, pooled_projection_dim) of a network, wrapped for many processes or not."""
    config = network_config(network)
    return config.joint_attention_dim, config.pooled_projection_dim


def network_config(network: nn.Module) -> Any:
    """The configuration of a network, wrapped for many processes or not."""
    return getattr(network, "module", network).config
