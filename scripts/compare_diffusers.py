"""Print how far latentfm is from stock diffusers on the same weights: MM-DiT forward and gradients, and whole pictures.

    python scripts/compare_diffusers.py        # a minute on two CPU cores

MM-DiT: three small networks (plain, rms qk-norm, SD3.5's dual attention) against SD3Transformer2DModel in float32.
Pictures: LatentFMPipeline against StableDiffusion3Pipeline on the bundled model, same seeds, T5 padded to 16 and to 256.
"""

import numpy as np
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from latentfm import LatentFMPipeline, MMDiT, bundled_model

SMALL = {
    "sample_size": 16, "in_channels": 16, "out_channels": 16, "num_layers": 4, "attention_head_dim": 64, "num_attention_heads": 6,
    "joint_attention_dim": 256, "caption_projection_dim": 384, "pooled_projection_dim": 128, "pos_embed_max_size": 32,
}  # fmt: skip
PROMPTS = ["a slice of pizza", "red apple, noto style", "a rocket, twemoji style", ""]
KINDS = {"plain": {}, "rms qk-norm": {"qk_norm": "rms_norm"}, "dual": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}}


def networks(changes: dict) -> tuple[float, float, float]:
    """Largest absolute difference of the output, of any gradient, and the largest gradient itself."""
    torch.manual_seed(0)
    theirs, ours = SD3Transformer2DModel(**SMALL, **changes), MMDiT(**SMALL, **changes)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    inputs = (torch.randn(2, 16, 16, 12), torch.randn(2, 40, 256), torch.randn(2, 128), torch.tensor([3.5, 987.0]))
    out = [network(*inputs, return_dict=False)[0] for network in (theirs, ours)]
    for value in out:
        value.square().mean().backward()
    gradients = [{name: p.grad for name, p in network.named_parameters()} for network in (theirs, ours)]
    worst = max((gradients[0][name] - gradients[1][name]).abs().max().item() for name in gradients[0])
    return (out[0] - out[1]).abs().max().item(), worst, max(g.abs().max().item() for g in gradients[0].values())


def main() -> None:
    for kind, changes in KINDS.items():
        forward, gradient, largest = networks(changes)
        print(f"MM-DiT, {kind}: forward {forward:.1e}, gradients {gradient:.1e} (the largest gradient is {largest:.1e})")
    ours = LatentFMPipeline.from_pretrained(bundled_model())
    stock = StableDiffusion3Pipeline.from_pretrained(bundled_model())  # as a stock user does: no dtype, no other argument
    for length in (16, 256):
        pictures = []
        for pipe in (ours, stock):
            pipe.set_progress_bar_config(disable=True)
            seeds = [torch.Generator().manual_seed(seed) for seed in range(4)]
            call = {"num_inference_steps": 28, "guidance_scale": 3.0, "output_type": "np", "max_sequence_length": length}
            pictures.append(pipe(PROMPTS, generator=seeds, **call).images)
        print(f"pictures, T5 length {length}: largest difference {np.abs(pictures[0] - pictures[1]).max() * 255:.1e} of 255 levels")


if __name__ == "__main__":
    main()
