"""open_clip's vocabulary and text towers as transformers' classes."""

import gzip

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from latentfm.errors import InputError


def clip_tokenizer(pad_token: str = "<|endoftext|>", length: int = 77) -> CLIPTokenizer:
    """CLIP's tokenizer as transformers' class, made from the vocabulary that open_clip carries: no download.

    SD3 pads its first encoder with the end of the text, "<|endoftext|>", its second with "!", which is id 0. `length` is the number of
    tokens the encoder reads. Equal to open_clip's tokenizer but for two things: open_clip first mends broken Unicode and HTML, and a
    "!" in a prompt is id 0 to the tokenizer that pads with it, as in SD3's published folders.
    """
    from open_clip.tokenizer import bytes_to_unicode, default_bpe

    with gzip.open(default_bpe(), "rt", encoding="utf-8") as lines:
        merges = [tuple(line.split()) for line in lines][1 : 49152 - 256 - 2 + 1]  # as released; the rest was never used
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad_token, model_max_length=length)


def open_clip_text_to_transformers(model: torch.nn.Module) -> CLIPTextModelWithProjection:
    """The text tower of an open_clip `CLIP` as transformers' class, equal in hidden states and projection.

    `model` is an open_clip.model.CLIP with the standard text tower (causal, argmax pooling, linear projection without
    bias). The end-of-text token must be the highest id of the vocabulary, as in CLIP; padding may be any other id or itself.
    """
    if model.text_pool_type != "argmax" or model.attn_mask is None or not isinstance(model.text_projection, torch.nn.Parameter):
        raise InputError(
            "this open_clip text tower has no transformers twin: it must be causal, pool at the end-of-text token (argmax) "
            "and project linearly without bias"
        )
    state = {name: value.detach() for name, value in model.state_dict().items() if not name.startswith("visual.")}
    layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("transformer.resblocks."))
    vocabulary, width = state["token_embedding.weight"].shape
    block = model.transformer.resblocks[0]
    act = type(block.mlp.gelu).__name__
    acts = {"GELU": "gelu", "QuickGELU": "quick_gelu"}
    if act not in acts:
        raise InputError(f"this open_clip text tower uses {act}; only {' and '.join(acts)} have a transformers twin")
    if getattr(block.mlp.gelu, "approximate", "none") != "none":
        raise InputError(f"this open_clip text tower approximates its GELU ({block.mlp.gelu}), which has no transformers twin here")
    projection = state["text_projection"]
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        num_hidden_layers=layers,
        num_attention_heads=block.attn.num_heads,
        max_position_embeddings=state["positional_embedding"].shape[0],
        projection_dim=projection.shape[1],
        hidden_act=acts[act],
        layer_norm_eps=block.ln_1.eps,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    converted = CLIPTextModelWithProjection(config)
    converted.load_state_dict(open_clip_text_state(state, layers), strict=True)
    return converted.eval()


def open_clip_text_state(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """transformers' names and shapes for an open_clip text tower's state dict (its fused qkv split in three).

    Raises InputError when a tensor is left over: it would be lost in silence.
    """
    left = dict(state)
    renamed = {
        "text_model.embeddings.token_embedding.weight": left.pop("token_embedding.weight"),
        "text_model.embeddings.position_embedding.weight": left.pop("positional_embedding"),
        "text_model.final_layer_norm.weight": left.pop("ln_final.weight"),
        "text_model.final_layer_norm.bias": left.pop("ln_final.bias"),
        "text_projection.weight": left.pop("text_projection").T.contiguous(),
    }
    pairs = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
    pairs |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for layer in range(layers):
        source, target = f"transformer.resblocks.{layer}", f"text_model.encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            for theirs, ours in pairs.items():
                renamed[f"{target}.{ours}.{kind}"] = left.pop(f"{source}.{theirs}.{kind}")
            for name, value in zip("qkv", left.pop(f"{source}.attn.in_proj_{kind}").chunk(3), strict=True):
                renamed[f"{target}.self_attn.{name}_proj.{kind}"] = value.contiguous()
    if unknown := sorted(left.keys() - {"logit_scale", "logit_bias"}):
        raise InputError(f"this open_clip text tower has {', '.join(unknown[:4])}, which have no transformers twin")
    return renamed
