"""Small MMDiTs beside SD3Transformer2DModels of the same weights, and inputs for them."""

import torch
from diffusers import SD3Transformer2DModel

from latentfm.models.mmdit import MMDiT

TINY = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 16,
    "num_attention_heads": 3, "joint_attention_dim": 40, "caption_projection_dim": 48, "pooled_projection_dim": 24,
    "pos_embed_max_size": 12,
}  # fmt: skip
VARIANTS = {
    "sd3": {},
    "sd3.5-large": {"qk_norm": "rms_norm"},
    "sd3.5-medium": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1), "pos_embed_max_size": 16},
    "dual everywhere": {"dual_attention_layers": (0, 1, 2)},
    "patch 4": {"patch_size": 4, "sample_size": 16, "in_channels": 12, "out_channels": 12, "qk_norm": "rms_norm"},
    "learned variance": {"out_channels": 8, "num_layers": 1},
    "out_channels None": {"out_channels": None},
}
SHAPES = {"square": (2, 8, 8, 9, 2), "wide": (3, 8, 16, 5, 3), "tall": (1, 16, 4, 21, 1), "one time": (2, 4, 4, 1, 1)}


def twins(seed: int = 0, **changes) -> tuple[MMDiT, SD3Transformer2DModel]:
    """An MMDiT and an SD3Transformer2DModel with the same weights, every one of them random, and away from its default."""
    torch.manual_seed(seed)
    theirs = SD3Transformer2DModel(**(TINY | changes))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            centre = 1.0 if ".norm_" in name else 0.0
            spread = 0.25 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(centre + spread * torch.randn_like(parameter))
    ours = MMDiT(**(TINY | changes))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def inputs(model: MMDiT, shape: str = "square", dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random inputs of SHAPES[shape] = (batch, height, width, text tokens, times), timesteps fractional."""
    batch, height, width, tokens, times = SHAPES[shape]
    generator = torch.Generator().manual_seed(1)
    made = {
        "hidden_states": torch.randn(batch, model.config.in_channels, height, width, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(batch, tokens, model.config.joint_attention_dim, generator=generator).to(dtype),
        "pooled_projections": torch.randn(batch, model.config.pooled_projection_dim, generator=generator).to(dtype),
    }
    return made | {"timestep": torch.tensor([987.654, 0.3217, 500.05])[:times]}


def difference(ours, theirs, **given) -> float:
    """The largest absolute difference of their outputs, after checking that there is an output to differ in."""
    with torch.no_grad():
        mine, reference = ours(**given).sample, theirs(**given).sample
    assert mine.shape == reference.shape and reference.std() > 0.1
    return (mine - reference).abs().max().item()
