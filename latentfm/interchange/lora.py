"""LoRA adapters of the MM-DiT on disk: diffusers' one file and peft's folder, one into the other, rank and alpha kept.

diffusers: names begin with transformer. (or text_encoder.), peft's configuration rides in the metadata. peft: a folder with
adapter_config.json and adapter_model.safetensors, names begin with base_model.model.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY as ADAPTER_METADATA
from diffusers.utils import convert_unet_state_dict_to_peft
from diffusers.utils.peft_utils import get_peft_kwargs
from peft import LoraConfig

from latentfm.errors import InputError
from latentfm.interchange.recognise import LORA, recognise
from latentfm.interchange.tensors import Tensors, read_file, write_file
from latentfm.models.folder import refuse_pickle
from latentfm.words import listed

PEFT_CONFIG, PEFT_WEIGHTS, PEFT_PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
ENCODERS = ("text_encoder.", "text_encoder_2.")
MODULES = ("transformer_blocks.", "pos_embed.", "time_text_embed.", "context_embedder.", "norm_out.", "proj_out.")


@dataclass(frozen=True)
class Adapter:
    """A LoRA of the MM-DiT as it lies on disk. kind: "diffusers LoRA file" or "peft adapter folder"; names are the modules'.

    left_out: how many tensors of the text encoders lie beside it and are not in `tensors`.
    """

    path: Path
    kind: str
    config: dict[str, Any]
    tensors: Tensors
    metadata: dict[str, str]
    left_out: int = 0


def is_adapter(path: Path) -> bool:
    """Whether `path` is a peft adapter folder, or a safetensors file whose names are a LoRA's."""
    if path.is_dir():
        return (path / PEFT_CONFIG).is_file()
    return path.suffix == ".safetensors" and recognise(read_file(path)[0]) == LORA


def open_adapter(path: str | Path) -> Adapter:
    """The LoRA at `path`; its tensors stay on disk. Raises InputError when it is none, or none of an SD3 MM-DiT."""
    path = Path(path)
    refuse_pickle(path)
    if path.is_dir():
        return open_peft(path)
    tensors, metadata = read_file(path)
    check_names(path, tensors)
    own = {name.removeprefix("transformer."): stored for name, stored in tensors.items() if name.startswith("transformer.")}
    own = convert_unet_state_dict_to_peft(own)  # the names of older diffusers, .lora.down and .lora.up
    check_modules(path, own)
    try:
        said = json.loads(metadata.get(ADAPTER_METADATA) or "{}")
    except ValueError as error:
        raise InputError(f"{path} is damaged: its metadata's '{ADAPTER_METADATA}' cannot be read ({error})") from error
    config = {key.removeprefix("transformer."): value for key, value in said.items() if key.startswith("transformer.")}
    if not config:  # as diffusers does: alpha is the rank, and the ranks are those of the matrices
        ranks = {f"^{name}": stored.shape[1] for name, stored in own.items() if "lora_B" in name and len(stored.shape) > 1}
        config = get_peft_kwargs(ranks, None, own)
    return Adapter(path, "diffusers LoRA file", config, own, metadata, len(tensors) - len(own))


def open_peft(folder: Path) -> Adapter:
    """The adapter in a folder of peft's."""
    try:
        config = json.loads((folder / PEFT_CONFIG).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / PEFT_CONFIG} cannot be read: {error}") from error
    if config.get("peft_type") != "LORA":
        raise InputError(f"{folder} is a {config.get('peft_type')} adapter; only LoRA and DoRA have a form in diffusers")
    if not (folder / PEFT_WEIGHTS).is_file():
        raise InputError(f"{folder} has no {PEFT_WEIGHTS}; its copy is not complete")
    tensors, metadata = read_file(folder / PEFT_WEIGHTS)
    own = {name.removeprefix(PEFT_PREFIX): stored for name, stored in tensors.items()}
    check_modules(folder, own)
    return Adapter(folder, "peft adapter folder", config, own, metadata)


def check_names(path: Path, names: Any) -> None:
    """Raises InputError unless a LoRA file's tensors of these names are diffusers' for an SD3 transformer or its text encoders."""
    if recognise(names) != LORA:
        raise InputError(f"{path} is no LoRA: it begins with {listed(names)}")
    if foreign := [name for name in names if not name.startswith(("transformer.", *ENCODERS))]:
        if any("joint_blocks" in name for name in foreign):
            raise InputError(
                f"{path} is an SD3 LoRA in the original or kohya's naming ({foreign[0]}), which diffusers has no converter for; "
                "save it from the training program in diffusers' or peft's format"
            )
        raise InputError(f"{path} is a LoRA of something else than SD3's transformer: it has {listed(foreign)}")
    if alphas := [name for name in names if "lora" not in name]:
        raise InputError(f"{path} has {len(alphas)} tensors besides LoRA's matrices, which diffusers does not read: {listed(alphas)}")


def check_modules(path: Path, names: Any) -> None:
    """Raises InputError when the adapter has nothing for the transformer, or adapts what an MM-DiT has not."""
    if not names:
        raise InputError(f"{path} adapts the text encoders alone; there is nothing in it for the transformer")
    if foreign := [name for name in names if not name.startswith(MODULES)]:
        raise InputError(f"{path} is a LoRA of something else than SD3's transformer: it has {listed(foreign)}")
    if full := [name for name in names if "lora" not in name]:
        raise InputError(f"{path} has whole weights besides LoRA's matrices, which diffusers does not read: {listed(full)}")


def diffusers_adapter(adapter: Adapter) -> tuple[Tensors, dict[str, str]]:
    """The tensors and metadata of the adapter as diffusers' LoRA file."""
    config = {f"transformer.{key}": value for key, value in peft_config(adapter).to_dict().items()}
    text = json.dumps(config, indent=2, sort_keys=True, default=sorted)  # sets become lists
    return {f"transformer.{name}": stored for name, stored in adapter.tensors.items()}, {"format": "pt", ADAPTER_METADATA: text}


def peft_config(adapter: Adapter) -> LoraConfig:
    """peft's configuration of the adapter. Raises InputError when the installed peft does not know it."""
    try:
        if adapter.path.is_dir():
            return LoraConfig.from_pretrained(str(adapter.path))
        return LoraConfig(**adapter.config)
    except (TypeError, ValueError) as error:
        raise InputError(f"{adapter.path} has a configuration that the installed peft does not read: {error}") from error


def write_diffusers(path: Path, adapter: Adapter, dtype: torch.dtype | None, advance: Callable[[int], None] = lambda _: None) -> None:
    """Writes the adapter as diffusers' LoRA file, for load_lora_weights."""
    write_file(path, *diffusers_adapter(adapter), dtype, advance)


def write_peft(folder: Path, adapter: Adapter, dtype: torch.dtype | None, advance: Callable[[int], None] = lambda _: None) -> None:
    """Writes the adapter as a folder of peft's, for PeftModel.from_pretrained."""
    peft_config(adapter).save_pretrained(str(folder))
    write_file(folder / PEFT_WEIGHTS, {PEFT_PREFIX + name: s for name, s in adapter.tensors.items()}, {"format": "pt"}, dtype, advance)
