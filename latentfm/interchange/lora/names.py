"""The names of a LoRA file's tensors: whose each is, in whichever of the programs' spellings, and what the others are."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from diffusers.utils import convert_unet_state_dict_to_peft

from latentfm.errors import InputError
from latentfm.interchange.lora.formats import ALPHA, BIAS, DORA_SCALE, FORMATS, MAGNITUDE, OWNERS, PEFT_PREFIX, PREFIXES, A, B
from latentfm.interchange.lora.kinds import KINDS
from latentfm.interchange.lora.modules import STARTS, module_of
from latentfm.interchange.recognise import LORA, recognise, recognise_lora
from latentfm.words import listed, shown

MOST_TENSORS = 20_000  # SD3.5 large, adapted everywhere, has 1,600
ENDINGS = {
    "lora_A.weight": A, "lora_A": A, "lora_down.weight": A, "lora.down.weight": A, "lora_linear_layer.down.weight": A,
    "lora_B.weight": B, "lora_B": B, "lora_up.weight": B, "lora.up.weight": B, "lora_linear_layer.up.weight": B,
    "lora_B.bias": BIAS, "lora_magnitude_vector": MAGNITUDE, "lora_magnitude_vector.weight": MAGNITUDE, "alpha": ALPHA,
    "dora_scale": DORA_SCALE,
} | {name: name for kind in KINDS.values() for tensors in kind.tensors for name in tensors}  # fmt: skip
NAME = re.compile(r"(.+?)\.(" + "|".join(re.escape(ending) for ending in ENDINGS) + ")")
BY_LENGTH = sorted(PREFIXES, key=len, reverse=True)
WRAPPED = re.compile(r"\b(base_model\.model|module|_orig_mod)\.")  # what peft, DistributedDataParallel and torch.compile put into names
ADAPTER_NAME = re.compile(r"\b(lora_[AB]|lora_magnitude_vector)\.[^.]+\.(weight|bias)$")  # in a network's own state dict
OTHER_KINDS = {  # by a sign in their tensors' names; what changes a weight by more than itself, or is made for convolutions alone
    r"\.boft_": "a BOFT adapter", r"\.oft_": "an OFT adapter", r"\.[ab][12]\.weight$": "a GLoRA adapter",
    r"\.on_input$": "an (IA)3 adapter", r"\.lora_mid\.": "a LoCon with a core tensor (lora_mid)",
    r"\.(lokr_t2|hada_t[12])$": "a LyCORIS adapter of convolutions (with a core tensor)",
    r"\.diff_b$": "an adapter that changes biases (diff_b)", r"vera_lambda": "a VeRA adapter",
    r"\.w_norm$|\.b_norm$": "an adapter with trained norms", r"^bundle_emb\.": "a LoRA with words of its own (bundle_emb)",
}  # fmt: skip


class Own(NamedTuple):
    """Whose a tensor is: a component's name, the module in it (SD3's original name where the file has that), and what of its adapter."""

    owner: str
    module: str
    part: str

    @property
    def name(self) -> str:
        """The tensor's name in diffusers' form."""
        return f"{self.owner}.{self.module}.{self.part}"


def own_names(path: Path, names: Iterable[str]) -> dict[str, Own]:
    """Whose each tensor of these names is. Raises InputError for what is no LoRA, or one of another model or kind."""
    names = list(names)
    if len(names) > MOST_TENSORS:
        raise InputError(f"{shown(path)} has {len(names):,} tensors, a LoRA of an SD3 model has at most {MOST_TENSORS:,}; is it one?")
    if recognise(names) != LORA:
        raise InputError(f"{shown(path)} is no LoRA: " + (f"it begins with {listed(names)}" if names else "it has no tensors"))
    if (other := recognise_lora(names)) is not None:
        raise InputError(f"{shown(path)} is {other[0]}, and adapts no SD3 model: it has {shown(other[1], 200)}")
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
    name = ADAPTER_NAME.sub(r"\1.\2", WRAPPED.sub("", name))
    if name.startswith("transformer."):
        (name,) = convert_unet_state_dict_to_peft({name: None})  # the names of the oldest diffusers
    if not (found := NAME.fullmatch(name)):
        return None
    text, part = found[1], ENDINGS[found[2]]
    for prefix in BY_LENGTH:
        owner = PREFIXES[prefix]
        if text.startswith(prefix) and (module := module_of(owner, text.removeprefix(prefix), flat=prefix.endswith("_"))):
            return Own(owner, module, part)
    return None


def format_of(owns: dict[str, Own]) -> str | None:
    """The row of FORMATS whose spelling these names are, or "peft"; None where they are of none."""
    for name, row in FORMATS.items():
        if all(row.name(*own) == spelt and not (row.described and own.part == ALPHA) for spelt, own in owns.items()):
            return name
    return "peft" if all(name.startswith(PEFT_PREFIX) for name in owns) else None


def foreign(path: Path, names: list[str]) -> InputError:
    """What to say of a LoRA that has tensors of these names."""
    where = shown(path)
    for sign, kind in OTHER_KINDS.items():
        if example := next((name for name in names if re.search(sign, name)), None):
            return InputError(
                f"{where} is {kind}, which no LoRA computes ({shown(example, 200)}): merge it into a model with the program that made it, "
                "or train a LoRA"
            )
    whole = [name for name in names if name.startswith(tuple(p + m for p in PREFIXES for m in STARTS)) and "lora" not in name]
    if whole:
        return InputError(f"{where} has whole weights besides LoRA's matrices, which diffusers does not read: {listed(whole)}")
    for owner in OWNERS:
        prefixes = tuple(prefix for prefix, whose in PREFIXES.items() if prefix and whose == owner)
        if of_owner := [name for name in names if name.startswith(prefixes)]:
            return InputError(f"{where} is a LoRA with modules that SD3's {owner} has not, or names them another way: {listed(of_owner)}")
    return InputError(f"{where} is a LoRA of a model, or in a naming, that is not known here: it has {listed(names)}")
