"""SD3's original naming of its weights, as in the released single files, and diffusers' naming: one into the other, both ways.

Original: model.diffusion_model. the MM-DiT, first_stage_model. the VAE (latent diffusion's names), text_encoders.clip_l / clip_g /
t5xxl.transformer. the encoders (transformers' names). Checked against diffusers.loaders.single_file_utils. What a component's
configuration is can be read from the names and shapes in diffusers' naming, all but a few settings that leave no trace there.
"""

import math
from dataclasses import replace
from typing import Any

from latentfm.errors import InputError
from latentfm.interchange.tensors import Tensors, join
from latentfm.models.encoders import ENCODERS

# The prefix of each component in a single file, the first being the one written
PREFIXES = {
    "transformer": ("model.diffusion_model.", "diffusion_model.", "transformer.", ""),
    "vae": ("first_stage_model.", "vae."),
    **{encoder.name: (encoder.prefix,) for encoder in ENCODERS},
}
# What programs save beside the weights, and nothing reads
IDLE = ("logit_scale", "position_ids", "model_sampling.sigmas", "encoder.embed_tokens.weight")
MOST_BLOCKS = 512
SD3_SCALING, SD3_SHIFT = 1.5305, 0.0609  # of the latents of SD3's VAE

Table = dict[str, tuple[str, ...]]  # original module -> diffusers' module, or the three that its rows are split into

TOP: Table = {
    "pos_embed": ("pos_embed.pos_embed",),
    "x_embedder.proj": ("pos_embed.proj",),
    "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
    "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
    "context_embedder": ("context_embedder",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
IMAGE: Table = {
    "adaLN_modulation.1": ("norm1.linear",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
} | {
    f"{attention}.{original}": tuple(f"{attention}.{name}" for name in names)
    for attention in ("attn", "attn2")
    for original, names in {
        "qkv": ("to_q", "to_k", "to_v"), "proj": ("to_out.0",), "ln_q": ("norm_q",), "ln_k": ("norm_k",),
    }.items()
}  # fmt: skip
TEXT: Table = {
    "adaLN_modulation.1": ("norm1_context.linear",),
    "mlp.fc1": ("ff_context.net.0.proj",),
    "mlp.fc2": ("ff_context.net.2",),
    "attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "attn.proj": ("attn.to_add_out",),
    "attn.ln_q": ("attn.norm_added_q",),
    "attn.ln_k": ("attn.norm_added_k",),
}


def transformer_table(layers: int) -> Table:
    """The modules of an MM-DiT of `layers` blocks; which of them there are, its configuration says."""
    table = dict(TOP)
    for i in range(layers):
        for stream, modules in (("x_block", IMAGE), ("context_block", TEXT)):
            for original, names in modules.items():
                table[f"joint_blocks.{i}.{stream}.{original}"] = tuple(f"transformer_blocks.{i}.{name}" for name in names)
    return table


def swapped(layers: int) -> set[str]:
    """The modulations (original names) whose two halves are shift and scale where diffusers has scale and shift."""
    return {"final_layer.adaLN_modulation.1", f"joint_blocks.{layers - 1}.context_block.adaLN_modulation.1"}


def vae_table(levels: int, blocks: int) -> Table:
    """The modules of a latent diffusion VAE of `levels` resolutions and at most `blocks` residual blocks in each."""
    table = {name: (name,) for name in ("quant_conv", "post_quant_conv")}

    def add_block(original: str, name: str) -> None:
        table.update({f"{original}.{part}": (f"{name}.{part}",) for part in ("norm1", "conv1", "norm2", "conv2")})
        table[f"{original}.nin_shortcut"] = (f"{name}.conv_shortcut",)

    for side, down, resample in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        table |= {f"{side}.{name}": (f"{side}.{name}",) for name in ("conv_in", "conv_out")}
        table[f"{side}.norm_out"] = (f"{side}.conv_norm_out",)
        for i in range(levels):
            level = i if side == "encoder" else levels - 1 - i  # the original counts the decoder's from the finest
            for j in range(blocks):
                add_block(f"{side}.{down}.{i}.block.{j}", f"{side}.{down}_blocks.{level}.resnets.{j}")
            table[f"{side}.{down}.{i}.{resample}.conv"] = (f"{side}.{down}_blocks.{level}.{resample}rs.0.conv",)
        for j in range(2):
            add_block(f"{side}.mid.block_{j + 1}", f"{side}.mid_block.resnets.{j}")
        attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
        table |= {f"{side}.mid.attn_1.{o}": (f"{side}.mid_block.attentions.0.{name}",) for o, name in attention.items()}
    return table


def to_diffusers(tensors: Tensors, table: Table, halves_swapped: set[str]) -> Tensors:
    """The same tensors under diffusers' names, split as there; what the table does not know keeps its name."""
    left, found = dict(tensors), {}
    for original, names in table.items():
        for kind in ("", ".weight", ".bias"):
            if (stored := left.pop(original + kind, None)) is None:
                continue
            parts = [stored] if len(names) == 1 else stored.chunk(len(names))
            if original in halves_swapped:
                parts = [join(stored.chunk(2)[::-1])]
            found |= {name + kind: part for name, part in zip(names, parts, strict=True)}
    return found | left


def to_original(tensors: Tensors, table: Table, halves_swapped: set[str]) -> Tensors:
    """The inverse of to_diffusers."""
    left, found = dict(tensors), {}
    for original, names in table.items():
        for kind in ("", ".weight", ".bias"):
            if names[0] + kind not in left:
                continue
            stored = join([left.pop(name + kind) for name in names])
            found[original + kind] = join(stored.chunk(2)[::-1]) if original in halves_swapped else stored
    return found | left


def transformer_to_diffusers(tensors: Tensors) -> Tensors:
    """An MM-DiT's tensors in the original naming, without prefix, in diffusers'."""
    layers = count(tensors, "joint_blocks.")
    return to_diffusers(tensors, transformer_table(layers), swapped(layers))


def transformer_to_original(tensors: Tensors) -> Tensors:
    layers = count(tensors, "transformer_blocks.")
    return to_original(tensors, transformer_table(layers), swapped(layers))


def vae_to_diffusers(tensors: Tensors) -> Tensors:
    """A VAE's tensors in latent diffusion's naming, without prefix, in diffusers': its attention as matrices, not 1 x 1 convolutions."""
    levels = count(tensors, "encoder.down.")
    table = vae_table(levels, max((count(tensors, f"decoder.up.{i}.block.") for i in range(levels)), default=0))
    return {
        name: replace(stored, shape=stored.shape[:2]) if attention_matrix(name) else stored
        for name, stored in to_diffusers(tensors, table, set()).items()
    }


def vae_to_original(tensors: Tensors) -> Tensors:
    levels = count(tensors, "encoder.down_blocks.")
    table = vae_table(levels, max((count(tensors, f"decoder.up_blocks.{i}.resnets.") for i in range(levels)), default=0))
    reshaped = {
        name: replace(stored, shape=(*stored.shape, 1, 1)) if attention_matrix(name) else stored for name, stored in tensors.items()
    }
    return to_original(reshaped, table, set())


def attention_matrix(name: str) -> bool:
    return ".attentions.0.to_" in name and name.endswith(".weight")


def count(tensors: Tensors, before: str) -> int:
    """How many there are of the modules that `before` numbers: 1 + the largest number that follows it in a name.

    Raises InputError for a number beyond every model's.
    """
    numbers = {name.removeprefix(before).split(".")[0] for name in tensors if name.startswith(before)}
    decimal = [number for number in numbers if number.isdecimal() and number.isascii()]
    if huge := [number for number in decimal if len(number) > 4 or int(number) >= MOST_BLOCKS]:
        raise InputError(f"there is a tensor of {before}{huge[0][:20]} among these; at most {MOST_BLOCKS} are read")
    return 1 + max(map(int, decimal), default=-1)


def shape_of(tensors: Tensors, name: str, dimensions: int) -> tuple[int, ...]:
    """The shape of a tensor that a configuration is read from. Raises InputError when it is missing or has other dimensions."""
    if name not in tensors:
        raise InputError(f"there is no {name} among these {len(tensors)} tensors; the file or folder is not complete")
    if len(tensors[name].shape) != dimensions:
        raise InputError(f"{name} has the shape {list(tensors[name].shape)}; it should have {dimensions} dimensions")
    return tensors[name].shape


def transformer_config(tensors: Tensors, sample_size: int = 128) -> dict[str, Any]:
    """MMDiT's arguments for these tensors (diffusers' names); sample_size, the latents' side, leaves no trace in them.

    Heads are 64 wide unless qk-norm weights show their width. Raises InputError when the tensors fit no MM-DiT.
    """
    dim, in_channels, patch, _ = shape_of(tensors, "pos_embed.proj.weight", 4)
    places = shape_of(tensors, "pos_embed.pos_embed", 3)[1]
    norm = "transformer_blocks.0.attn.norm_q.weight"
    head_dim = shape_of(tensors, norm, 1)[0] if norm in tensors else 64
    if dim % head_dim:
        raise InputError(f"a width of {dim} does not divide into heads of {head_dim}")
    layers = count(tensors, "transformer_blocks.")
    return {
        "sample_size": sample_size,
        "patch_size": patch,
        "in_channels": in_channels,
        "num_layers": layers,
        "attention_head_dim": head_dim,
        "num_attention_heads": dim // head_dim,
        "joint_attention_dim": shape_of(tensors, "context_embedder.weight", 2)[1],
        "caption_projection_dim": dim,
        "pooled_projection_dim": shape_of(tensors, "time_text_embed.text_embedder.linear_1.weight", 2)[1],
        "out_channels": shape_of(tensors, "proj_out.weight", 2)[0] // patch**2,
        "pos_embed_max_size": math.isqrt(places),
        "dual_attention_layers": [i for i in range(layers) if f"transformer_blocks.{i}.attn2.to_q.weight" in tensors],
        "qk_norm": "rms_norm" if norm in tensors else None,
    }


def vae_config(tensors: Tensors) -> dict[str, Any]:
    """AutoencoderKL's arguments for these tensors (diffusers' names), scale and shift SD3's.

    Raises InputError for another number of latent channels than SD3's 16, whose scale cannot be known.
    """
    levels = count(tensors, "encoder.down_blocks.")
    channels = shape_of(tensors, "decoder.conv_in.weight", 4)[1]
    if channels != 16:
        raise InputError(
            f"this VAE has {channels} latent channels, SD3's has 16: how its latents are scaled is not in the weights; "
            "give the pipeline folder it belongs to, whose vae/config.json says it"
        )
    return {
        "in_channels": shape_of(tensors, "encoder.conv_in.weight", 4)[1],
        "out_channels": shape_of(tensors, "decoder.conv_out.weight", 4)[0],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": [shape_of(tensors, f"encoder.down_blocks.{i}.resnets.0.conv1.weight", 4)[0] for i in range(levels)],
        "layers_per_block": count(tensors, "encoder.down_blocks.0.resnets."),
        "latent_channels": channels,
        "sample_size": 1024,
        "scaling_factor": SD3_SCALING,
        "shift_factor": SD3_SHIFT,
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in tensors,
    }


def clip_config(tensors: Tensors, act: str) -> dict[str, Any]:
    """CLIPTextConfig's arguments for these tensors; `act` is "quick_gelu" in SD3's first encoder, "gelu" in its second."""
    vocabulary, width = shape_of(tensors, "text_model.embeddings.token_embedding.weight", 2)
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shape_of(tensors, "text_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": count(tensors, "text_model.encoder.layers."),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": shape_of(tensors, "text_model.embeddings.position_embedding.weight", 2)[0],
        "projection_dim": shape_of(tensors, "text_projection.weight", 2)[0],
        "hidden_act": act,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1 if act == "quick_gelu" else 0,
    }


def t5_config(tensors: Tensors) -> dict[str, Any]:
    """T5Config's arguments for these tensors: T5 v1.1's, as SD3's, where they leave no trace."""
    vocabulary, width = shape_of(tensors, "shared.weight", 2)
    attention, feed_forward = "encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense"
    buckets, heads = shape_of(tensors, f"{attention}.relative_attention_bias.weight", 2)
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shape_of(tensors, f"{attention}.q.weight", 2)[0] // heads,
        "d_ff": shape_of(tensors, f"{feed_forward}.wo.weight", 2)[1],
        "num_layers": count(tensors, "encoder.block."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu" if f"{feed_forward}.wi_0.weight" in tensors else "relu",
        "decoder_start_token_id": 0,
    }
