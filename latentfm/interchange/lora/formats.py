"""How programs spell a LoRA, a row each: what is read and what `latentfm convert` writes. Needs no torch.

To add one: a row, and in modules.py the names of its modules where these are neither diffusers' nor SD3's original ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from latentfm.models.encoders import ENCODERS, TEXT

OWNERS = ("transformer", *TEXT)  # the components that a LoRA may adapt
A, B, BIAS, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"  # diffusers' and peft's
ALPHA, DORA_SCALE = "alpha", "dora_scale"  # others'
KOHYA = {A: "lora_down.weight", B: "lora_up.weight", MAGNITUDE: DORA_SCALE}
COMFYUI = {MAGNITUDE: DORA_SCALE}
KOHYA_ENCODERS = ("lora_te1_", "lora_te2_", "lora_te3_")


@dataclass(frozen=True)
class Format:
    """A spelling of a LoRA in one file.

    title: for people. prefixes: of a tensor's name by its owner, in OWNERS' order; where there is none, the format has no place for that
    owner. flat: whether a module's dots are underscores. original: whether the transformer's modules have SD3's original names, query,
    key and value in one, and not diffusers'. endings: what the parts are called, where it is not as in diffusers. described: whether
    rank and alpha are in the file's metadata; else an alpha lies beside each pair of matrices.
    """

    title: str
    prefixes: tuple[str, ...]
    flat: bool = False
    original: bool = False
    endings: Mapping[str, str] = field(default_factory=dict)
    described: bool = False

    def name(self, owner: str, module: str, part: str) -> str | None:
        """What a tensor is called; None where the format has no place for its owner."""
        prefix = dict(zip(OWNERS, self.prefixes)).get(owner)
        if prefix is None:
            return None
        return f"{prefix}{module.replace('.', '_') if self.flat else module}.{self.endings.get(part, part)}"


FORMATS = {
    "diffusers": Format("diffusers LoRA file", tuple(f"{owner}." for owner in OWNERS), described=True),
    "kohya": Format("kohya LoRA file", ("lora_unet_", *KOHYA_ENCODERS), flat=True, original=True, endings=KOHYA),
    "onetrainer": Format("OneTrainer LoRA file", ("lora_transformer_", *KOHYA_ENCODERS), flat=True, endings=KOHYA),
    "lycoris": Format("LyCORIS LoRA file", ("lycoris_",), flat=True, endings=KOHYA),
    "original": Format(
        "LoRA file in SD3's original naming",
        ("diffusion_model.", *(encoder.prefix for encoder in ENCODERS)),
        original=True, endings=COMFYUI,
    ),
    "bare": Format("LoRA file without prefixes", ("",), endings=COMFYUI),
}  # fmt: skip
PEFT_PREFIX = "base_model.model."  # of peft's folders, which hold one network's adapter
# prefixes that are read besides, and whose they are
OTHER_PREFIXES = {
    PEFT_PREFIX: "transformer", "model.diffusion_model.": "transformer", "transformer_": "transformer", "clip_l.": "text_encoder",
    "clip_g.": "text_encoder_2", "t5.": "text_encoder_3", "t5xxl.": "text_encoder_3",
}  # fmt: skip
PREFIXES = {prefix: owner for row in FORMATS.values() for prefix, owner in zip(row.prefixes, OWNERS)} | OTHER_PREFIXES
