"""Network sizes by name: keyword arguments of MMDiT, from the bundled model's to the SD3 paper's 8B."""

from typing import Any


def size(layers: int, heads: int, **more: Any) -> dict[str, Any]:
    """Arguments of an MM-DiT with `layers` blocks of `heads` heads of 64; SD3's other settings unless in `more`."""
    settings: dict[str, Any] = {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": 64,
        "caption_projection_dim": heads * 64,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
        "qk_norm": "rms_norm",
    }
    return settings | more


PRESETS: dict[str, dict[str, Any]] = {
    # scripts/emoji's: 128 px through a factor-8 VAE is 16 x 16 latents, patch 2 makes 64 tokens of them. Patch 4 would make 16 of 256
    # numbers each, as many as the network is wide: after 1,500 steps it drew noise, where patch 2 drew shapes after 500
    "emoji": size(
        6, 4, sample_size=16, patch_size=2, in_channels=16, out_channels=16,
        joint_attention_dim=320, pooled_projection_dim=320, pos_embed_max_size=16,
    ),
    "small": size(12, 6),  # 65M: 12 x 384, for trying things out
    "base": size(12, 12),  # 255M: 12 x 768, from scratch on few GPUs
    # the SD3 paper's scaling (section 5.3): depth d, d heads of 64, width 64 d
    "depth15": size(15, 15),  # 496M: the smallest of the paper's
    "large": size(24, 16),  # 904M: 24 x 1024, deep for its width
    "depth21": size(21, 21),  # 1.36B: between large and the medium models
    "sd3-medium": size(24, 24, qk_norm=None),  # 2.03B: Stable Diffusion 3 medium, to fine-tune its weights
    "sd3.5-medium": size(24, 24, pos_embed_max_size=384, dual_attention_layers=tuple(range(13))),  # 2.24B: its weights; up to 1440 px
    "depth30": size(30, 30),  # 3.96B: between the medium and the large model
    "sd3.5-large": size(38, 38),  # 8.06B: Stable Diffusion 3.5 large, the paper's 8B
}  # fmt: skip
