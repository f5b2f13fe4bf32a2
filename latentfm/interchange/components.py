"""The components of a pipeline folder in memory. What a file says decides sizes and numbers, never which code runs or what is fetched.

Weights and tokenizers are read here, by weights.py and models/tokenizers.py. Only what is quantised, and an image encoder, is handed to its
library, after a look at what it would open there.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from safetensors import SafetensorError
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from latentfm.errors import InputError
from latentfm.files import reading
from latentfm.interchange.weights import CLASSES, all_finite, load_part, open_component, text_config
from latentfm.models.folder import PARTS, TEXT, read_config
from latentfm.models.mmdit import MMDiT
from latentfm.models.stored import read_header, weight_files
from latentfm.models.text import NULL_FILE, NullCondition, PromptEncoder
from latentfm.models.tokenizers import load_tokenizer
from latentfm.words import shown

ALIKE = {"CLIPTokenizerFast": "CLIPTokenizer", "T5TokenizerFast": "T5Tokenizer"}  # names of older folders
EXTRA = {  # of SD3 pipelines with an image adapter; nothing here computes with them
    "image_encoder": ("CLIPVisionModelWithProjection", "SiglipVisionModel"),
    "feature_extractor": ("CLIPImageProcessor", "CLIPImageProcessorFast", "SiglipImageProcessor", "SiglipImageProcessorFast"),
}
CODE = (  # settings that have transformers fetch code, open other files, or both
    "auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation",
    "transformers_weights", "adapter_config", "kernel_config", "use_kernels",
)  # fmt: skip


def load_component(
    folder: Path, name: str, kind: str, dtype: torch.dtype, variant: str | None = None, quantization: Any = None
) -> Any:
    """The component `name` of the pipeline in `folder`, of the class that its model_index.json calls `kind`, on the CPU.

    Weights are in `dtype`, of the files of `variant` where it is there. quantization: a library's configuration to quantise them by.
    Raises InputError when it is of another class than a Stable Diffusion 3 pipeline's, damaged, not finite, or would need code or
    files from elsewhere.
    """
    place, expected = folder / name, EXTRA.get(name) or (CLASSES[name][1],)
    if name == "scheduler":
        return load_scheduler(folder, kind)
    if ALIKE.get(kind, kind) not in expected:
        raise InputError(f"{shown(folder)} has a {kind} as its {name}, which is not read here; it must be a {' or '.join(expected)}")
    if name.startswith("tokenizer"):
        return load_tokenizer(place)
    if name in EXTRA:
        return load_extra(place, kind)
    config = read_config(place / "config.json")
    if quantization is not None or config.get("quantization_config") is not None:
        return load_quantised(place, name, config, dtype, variant, quantization)
    return load_part(name, open_component(place, name, variant)[0], dtype)


def load_scheduler(folder: Path, kind: str = "FlowMatchEulerDiscreteScheduler") -> SchedulerMixin:
    """The scheduler in `folder`/scheduler. Raises InputError for another class than a scheduler of diffusers, or a damaged one."""
    path = folder / "scheduler" / "scheduler_config.json"
    found = getattr(diffusers, kind, None)
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise InputError(f"{shown(folder)} has a {kind} as its scheduler, which is none of diffusers; use {CLASSES['scheduler'][1]}")
    if not path.is_file():
        raise InputError(f"{shown(path)} is missing; the copy of the folder is not complete")
    config = read_config(path)
    with reading(path, "copy the folder again"):
        return found.from_config(config)


def load_text_encoders(folder: Path, joint_dim: int, pooled_dim: int, dtype: torch.dtype = torch.float32) -> PromptEncoder:
    """Whichever of text_encoder{,_2,_3} and its tokenizer a pipeline folder holds, as one, in evaluation mode."""
    encoders = [load_component(folder, name, CLASSES[name][1], dtype) if (folder / name).is_dir() else None for name in TEXT]
    tokenizers = [
        load_tokenizer(folder / name.replace("text_encoder", "tokenizer")) if encoder is not None else None
        for name, encoder in zip(TEXT, encoders, strict=True)
    ]
    return PromptEncoder(tokenizers, encoders, joint_dim, pooled_dim)


def load_quantised(
    place: Path, name: str, config: Mapping[str, Any], dtype: torch.dtype, variant: str | None = None, quantization: Any = None
) -> torch.nn.Module:
    """A component that is quantised, as saved by bitsandbytes or, by a `quantization` given, as it is loaded; by its library."""
    check_for_library(place, name, config, variant)
    saved = config.get("quantization_config")
    if saved is not None:
        method = saved.get("quant_method") if isinstance(saved, dict) else saved
        if not isinstance(method, str) or not method.startswith("bitsandbytes"):
            raise InputError(
                f"{shown(place / 'config.json')} says it is quantised by {shown(method, 80)}; only bitsandbytes is read here: take the "
                "model in float16, bfloat16 or float32"
            )
    more = {"use_safetensors": True, "variant": variant, "local_files_only": True}
    more |= {"quantization_config": quantization} if quantization is not None else {}
    with reading(place, "take the model in float16, bfloat16 or float32, or copy the folder again", also=(ImportError,)):
        if name in TEXT:
            own = text_config(name, config)
            if saved is not None:
                own.quantization_config = dict(saved)
            kind = T5EncoderModel if name == "text_encoder_3" else CLIPTextModelWithProjection
            network = kind.from_pretrained(place, config=own, dtype=dtype, **more)
        else:
            network = (MMDiT if name == "transformer" else AutoencoderKL).from_pretrained(place, torch_dtype=dtype, **more)
    for key, value in network.state_dict().items():
        if torch.is_tensor(value) and not all_finite(value):
            raise InputError(f"the weights of the {name} are damaged: {shown(key, 100)} in {shown(place)} is not finite; copy it again")
    return network.eval()


def load_extra(place: Path, kind: str) -> Any:
    """An image encoder, or what prepares pictures for it."""
    config = read_config(place / ("config.json" if place.name == "image_encoder" else "preprocessor_config.json"))
    more = {}
    if place.name == "image_encoder":
        check_for_library(place, place.name, config)
        more = {"use_safetensors": True}
    elif found := [key for key in CODE if key in config]:
        raise refused(place / "preprocessor_config.json", found[0])
    with reading(place, "copy the folder again", also=(ImportError,)):
        return getattr(transformers, kind).from_pretrained(place, local_files_only=True, **more)


def check_for_library(place: Path, name: str, config: Mapping[str, Any], variant: str | None = None) -> None:
    """Raises InputError unless all that a library would open in `place` are whole safetensors, and nothing has it look elsewhere."""
    if name not in PARTS or name in TEXT:  # transformers' own
        if (place / "adapter_config.json").exists():
            raise InputError(f"{shown(place)} has an adapter_config.json, by which its library would load another model; remove it")
        if name not in TEXT and (found := [key for key in CODE if config.get(key) is not None]):
            raise refused(place / "config.json", found[0])
    for path in weight_files(place, variant).paths:
        read_header(path)


def refused(path: Path, key: str) -> InputError:
    return InputError(f"{shown(path)} sets {key}, by which its library would fetch or run code; remove it there")


def read_null(folder: Path, encoder: PromptEncoder) -> NullCondition:
    """The null condition that `folder` holds, or, where it has none, the empty prompt's. Raises InputError when its file is damaged."""
    if (folder / NULL_FILE).exists():
        read_header(folder / NULL_FILE)
    with reading(folder / NULL_FILE, "copy the folder again", also=(SafetensorError,)):
        return NullCondition.load(folder, encoder)


def scheduler_from(config: Mapping[str, Any], path: Path) -> FlowMatchEulerDiscreteScheduler:
    """SD3's scheduler with the settings that `path` holds for it."""
    with reading(path):
        return FlowMatchEulerDiscreteScheduler.from_config(dict(config))
