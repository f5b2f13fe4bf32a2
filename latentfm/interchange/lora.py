"""LoRA adapters of the MM-DiT on disk: diffusers' one file and peft's folder, one into the other, rank and alpha kept.

diffusers: names begin with transformer. (or text_encoder.), peft's configuration rides in the metadata. peft: a folder with
adapter_config.json and adapter_model.safetensors, names begin with base_model.model. Other spellings: lora_names.py.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY as ADAPTER_METADATA
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE as ADAPTER_FILE
from peft import LoraConfig
from torch import Tensor, nn

from latentfm.errors import InputError
from latentfm.files import read_json, reading
from latentfm.interchange.lora_config import plain_config
from latentfm.interchange.lora_names import ALPHA, BIAS, MAGNITUDE, A, B, Own, own_names
from latentfm.interchange.networks import all_finite
from latentfm.interchange.recognise import LORA, recognise
from latentfm.interchange.tensors import Stored, Tensors, read_file, write_file
from latentfm.models.folder import refuse_pickle
from latentfm.models.manifest import check_manifest, write_manifest
from latentfm.models.stored import names_in
from latentfm.words import listed, shown

PEFT_CONFIG, PEFT_WEIGHTS, PEFT_PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """A LoRA of the MM-DiT as it lies on disk. kind: "diffusers LoRA file" or "peft adapter folder"; names are the modules'.

    config: peft's arguments for it. left_out: how many tensors of the text encoders lie beside it and are not in `tensors`.
    """

    path: Path
    kind: str
    config: dict[str, Any]
    tensors: Tensors
    metadata: dict[str, str]
    left_out: int = 0


@dataclass(frozen=True)
class Parts:
    """The tensors of a LoRA by owner ("transformer", "text_encoder", "text_encoder_2"), under the modules' names, and peft's arguments.

    alphas: those that lie in tensors of their own, by owner and module; they are in the arguments too.
    """

    tensors: dict[str, dict[str, Any]]
    configs: dict[str, dict[str, Any]]
    alphas: dict[str, dict[str, float]]


def is_adapter(path: Path) -> bool:
    """Whether `path` is a peft adapter folder, or a safetensors file whose names are a LoRA's."""
    if path.is_dir():
        return (path / PEFT_CONFIG).is_file()
    return path.suffix == ".safetensors" and recognise(read_file(path)[0]) == LORA


def adapter_file(path: Path, name: str | None = None) -> Path:
    """The file that a LoRA is read from: `path` itself, or of a folder the file `name`, diffusers' own, or the only one there is.

    Raises InputError for a pickle, for several files of which none is meant, and for none.
    """
    if not path.is_dir():
        refuse_pickle(path)
        return path
    if name is not None:
        refuse_pickle(path / name)
        return path / name
    refuse_pickle(path)
    files = [file for file in names_in(path) if file.endswith(".safetensors")]
    for own in (PEFT_WEIGHTS, ADAPTER_FILE):
        if own in files and (own != PEFT_WEIGHTS or (path / PEFT_CONFIG).is_file()):
            return path / own
    if len(files) != 1:
        what = f"several files ({listed(files)}); give the one that is meant" if files else "no safetensors file"
        raise InputError(f"the LoRA folder {shown(path)} has {what}")
    return path / files[0]


def open_adapter(path: str | Path, verify: bool = False) -> Adapter:
    """The LoRA at `path`; its tensors stay on disk.

    verify: every byte of a folder is compared with its manifest. Raises InputError when it is none, none of an SD3 MM-DiT, damaged, or
    contradicts itself.
    """
    path = Path(path)
    parts, metadata = read_adapter(path, verify=verify)
    if "transformer" not in parts.tensors:
        raise InputError(f"{shown(path)} adapts the text encoders alone; there is nothing in it for the transformer")
    left_out = sum(len(tensors) for owner, tensors in parts.tensors.items() if owner != "transformer")
    kind = "peft adapter folder" if (path / PEFT_CONFIG).is_file() else "diffusers LoRA file"
    return Adapter(path, kind, parts.configs["transformer"], parts.tensors["transformer"], metadata, left_out)


def read_adapter(path: Path, name: str | None = None, verify: bool = False) -> tuple[Parts, dict[str, str]]:
    """The tensors of the LoRA at `path`, which stay on disk, by owner, and its file's metadata."""
    if verify and not path.is_dir():
        raise InputError(f"{shown(path)} is a single file, and verifying is for folders, which have a manifest; leave it out")
    said: dict[str, Any] = {}
    if path.is_dir() and name is None and (path / PEFT_CONFIG).is_file():
        config = read_json(path / PEFT_CONFIG)
        if config.get("peft_type") != "LORA":
            kind = shown(config.get("peft_type"), 40)
            raise InputError(f"{shown(path)} is a {kind} adapter; only LoRA and DoRA have a form in diffusers")
        if not (path / PEFT_WEIGHTS).is_file():
            refuse_pickle(path)
            raise InputError(f"{shown(path)} has no {PEFT_WEIGHTS}; its copy is not complete")
        said = {f"transformer.{key}": value for key, value in config.items()}
    file = adapter_file(path, name)
    tensors, metadata = read_file(file)
    if not said:
        with reading(f"{shown(file)}: its metadata's '{ADAPTER_METADATA}'"):
            said = json.loads(metadata.get(ADAPTER_METADATA) or "{}")
            if not isinstance(said, dict):
                raise ValueError("it is no table")
    parts = parts_of(file, tensors, said)
    if path.is_dir():
        check_manifest(path, verify)
    return parts, metadata


def parts_of(path: Path, tensors: Mapping[str, Stored | Tensor], said: Mapping[str, Any]) -> Parts:
    """The tensors of a LoRA by owner, and peft's arguments for each, from what is `said` under names that begin with the owner's."""
    owns = own_names(path, tensors)
    by_owner: dict[str, dict[Own, Any]] = {}
    for name, own in owns.items():
        by_owner.setdefault(own.owner, {})[own] = tensors[name]
    found, configs, alphas_of = {}, {}, {}
    for owner, own_tensors in by_owner.items():
        settings = {key.removeprefix(f"{owner}."): value for key, value in said.items() if key.startswith(f"{owner}.")}
        with reading(f"the LoRA {shown(path)}", "get it again, or in diffusers' format"):
            ranks = ranks_of(own_tensors)
            alphas = {own.module: alpha_of(own, value) for own, value in own_tensors.items() if own.what == ALPHA}
            if stray := alphas.keys() - ranks.keys():
                raise ValueError(f"it has an alpha of {shown(min(stray), 100)} and no matrices")
            kinds = {own.what for own in own_tensors}
            configs[owner] = plain_config(settings, ranks, alphas, MAGNITUDE in kinds, BIAS in kinds)
        alphas_of[owner] = alphas
        found[owner] = {f"{own.module}.{own.what}": value for own, value in own_tensors.items() if own.what != ALPHA}
    return Parts(found, configs, alphas_of)


def ranks_of(tensors: Mapping[Own, Any]) -> dict[str, int]:
    """The rank of each module, by the shapes of its two matrices. Raises ValueError for half a pair, and for two that are none."""
    shapes = {(own.module, own.what): tuple(value.shape) for own, value in tensors.items()}
    ranks = {}
    for module in dict.fromkeys(own.module for own in tensors if own.what != ALPHA):
        down, up = shapes.get((module, A)), shapes.get((module, B))
        if down is None or up is None:
            which = " and ".join(what for what, shape in ((A, down), (B, up)) if shape is None)
            raise ValueError(f"it has no {which} for {shown(module, 100)}")
        if len(down) not in (2, 4) or len(up) != len(down) or down[0] != up[1] or down[0] < 1:
            raise ValueError(f"the matrices of {shown(module, 100)}, {list(down)} and {list(up)}, are no pair of one rank")
        ranks[module] = down[0]
    for own, value in tensors.items():
        if not value.dtype.is_floating_point:
            raise ValueError(f"{shown(own.name, 120)} is of {value.dtype}, which is no number to multiply with")
    return ranks


def alpha_of(own: Own, value: Stored | Tensor) -> float:
    """The number in an alpha's tensor."""
    if value.numel != 1 if isinstance(value, Stored) else value.numel() != 1:
        raise ValueError(f"the alpha of {shown(own.module, 100)} is no single number")
    alpha = float(value.load(torch.float32) if isinstance(value, Stored) else value)
    if not abs(alpha) < float("inf"):
        raise ValueError(f"the alpha of {shown(own.module, 100)} is {alpha}")
    return int(alpha) if alpha == int(alpha) else alpha


def loaded(parts: Parts, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a LoRA in memory and peft's arguments, both under diffusers' names. Raises InputError for what is not finite."""
    tensors = {}
    for owner, own in parts.tensors.items():
        for name, value in own.items():
            tensors[f"{owner}.{name}"] = tensor = value.load() if isinstance(value, Stored) else value
            if not all_finite(tensor):
                raise InputError(f"the LoRA {shown(path)} is damaged: {shown(name, 120)} is not finite; get it again")
    return tensors, {f"{owner}.{key}": value for owner, config in parts.configs.items() for key, value in config.items()}


def with_alphas(tensors: Mapping[str, Tensor], parts: Parts) -> dict[str, Tensor]:
    """The tensors with the alphas that lay beside them multiplied in, for who takes them without metadata: alpha is then the rank."""
    found = dict(tensors)
    for owner, alphas in parts.alphas.items():
        for module, alpha in alphas.items():
            up = f"{owner}.{module}.{B}"
            found[up] = found[up] * (alpha / found[up].shape[1])
    return found


def check_fit(network: nn.Module, owner: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises InputError unless the LoRA's matrices for `owner`, under diffusers' names, fit linears that `network` has."""
    for name, value in tensors.items():
        if not name.startswith(f"{owner}.") or not name.endswith((A, B)):
            continue
        module = name.removeprefix(f"{owner}.").removesuffix(f".{A}").removesuffix(f".{B}")
        try:
            linear = network.get_submodule(module)
        except AttributeError:
            raise InputError(f"the LoRA does not fit this model, whose {owner} has no {shown(module, 120)}") from None
        weight = getattr(getattr(linear, "base_layer", linear), "weight", None)
        if getattr(linear, "in_features", None) is None and getattr(weight, "ndim", 0) != 4:
            raise InputError(f"the LoRA does not fit this model: {shown(module, 120)} of its {owner} is no linear")
        sizes = (linear.out_features, linear.in_features) if hasattr(linear, "in_features") else weight.shape[:2]
        side = 0 if name.endswith(B) else 1
        if value.shape[side] != sizes[side]:
            raise InputError(
                f"the LoRA does not fit this model: {shown(name, 120)} is {list(value.shape)}, and {shown(module, 120)} has "
                f"{sizes[1]} numbers in and {sizes[0]} out"
            )


def diffusers_adapter(adapter: Adapter) -> tuple[Tensors, dict[str, str]]:
    """The tensors and metadata of the adapter as diffusers' LoRA file."""
    config = {f"transformer.{key}": value for key, value in peft_config(adapter).to_dict().items()}
    text = json.dumps(config, indent=2, sort_keys=True, default=sorted)  # sets become lists
    return {f"transformer.{name}": stored for name, stored in adapter.tensors.items()}, {"format": "pt", ADAPTER_METADATA: text}


def peft_config(adapter: Adapter) -> LoraConfig:
    """peft's configuration of the adapter. Raises InputError when the installed peft does not know it."""
    with reading(f"the LoRA {shown(adapter.path)}", "it has a configuration that the installed peft does not read"):
        return LoraConfig(**adapter.config)


def write_diffusers(path: Path, adapter: Adapter, dtype: torch.dtype | None, advance: Callable[[int], None] = lambda _: None) -> None:
    """Writes the adapter as diffusers' LoRA file, for load_lora_weights."""
    write_file(path, *diffusers_adapter(adapter), dtype, advance)


def write_peft(folder: Path, adapter: Adapter, dtype: torch.dtype | None, advance: Callable[[int], None] = lambda _: None) -> None:
    """Writes the adapter as a folder of peft's, for PeftModel.from_pretrained."""
    peft_config(adapter).save_pretrained(str(folder))
    write_file(folder / PEFT_WEIGHTS, {PEFT_PREFIX + name: s for name, s in adapter.tensors.items()}, {"format": "pt"}, dtype, advance)
    write_manifest(folder)
