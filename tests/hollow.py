"""Pipeline folders of Stable Diffusion 3's true sizes that take no room: their safetensors have headers and, for weights, holes."""

import json
import struct
from pathlib import Path

import torch

from latentfm.interchange.original import IDLE
from latentfm.interchange.weights import empty
from latentfm.models.presets import PRESETS

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20, "projection_dim": 1280}
CLIP = {"vocab_size": 49408, "max_position_embeddings": 77, "hidden_act": "gelu"}
T5 = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32128, "feed_forward_proj": "gated-gelu"}
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "sample_size": 1024,
    "scaling_factor": 1.5305, "shift_factor": 0.0609,
}  # fmt: skip
CLASSES = {
    "transformer": ["diffusers", "SD3Transformer2DModel"], "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"], "tokenizer": ["transformers", "CLIPTokenizer"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"], "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "text_encoder_3": ["transformers", "T5EncoderModel"], "tokenizer_3": ["transformers", "T5Tokenizer"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
}  # fmt: skip


def hollow_pipeline(folder: Path, preset: str) -> Path:
    """Writes a pipeline folder with the network of `preset` and SD3's frozen models, and returns it. Reading a weight there gives zeros."""
    texts = {"text_encoder": CLIP | CLIP_L, "text_encoder_2": CLIP | CLIP_G, "text_encoder_3": T5}
    parts = {"transformer": PRESETS[preset], "vae": VAE, **texts}
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
    for name, config in parts.items():
        (folder / name / "config.json").write_text(json.dumps(config))
        weights = {key: value for key, value in empty(name, config).state_dict().items() if not key.endswith(IDLE)}
        write_hollow(folder / name / "model.safetensors", weights)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline", **CLASSES}))
    return folder


def write_hollow(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes a safetensors file for float16 tensors of these names and shapes, sparse but for its header."""
    entries, place = {}, 0
    for name, value in tensors.items():
        entries[name] = {"dtype": "F16", "shape": list(value.shape), "data_offsets": [place, place + 2 * value.numel()]}
        place += 2 * value.numel()
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + place)
