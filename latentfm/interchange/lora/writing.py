"""LoRA adapters written: one file in any of the spellings of formats.py, or peft's folder."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig

from latentfm.errors import InputError
from latentfm.files import reading
from latentfm.interchange.lora.config import of_module
from latentfm.interchange.lora.files import ADAPTER_METADATA, PEFT_WEIGHTS, Adapter
from latentfm.interchange.lora.formats import ALPHA, BIAS, FORMATS, MAGNITUDE, PEFT_PREFIX, A, B
from latentfm.interchange.lora.kinds import Matrices, made, whole
from latentfm.interchange.lora.modules import to_original
from latentfm.interchange.tensors import Held, Stored, Tensors, target_dtype, write_file
from latentfm.models.manifest import write_manifest
from latentfm.words import shown


def spelt(adapter: Adapter, spelling: str, dtype: torch.dtype | None = None) -> tuple[Tensors, dict[str, str]]:
    """The tensors and metadata of the adapter as one file in a spelling of FORMATS; its matrices in `dtype` (None: as they are).

    Raises InputError for what has no place there.
    """
    row = FORMATS[spelling]
    metadata = {"format": "pt"} | carried(adapter.metadata)
    tensors: Tensors = {}
    if row.described:
        said = {f"{owner}.{key}": value for owner in adapter.configs for key, value in peft_config(adapter, owner).to_dict().items()}
        metadata[ADAPTER_METADATA] = json.dumps(said, indent=2, sort_keys=True, default=sorted)  # sets become lists
    for owner, own in adapter.tensors.items():
        if row.name(owner, "", "") is None:
            way_out = "--transformer-only leaves it out" if "transformer" in adapter.tensors else "take another naming"
            raise InputError(f"{shown(adapter.path)} adapts {owner}, and a {row.title} has no place for it; {way_out}")
        if row.described:
            tensors |= {f"{owner}.{name}": cast(value, dtype) for name, value in own.items()}
            continue
        with reading(f"the LoRA {shown(adapter.path)}", f"a {row.title} cannot hold it: take another naming"):
            tensors |= beside_alphas(adapter, owner, spelling, dtype)
    return tensors, metadata


def beside_alphas(adapter: Adapter, owner: str, spelling: str, dtype: torch.dtype | None) -> Tensors:
    """The tensors for `owner` in a spelling that has an alpha beside the matrices."""
    row = FORMATS[spelling]
    adapters = by_module(adapter, owner)
    if row.original and owner == "transformer":
        adapters = to_original(adapters)
    found: Tensors = {}
    for module, own in adapters.items():
        if own.bias is not None:
            raise ValueError(f"it has biases, as for {shown(module, 100)}")
        parts = {part: cast(value, dtype) for part, value in own.parts().items()} | {ALPHA: Held.of(torch.tensor(float(own.alpha)))}
        if own.magnitude is not None:
            parts[MAGNITUDE] = replace(parts[MAGNITUDE], shape=(own.magnitude.shape[0], 1))  # a column, as LyCORIS has them
        found |= {row.name(owner, module, part): value for part, value in parts.items()}
    return found


def by_module(adapter: Adapter, owner: str) -> dict[str, Matrices]:
    """The matrices of each module, with the alpha that gives LoRA's scale, alpha / rank."""
    config, tensors = adapter.configs[owner], adapter.tensors[owner]
    found = {}
    for module in (name.removesuffix(f".{A}") for name in tensors if name.endswith(f".{A}")):
        down, up, magnitude, bias = (tensors.get(f"{module}.{part}") for part in (A, B, MAGNITUDE, BIAS))
        alpha = of_module(module, config["lora_alpha"], config.get("alpha_pattern") or {})
        if config.get("use_rslora"):  # whose scale is alpha / sqrt(rank)
            alpha *= math.sqrt(down.shape[0])
        found[module] = Matrices(down, up, whole(alpha), magnitude, bias)
    return found


def cast(value: Stored, dtype: torch.dtype | None) -> Stored:
    """The tensor in the dtype in which it is written where `dtype` is asked for; an alpha beside it is not rounded."""
    kind = target_dtype(value, dtype)
    return value if kind == value.dtype else made(kind, value.shape, lambda: value.load(kind))


def carried(metadata: dict[str, str]) -> dict[str, str]:
    """The metadata that still holds for the LoRA in another spelling: neither peft's arguments nor a hash of other bytes."""
    return {key: value for key, value in metadata.items() if key != ADAPTER_METADATA and "hash" not in key}


def peft_config(adapter: Adapter, owner: str = "transformer") -> LoraConfig:
    """peft's configuration of the adapter. Raises InputError when the installed peft does not know it."""
    with reading(f"the LoRA {shown(adapter.path)}", "it has a configuration that the installed peft does not read"):
        return LoraConfig(**adapter.configs[owner])


def write_lora(
    path: Path, adapter: Adapter, spelling: str, dtype: torch.dtype | None = None, advance: Callable[[int], None] = lambda _: None
) -> None:
    """Writes the adapter as one file in a spelling of FORMATS, its matrices in `dtype` (None: as they are)."""
    write_file(path, *spelt(adapter, spelling, dtype), None, advance)


def write_peft(folder: Path, adapter: Adapter, dtype: torch.dtype | None = None, advance: Callable[[int], None] = lambda _: None) -> None:
    """Writes the transformer's adapter as a folder of peft's, for PeftModel.from_pretrained."""
    peft_config(adapter).save_pretrained(str(folder))
    tensors = {PEFT_PREFIX + name: value for name, value in adapter.tensors["transformer"].items()}
    write_file(folder / PEFT_WEIGHTS, tensors, {"format": "pt"} | carried(adapter.metadata), dtype, advance)
    write_manifest(folder)
