"""The networks that configurations make, without memory, and whether numbers are numbers."""

from typing import Any

import torch
from diffusers import AutoencoderKL
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from latentfm.models.mmdit import MMDiT

# What of a text encoder's configuration decides what it computes. Nothing else of it is read: other settings choose an implementation of
# attention, which may be code on the hub, the form of the output, or files elsewhere
CLIP_SETTINGS = (
    "vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "hidden_act", "layer_norm_eps", "attention_dropout", "initializer_range", "initializer_factor",
    "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip
T5_SETTINGS = (
    "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads", "relative_attention_num_buckets",
    "relative_attention_max_distance", "dropout_rate", "layer_norm_epsilon", "initializer_factor", "feed_forward_proj", "dense_act_fn",
    "is_gated_act", "pad_token_id", "eos_token_id", "decoder_start_token_id", "tie_word_embeddings",
)  # fmt: skip


def empty(name: str, config: dict[str, Any]) -> nn.Module:
    """The network of component `name` without memory: parameters and buffers on the meta device."""
    with torch.device("meta"):
        if name == "transformer":
            return MMDiT.from_config(config)
        if name == "vae":
            return AutoencoderKL.from_config(config)
        if name == "text_encoder_3":
            return T5EncoderModel(text_config(name, config))
        return CLIPTextModelWithProjection(text_config(name, config))


def text_config(name: str, config: dict[str, Any]) -> CLIPTextConfig | T5Config:
    """The configuration of a text encoder as transformers has it: what decides its numbers, and nothing besides.

    Raises ValueError for settings of another type.
    """
    kind, settings = (T5Config, T5_SETTINGS) if name == "text_encoder_3" else (CLIPTextConfig, CLIP_SETTINGS)
    try:
        made = kind.from_dict({key: config[key] for key in settings if key in config})
    except StrictDataclassError as error:
        raise ValueError(str(error)) from error
    if isinstance(made, CLIPTextConfig) and type(made.eos_token_id) is not int:
        raise ValueError("its eos_token_id is no number, and the end of a text is where its pooled state is read")
    if isinstance(made, T5Config):
        exact = made.relative_attention_num_buckets // 4  # distances that have a bucket of their own
        if not 0 < exact < made.relative_attention_max_distance:
            raise ValueError("its relative_attention_num_buckets and relative_attention_max_distance do not go together")
    return made


def all_finite(value: Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinity: its least and greatest number would be one. Reads it once, makes no copy."""
    if not value.is_floating_point() or value.itemsize == 1 or value.numel() == 0:  # float8 is only ever read on
        return True
    least, greatest = torch.aminmax(value.detach())
    return bool(least.isfinite() & greatest.isfinite())
