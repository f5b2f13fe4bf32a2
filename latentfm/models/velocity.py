"""The one place where the flow's time meets SD3's: t = 0 noise, t = 1 data here; sigma = 1 - t, prediction -u there."""

from torch import Tensor, nn

from latentfm.models.text import Condition


def velocity(network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """Returns u_t(x | condition) in float32, shaped like x, from an SD3-style network.

    x [B, C, H, W] float32; t a scalar or [B] float32 in [0, 1]. The network (MMDiT or diffusers' SD3Transformer2DModel) is
    asked at timestep 1000 (1 - t) and answers eps - z = -u. Times stay in float32 whatever the network runs in.
    """
    dtype = next(network.parameters()).dtype
    timestep = (1000.0 * (1.0 - t.float())).expand(x.shape[0])
    prediction = network(
        hidden_states=x.to(dtype),
        timestep=timestep,
        encoder_hidden_states=condition.embeds.to(dtype),
        pooled_projections=condition.pooled.to(dtype),
        return_dict=False,
    )[0]
    return -prediction.float()
