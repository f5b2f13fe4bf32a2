"""The names of a LoRA file's tensors: whose they are, in whichever of the trainers' spellings leaves no doubt, and what the others are.

diffusers writes transformer.MODULE.lora_A.weight. Others write other prefixes, or none, kohya's lora_down and lora_up with an alpha beside
them, or a module's name with _ for its dots. The modules are diffusers' own in all that is read; what has SD3's original names, or is
another kind of adapter, is refused by what it is.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from diffusers.utils import convert_unet_state_dict_to_peft

from latentfm.errors import InputError
from latentfm.interchange.original import IMAGE, TEXT, TOP
from latentfm.interchange.recognise import LORA, recognise
from latentfm.words import listed, shown

ENCODERS = ("text_encoder.", "text_encoder_2.")
MODULES = ("transformer_blocks.", "pos_embed.", "time_text_embed.", "context_embedder", "norm_out.", "proj_out")
MOST_TENSORS = 20_000  # SD3.5 large, adapted everywhere, has 1,600
PREFIXES = ("transformer.", "base_model.model.", "model.diffusion_model.", "diffusion_model.", "")
FLAT_PREFIXES = ("lora_transformer_", "lycoris_", "lora_unet_")
A, B, BIAS, MAGNITUDE, ALPHA = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector", "alpha"
ENDINGS = {
    "lora_A.weight": A, "lora_A.default.weight": A, "lora_down.weight": A, "lora.down.weight": A, "lora_linear_layer.down.weight": A,
    "lora_B.weight": B, "lora_B.default.weight": B, "lora_up.weight": B, "lora.up.weight": B, "lora_linear_layer.up.weight": B,
    "lora_B.bias": BIAS, "lora_magnitude_vector": MAGNITUDE, "lora_magnitude_vector.weight": MAGNITUDE, "alpha": ALPHA,
}  # fmt: skip
OTHERS = {  # adapters of other kinds by a sign in their tensors' names
    r"\.lokr_": "a LoKr adapter", r"\.hada_": "a LoHa adapter", r"\.b?oft_": "an OFT adapter", r"\.[ab][12]\.weight$": "a GLoRA adapter",
    r"\.on_input$": "an (IA)3 adapter", r"\.lora_mid\.": "a LoCon with a core tensor (lora_mid)",
    r"\.dora_scale$": "a DoRA in LyCORIS' form (dora_scale)", r"\.diff(_b)?$": "an adapter of whole differences of weights",
    r"vera_lambda": "a VeRA adapter", r"\.w_norm$|\.b_norm$": "an adapter with trained norms",
}  # fmt: skip
LINEARS = {name for table in (IMAGE, TEXT) for names in table.values() for name in names}
FLAT_LINEARS = {name.replace(".", "_"): name for name in LINEARS}
FLAT_TOP = {name.replace(".", "_"): name for names in TOP.values() for name in names}


class Own(NamedTuple):
    """Whose a tensor is: "transformer", "text_encoder" or "text_encoder_2", the module in it, and what of its adapter."""

    owner: str
    module: str
    what: str

    @property
    def name(self) -> str:
        """The tensor's name in diffusers' form."""
        return f"{self.owner}.{self.module}.{self.what}"


def own_names(path: Path, names: Iterable[str]) -> dict[str, Own]:
    """Whose each tensor of these names is. Raises InputError for what is no LoRA, or one of another model, kind or naming."""
    names = list(names)
    if len(names) > MOST_TENSORS:
        raise InputError(f"{shown(path)} has {len(names):,} tensors, a LoRA of an SD3 model has at most {MOST_TENSORS:,}; is it one?")
    if recognise(names) != LORA:
        raise InputError(f"{shown(path)} is no LoRA: it begins with {listed(names)}")
    found = {name: own for name in names if (own := parse(name)) is not None}
    if left := [name for name in names if name not in found]:
        raise foreign(path, left)
    spellings: dict[Own, str] = {}
    for name, own in found.items():
        if (other := spellings.setdefault(own, name)) != name:
            raise InputError(f"{shown(path)} has {shown(own.name)} twice, as {shown(other)} and as {shown(name)}; keep one")
    return found


def parse(name: str) -> Own | None:
    """Whose the tensor `name` is; None when it is nothing that is read."""
    if name.startswith("transformer."):
        (name,) = convert_unet_state_dict_to_peft({name: None})  # the names of the oldest diffusers
    found = re.fullmatch(r"(.+?)\.(" + "|".join(map(re.escape, ENDINGS)) + ")", name)
    if not found:
        return None
    module, what = found[1], ENDINGS[found[2]]
    for prefix in ENCODERS:
        if module.startswith(prefix):
            return Own(prefix[:-1], module.removeprefix(prefix), what)
    for prefix in PREFIXES:
        if module.startswith(tuple(prefix + start for start in MODULES)):
            return Own("transformer", module.removeprefix(prefix), what)
    for prefix in FLAT_PREFIXES:
        if module.startswith(prefix) and (dotted := with_dots(module.removeprefix(prefix))):
            return Own("transformer", dotted, what)
    return None


def with_dots(flat: str) -> str | None:
    """The module of an MM-DiT that is called so with _ for its dots; None when there is none."""
    found = re.fullmatch(r"transformer_blocks_(\d{1,4})_(\w+)", flat)
    if found and found[2] in FLAT_LINEARS:
        return f"transformer_blocks.{found[1]}.{FLAT_LINEARS[found[2]]}"
    return FLAT_TOP.get(flat)


def foreign(path: Path, names: list[str]) -> InputError:
    """What to say of a LoRA that has tensors of these names."""
    where, text = shown(path), "\n".join(names)
    for sign, kind in OTHERS.items():
        if example := next((name for name in names if re.search(sign, name)), None):
            return InputError(
                f"{where} is {kind}, which has no form in diffusers ({shown(example, 200)}): merge it into a model with the program that "
                "made it, or train a LoRA"
            )
    if "joint_blocks" in text:
        return InputError(
            f"{where} is an SD3 LoRA in the original or kohya's naming ({shown(names[0], 200)}), which diffusers has no converter for; "
            "save it from the training program in diffusers' or peft's format"
        )
    if of_texts := [name for name in names if re.match(r"lora_te\d?_|text_encoder", name)]:
        return InputError(
            f"{where} adapts text encoders under names that are not read here ({listed(of_texts)}); save it in diffusers' format"
        )
    if whole := [name for name in names if name.startswith(tuple(p + m for p in PREFIXES for m in MODULES)) and "lora" not in name]:
        return InputError(f"{where} has whole weights besides LoRA's matrices, which diffusers does not read: {listed(whole)}")
    return InputError(f"{where} is a LoRA of something else than SD3's transformer: it has {listed(names)}")
