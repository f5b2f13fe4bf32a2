"""The one place where the flow's time meets SD3's: t = 0 noise, t = 1 data here; sigma = 1 - t, prediction -u there."""

from typing import Any

import torch
from torch import Tensor, nn

from latentfm.models.routing import TokenRoute
from latentfm.models.schedule import Precomputed
from latentfm.models.text import Condition


def velocity(
    network: nn.Module,
    x: Tensor,
    t: Tensor,
    condition: Condition,
    token_route: TokenRoute | None = None,
    precomputed: Precomputed | None = None,
    skip_layers: list[int] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> Tensor:
    """Returns u_t(x | condition) in float32, shaped like x, from an SD3-style network.

    x [B, C, H, W] float32; t a scalar or [B] float32 in [0, 1]. The network (MMDiT or diffusers' SD3Transformer2DModel) is
    asked at timestep 1000 (1 - t) and answers eps - z = -u. Times stay in float32 whatever the network runs in.
    The rest are MMDiT.forward's; precomputed is looked up by t, which should then be on the CPU.
    """
    dtype = next(network.parameters()).dtype
    extra = {
        "token_route": token_route,
        "precomputed": precomputed,
        "skip_layers": skip_layers,
        "joint_attention_kwargs": joint_attention_kwargs,
    }
    prediction = network(
        hidden_states=x.to(dtype),
        timestep=(timesteps(t) if precomputed is not None else on_device(timesteps(t), x.device)).expand(x.shape[0]),
        encoder_hidden_states=condition.embeds.to(dtype),
        pooled_projections=condition.pooled.to(dtype),
        return_dict=False,
        **{name: value for name, value in extra.items() if value is not None},
    )[0]
    return -prediction.float()


def timesteps(t: Tensor) -> Tensor:
    """SD3's timesteps 1000 sigma = 1000 (1 - t), float32."""
    return (1000.0 * (1.0 - t)).float()


def time_at(timestep: Tensor) -> Tensor:
    """The time t of one of SD3's timesteps, in double precision, so that `timesteps` gives that very timestep back."""
    return 1.0 - timestep.double() / 1000.0


def times(sigmas: Tensor) -> Tensor:
    """The times t = 1 - sigma of SD3's noise levels, float32."""
    return 1.0 - sigmas.float()


def on_device(time: Tensor, device: torch.device) -> Tensor:
    """`time` on `device`; a scalar of the CPU is written there as a number, since a copy of it would make the host wait."""
    if time.ndim or time.device.type == device.type or time.device.type != "cpu":
        return time.to(device)
    return torch.full((), time.item(), dtype=time.dtype, device=device)
