"""Network sizes by name: keyword arguments of MMDiT, from the bundled model's to SD3 medium's."""

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
    # the bundled model: 64 px through a factor-4 VAE is 16 x 16 latents, patch 4 makes 16 tokens of them
    "emoji": size(
        8, 4, sample_size=16, patch_size=4, in_channels=12, out_channels=12,
        joint_attention_dim=320, pooled_projection_dim=320, pos_embed_max_size=16,
    ),
    "small": size(12, 6),  # 65M: 12 x 384
    "base": size(12, 12),  # 255M: 12 x 768
    "large": size(24, 16),  # 904M: 24 x 1024
    "sd3-medium": size(24, 24, qk_norm=None),  # 2.03B
}  # fmt: skip
