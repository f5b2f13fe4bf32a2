"""LoRA adapters on disk, read: one file as diffusers or another program writes it, or peft's folder, brought to one form.

The form is diffusers': the modules of SD3Transformer2DModel and of transformers' text encoders, two matrices each, and peft's arguments.
How it was spelt: names.py. What kind of adapter it was: kinds.py. What its metadata may say: config.py.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY as ADAPTER_METADATA
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE as ADAPTER_FILE
from torch import Tensor

from latentfm.errors import InputError
from latentfm.files import read_json, reading
from latentfm.interchange.lora.config import LYCORIS, check_lycoris, plain_config, said_scale
from latentfm.interchange.lora.formats import ALPHA, BIAS, DORA_SCALE, FORMATS, MAGNITUDE, B
from latentfm.interchange.lora.kinds import KINDS, MOST_TOGETHER, Matrices, kind_of, whole
from latentfm.interchange.lora.modules import is_original, to_diffusers
from latentfm.interchange.lora.names import Own, format_of, own_names
from latentfm.interchange.networks import all_finite
from latentfm.interchange.recognise import LORA, recognise
from latentfm.interchange.tensors import Held, Stored, Tensors, read_file
from latentfm.models.folder import refuse_pickle
from latentfm.models.manifest import check_manifest
from latentfm.models.stored import names_in
from latentfm.words import listed, shown

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """A LoRA in diffusers' form, by the component that it adapts ("transformer", "text_encoder", ...).

    tensors: by MODULE.lora_A.weight and the like. configs: peft's arguments. alphas: those that lay in tensors beside the matrices, by
    module; they are in the arguments too. spelling: its row in FORMATS, or "peft", or None for a mixture. kinds: of KINDS, what it was.
    """

    path: Path
    tensors: dict[str, Tensors]
    configs: dict[str, dict[str, Any]]
    alphas: dict[str, dict[str, float]]
    metadata: dict[str, str]
    spelling: str | None = "diffusers"
    kinds: tuple[str, ...] = ("lora",)

    @property
    def title(self) -> str:
        """What it is on disk, for people."""
        if self.spelling == "peft":
            return "peft adapter folder"
        return FORMATS[self.spelling].title if self.spelling else "LoRA file"


def is_adapter(path: Path) -> bool:
    """Whether `path` is a folder of an adapter, peft's or diffusers', or a safetensors file whose names are a LoRA's."""
    if path.is_dir():
        return any((path / name).is_file() for name in (PEFT_CONFIG, ADAPTER_FILE))
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


def open_adapter(path: str | Path, name: str | None = None, verify: bool = False) -> Adapter:
    """The LoRA at `path`, a file or a folder, in it the file `name`; its tensors stay on disk.

    verify: every byte of a folder is compared with its manifest. Raises InputError when it is none, none of an SD3 model, damaged, or
    contradicts itself.
    """
    path = Path(path)
    if verify and not path.is_dir():
        raise InputError(f"{shown(path)} is a single file, and verifying is for folders, which have a manifest; leave it out")
    said: dict[str, Any] = {}
    if path.is_dir() and name is None and (path / PEFT_CONFIG).is_file():
        config = read_json(path / PEFT_CONFIG)
        if config.get("peft_type") not in ("LORA", *LYCORIS):
            kind = shown(config.get("peft_type"), 40)
            raise InputError(f"{shown(path)} is peft's adapter of type {kind}; of its types LoRA, DoRA, LoHa and LoKr are read")
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
        if "r" in said:  # as a network alone saves its adapter
            said = {f"transformer.{key}": value for key, value in said.items()}
    adapter = adapter_of(file, tensors, said, metadata)
    if path.is_dir():
        check_manifest(path, verify)
    return replace(adapter, path=path)


def adapter_of(
    path: Path, tensors: Mapping[str, Stored | Tensor], said: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> Adapter:
    """A LoRA of these tensors and of what is `said` of each component's adapter, under keys that begin with the component's name."""
    owns = own_names(path, tensors)
    grouped: dict[str, dict[str, dict[str, Stored]]] = {}
    for name, own in owns.items():
        value = tensors[name]
        grouped.setdefault(own.owner, {}).setdefault(own.module, {})[own.part] = value if isinstance(value, Stored) else Held.of(value)
    found: dict[str, Tensors] = {}
    configs, alphas, kinds = {}, {}, set()
    for owner, modules in grouped.items():
        settings = {key.removeprefix(f"{owner}."): value for key, value in said.items() if key.startswith(f"{owner}.")}
        with reading(f"the LoRA {shown(path)}", "get it again, or in diffusers' format"):
            adapters, of_kinds = matrices_of(owner, modules, settings)
            kinds |= of_kinds
            found[owner] = {f"{module}.{part}": value for module, own in adapters.items() for part, value in own.parts().items()}
            alphas[owner] = {module: own.alpha for module, own in adapters.items() if own.alpha is not None}
            if (numbers := sum(value.numel for value in found[owner].values())) > MOST_TOGETHER:
                raise ValueError(f"it makes matrices of {numbers:,} numbers together, which is more than any SD3 model's")
            ranks = {module: own.rank for module, own in adapters.items()}
            dora, bias = (any(name.endswith(part) for name in found[owner]) for part in (MAGNITUDE, BIAS))
            if dora and (without := [module for module, own in adapters.items() if own.magnitude is None]):
                raise ValueError(f"it has magnitudes, as a DoRA, and none for {shown(without[0], 100)}")
            plain = {} if settings.get("peft_type") in LYCORIS else settings
            configs[owner] = plain_config(plain, ranks, alphas[owner], dora, bias)
    return Adapter(path, found, configs, alphas, dict(metadata or {}), format_of(owns), tuple(name for name in KINDS if name in kinds))


def matrices_of(owner: str, modules: Mapping[str, Mapping[str, Stored]], said: Mapping[str, Any]) -> tuple[dict[str, Matrices], set[str]]:
    """The two matrices of each of diffusers' modules, and the kinds of adapter that they came as. Raises ValueError for what makes none."""
    lycoris = said.get("peft_type") in LYCORIS
    if lycoris:
        check_lycoris(said)
    found: dict[str, Matrices] = {}
    kinds = set()
    for module, parts in modules.items():
        where = shown(module, 100)
        for part, value in parts.items():
            if not (value.dtype.is_floating_point or (part == ALPHA and value.dtype is not torch.bool)):  # some write alpha as an integer
                raise ValueError(f"{shown(Own(owner, module, part).name, 120)} is of {value.dtype}, which is no number to multiply with")
        if set(parts) == {ALPHA}:
            raise ValueError(f"it has an alpha of {where} and no matrices")
        kinds.add(kind := kind_of(where, set(parts)))
        alpha = alpha_of(where, parts[ALPHA]) if ALPHA in parts else None
        try:
            adapter = KINDS[kind].matrices(parts, alpha)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if lycoris:
            adapter = replace(adapter, alpha=whole(said_scale(module, said) * adapter.rank))
        adapter = replace(adapter, magnitude=magnitude_of(where, parts, adapter), bias=parts.get(BIAS))
        made = to_diffusers(module, adapter) if owner == "transformer" and is_original(module) else {module: adapter}
        if twice := made.keys() & found.keys():
            raise ValueError(f"it adapts {shown(min(twice), 100)} twice, once in SD3's original naming; keep one")
        found |= made
    return found, kinds


def magnitude_of(where: str, parts: Mapping[str, Stored], adapter: Matrices) -> Stored | None:
    """A DoRA's magnitudes, a number an output, as peft has them; None where there are none."""
    if MAGNITUDE in parts or DORA_SCALE not in parts:
        return parts.get(MAGNITUDE)
    scale, out = parts[DORA_SCALE], adapter.up.shape[0]
    if scale.numel != out or scale.shape[0] != out:
        raise ValueError(
            f"the magnitudes (dora_scale) of {where} are {list(scale.shape)}, not one for each of {out} outputs, as DoRA's are"
        )
    return replace(scale, shape=(out,))


def alpha_of(where: str, value: Stored) -> float:
    """The number in an alpha's tensor."""
    if value.numel != 1:
        raise ValueError(f"the alpha of {where} is no single number")
    alpha = float(value.load(torch.float32))
    if not abs(alpha) < float("inf"):
        raise ValueError(f"the alpha of {where} is {alpha}")
    return whole(alpha)


def loaded(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a LoRA in memory and peft's arguments, both under diffusers' names. Raises InputError for what is not finite."""
    tensors = {}
    for owner, own in adapter.tensors.items():
        for name, stored in own.items():
            tensors[f"{owner}.{name}"] = tensor = stored.value.reshape(stored.shape) if isinstance(stored, Held) else stored.load()
            if not all_finite(tensor):
                raise InputError(f"the LoRA {shown(adapter.path)} is damaged: {shown(name, 120)} is not finite; get it again")
    return tensors, {f"{owner}.{key}": value for owner, config in adapter.configs.items() for key, value in config.items()}


def with_alphas(tensors: Mapping[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """The tensors with the alphas that lay beside them multiplied in, for who takes them without metadata: alpha is then the rank."""
    found = dict(tensors)
    for owner, alphas in adapter.alphas.items():
        for module, alpha in alphas.items():
            up = f"{owner}.{module}.{B}"
            found[up] = found[up] * (alpha / found[up].shape[1])
    return found
