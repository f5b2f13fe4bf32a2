"""What a file of weights is, told by the names of its tensors, so that a wrong one is refused by what it is."""

import re
from collections.abc import Iterable

MMDIT, LORA = "an SD3 MM-DiT", "a LoRA"

# (what it is, patterns that must each match some name). The first that fits counts, the most particular being first.
SIGNS: list[tuple[str, tuple[str, ...]]] = [
    (LORA, (
        r"\.lora_(A|B|up|down|magnitude)|[._]lora\.(up|down)|lora_linear_layer|^lora_(unet|te|transformer)|^lycoris_"
        r"|\.(lokr|hada|b?oft)_|\.dora_scale|\.diff(_b)?$",
    )),
    ("a ControlNet", (r"(^|\.)(control_model|controlnet_(blocks|down_blocks|x_embedder|cond_embedding))\.",)),
    ("an IP-Adapter", (r"^(ip_adapter|image_proj)\.",)),
    ("a Flux transformer", (r"(^|\.)double_blocks\.0\.img_attn\.norm\.", r"(^|\.)single_blocks\.0\.")),
    ("a HunyuanVideo transformer", (r"(^|\.)double_blocks\.0\.img_attn_qkv",)),
    ("a HunyuanVideo transformer", (r"^context_embedder\.token_refiner\.",)),
    ("a Flux transformer", (r"(^|\.)single_transformer_blocks\.0\.", r"(^|\.)transformer_blocks\.0\.")),
    (MMDIT, (r"(^|\.)joint_blocks\.\d+\.context_block\.", r"(^|\.)x_embedder\.proj\.")),
    (MMDIT, (r"(^|\.)transformer_blocks\.\d+\.attn\.add_k_proj\.", r"(^|\.)pos_embed\.proj\.", r"(^|\.)context_embedder\.weight")),
    ("an AuraFlow transformer", (r"(^|\.)double_layers\.0\.|(^|\.)joint_transformer_blocks\.0\.",)),
    ("a Qwen-Image transformer", (r"(^|\.)transformer_blocks\.0\.img_mod\.",)),
    ("a Wan video transformer", (r"(^|\.)patch_embedding\.weight", r"(^|\.)blocks\.0\.(cross_attn|attn2)\.")),
    ("a PixArt transformer", (r"(^|\.)adaln_single\.", r"(^|\.)caption_projection\.")),
    ("a PixArt transformer", (r"(^|\.)blocks\.0\.cross_attn\.", r"(^|\.)t_block\.")),
    ("a DiT of classes", (r"(^|\.)blocks\.0\.adaLN_modulation\.", r"(^|\.)y_embedder\.embedding_table")),
    ("a DiT of classes", (r"(^|\.)transformer_blocks\.0\.norm1\.emb\.class_embedder\.",)),
    ("an SDXL UNet", (r"(^|\.)label_emb\.0\.0\.", r"(^|\.)input_blocks\.0\.0\.")),
    ("an SDXL UNet", (r"(^|\.)add_embedding\.linear_1\.", r"(^|\.)down_blocks\.0\.")),
    ("an SD 1 or SD 2 UNet", (r"(^|\.)input_blocks\.0\.0\.", r"(^|\.)middle_block\.")),
    ("an SD 1 or SD 2 UNet", (r"^time_embedding\.linear_1\.", r"^mid_block\.", r"^down_blocks\.0\.")),
    ("a VAE alone", (r"(^|\.)encoder\.conv_in\.", r"(^|\.)decoder\.conv_in\.")),
    ("a VAE alone", (r"(^|\.)decoder\.(mid|mid_block|middle)\.", r"(^|\.)encoder\.")),
    ("a CLIP alone", (r"(^|\.)text_model\.encoder\.layers\.0\.",)),
    ("a CLIP alone", (r"(^|\.)transformer\.resblocks\.0\.", r"(^|\.)token_embedding\.")),
    ("a T5 alone", (r"(^|\.)encoder\.block\.0\.layer\.0\.SelfAttention\.",)),
]


# Which other model than SD3's a LoRA is of: a pattern that some name matches, with dots or underscores in it. The first that fits counts.
LORA_SIGNS: list[tuple[str, str]] = [
    ("a Control-LoRA", r"^lora_controlnet"),
    ("a Stable Cascade LoRA", r"^lora_prior_|^prior_unet[._]"),
    ("an SDXL LoRA", r"(^|[._])(input_blocks|output_blocks|middle_block)[._]|(down|up|mid)_block.{0,80}[._]transformer_blocks[._][1-9]"),
    ("a LoRA of a UNet (SD 1, SD 2 or SDXL)", r"(^|[._])((down|up)_blocks[._]\d|mid_block[._])"),
    ("a HunyuanVideo LoRA", r"token_refiner|double_blocks\.\d+\.img_attn_qkv|double_blocks[._]\d+[._]img_mod[._]linear"),
    ("a Chroma LoRA", r"distilled_guidance_layer"),
    ("a Flux LoRA", r"(^|[._])(double_blocks|single_blocks|single_transformer_blocks)[._]\d"),
    ("a HiDream LoRA", r"(^|[._])(double|single)_stream_blocks[._]\d"),
    ("an AuraFlow LoRA", r"(^|[._])(joint_transformer_blocks|double_layers|single_layers)[._]\d"),
    ("a Qwen-Image LoRA", r"transformer_blocks[._]\d+[._](img|txt)_(mod|mlp)[._]"),
    ("a Wan video LoRA", r"(^|\.|lora_unet_|lycoris_)blocks[._]\d+[._](self_attn|cross_attn|attn[12]|ffn)[._]"),
    ("a Lumina 2 or Z-Image LoRA", r"(^|[._])(context_refiner|noise_refiner)[._]\d|(^|[._])layers[._]\d+[._]attention[._]"),
    ("a PixArt, Sana, LTX-Video or CogVideoX LoRA", r"transformer_blocks[._]\d+[._]attn1[._]|(^|[._])(adaln_single|patchify_proj)[._]"),
    ("a language model's LoRA", r"(^|\.)model\.layers\.\d+\.(self_attn|mlp)\."),
]


def recognise_lora(names: list[str]) -> tuple[str, str] | None:
    """(What a LoRA of another model is, in words ("a Flux LoRA"), the name that tells it); None for SD3's, and where no name tells."""
    text = "\n".join(names)
    for kind, pattern in LORA_SIGNS:
        if re.search(pattern, text, re.MULTILINE):
            return kind, next(name for name in names if re.search(pattern, name))
    return None


def recognise(names: Iterable[str]) -> str | None:
    """MMDIT, LORA, another kind in words ("an SDXL UNet"), or None for names that say nothing."""
    text = "\n".join(names)
    for kind, patterns in SIGNS:
        if all(re.search(pattern, text, re.MULTILINE) for pattern in patterns):
            return kind
    return None
