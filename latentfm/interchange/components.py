"""The components of a pipeline folder in memory. What a file says decides sizes and numbers, never which code runs or what is fetched.

Weights and tokenizers are read here, by weights.py and models/tokenizers.py. Only what is quantised, and an image encoder, is handed to its
library, after a look at what it would open there.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from safetensors import SafetensorError

from latentfm.errors import InputError
from latentfm.files import reading
from latentfm.interchange.networks import all_finite, text_config
from latentfm.interchange.weights import CLASSES, load_part, open_component
from latentfm.models.encoders import BY_NAME, CLIP, ENCODERS, T5, TEXT
from latentfm.models.folder import MOST_T5_TOKENS, PARTS, read_config, read_index
from latentfm.models.mmdit import MMDiT
from latentfm.models.stored import read_header, weight_files
from latentfm.models.text import NULL_FILE, NullCondition, PromptEncoder, PromptParts
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


def load_scheduler(folder: Path, kind: str | None = None) -> SchedulerMixin:
    """The scheduler in `folder`/scheduler, of the class `kind`, or of the one that the folder names.

    Raises InputError for another class than a scheduler of diffusers, or a damaged one.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    if kind is None:
        kind = read_index(folder).get("scheduler", (None, CLASSES["scheduler"][1]))[1]
    found = getattr(diffusers, kind, None)
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise InputError(f"{shown(folder)} has a {kind} as its scheduler, which is none of diffusers; use {CLASSES['scheduler'][1]}")
    if not path.is_file():
        raise InputError(f"{shown(path)} is missing; the copy of the folder is not complete")
    config = read_config(path)
    with reading(path, "copy the folder again"):
        check_times(found.from_config(config))
        return found.from_config(config)


def check_times(scheduler: SchedulerMixin) -> None:
    """Raises ValueError, or what the scheduler's own code raises, when its settings give it no times that are numbers; it is used up."""
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return
    config = scheduler.config
    if config.use_dynamic_shifting and config.base_image_seq_len == config.max_image_seq_len:
        raise ValueError("its base_image_seq_len and max_image_seq_len are the same, and its shift goes from one to the other")
    scheduler.set_timesteps(4, device="cpu", mu=config.base_shift if config.use_dynamic_shifting else None)
    if not scheduler.sigmas.isfinite().all():
        raise ValueError("its settings give times that are no numbers")


def load_text_encoders(folder: Path, joint_dim: int, pooled_dim: int, dtype: torch.dtype = torch.float32) -> PromptEncoder:
    """Whichever of text_encoder{,_2,_3} and its tokenizer a pipeline folder holds, as one, in evaluation mode."""
    encoders = [
        load_component(folder, kind.name, kind.family.model, dtype) if (folder / kind.name).is_dir() else None for kind in ENCODERS
    ]
    tokenizers = [
        load_tokenizer(folder / kind.tokenizer) if encoder is not None else None for kind, encoder in zip(ENCODERS, encoders, strict=True)
    ]
    return PromptEncoder(tokenizers, encoders, joint_dim, pooled_dim)


def load_quantised(
    place: Path, name: str, config: Mapping[str, Any], dtype: torch.dtype, variant: str | None = None, quantization: Any = None
) -> torch.nn.Module:
    """A component that is quantised, as saved by bitsandbytes or, by a `quantization` given, as it is loaded; by its library."""
    saved = config.get("quantization_config")
    if saved is not None:
        method = saved.get("quant_method") if isinstance(saved, dict) else saved
        if not isinstance(method, str) or not method.startswith("bitsandbytes"):
            raise InputError(
                f"{shown(place / 'config.json')} says it is quantised by {shown(method, 80)}; only bitsandbytes is read here: take the "
                "model in float16, bfloat16 or float32"
            )
    check_for_library(place, name, config, variant)
    more = {"use_safetensors": True, "variant": variant, "local_files_only": True}
    more |= {"quantization_config": quantization} if quantization is not None else {}
    with reading(place, "take the model in float16, bfloat16 or float32, or copy the folder again", also=(ImportError,)):
        if name in TEXT:
            own = text_config(name, config)
            if saved is not None:
                own.quantization_config = dict(saved)
            network = getattr(transformers, BY_NAME[name].family.model).from_pretrained(place, config=own, dtype=dtype, **more)
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
    """Raises InputError unless all that a library would open in `place` are whole safetensors, quantised where the configuration says so.

    And for what has it look elsewhere.
    """
    if name not in PARTS or name in TEXT:  # transformers' own
        if (place / "adapter_config.json").exists():
            raise InputError(f"{shown(place)} has an adapter_config.json, by which its library would load another model; remove it")
        if name not in TEXT and (found := [key for key in CODE if config.get(key) is not None]):
            raise refused(place / "config.json", found[0])
    kinds = {entry.dtype for path in weight_files(place, variant).paths for entry in read_header(path).tensors.values()}
    if config.get("quantization_config") is not None and not kinds & {"U8", "I8"}:
        raise InputError(f"{shown(place)} says it is quantised, and its weights are not; copy the folder again")


def refused(path: Path, key: str) -> InputError:
    return InputError(f"{shown(path)} sets {key}, by which its library would fetch or run code; remove it there")


def check_together(parts: Mapping[str, Any], where: Path) -> None:
    """Raises InputError when components of one folder were not made for each other: the widths where they meet differ."""
    sizes = {name: part.config for name, part in parts.items() if name in PARTS and part is not None}
    network, vae, t5 = (sizes.get(name) for name in ("transformer", "vae", next(e.name for e in ENCODERS if e.family is T5)))
    clips = [sizes[encoder.name].projection_dim for encoder in ENCODERS if encoder.family is CLIP and encoder.name in sizes]
    meetings = []
    if network is not None:
        if vae and network.in_channels != 2 * vae.latent_channels + 1:  # which an inpainting network reads, the mask's among them
            meetings += [("the transformer's latent channels", network.in_channels, "the VAE's", vae.latent_channels)]
        meetings += [("the transformer's text width", network.joint_attention_dim, "T5's", t5.d_model)] if t5 else []
        if len(clips) == 2:
            meetings += [("the transformer's pooled width", network.pooled_projection_dim, "the two CLIPs'", sum(clips))]
    for one, size, other, found in meetings:
        if size != found:
            raise InputError(f"the parts of {shown(where)} do not go together: {one} {size}, {other} {found}; copy the folder again")


def read_null(folder: Path, encoder: PromptEncoder | None, replaced: Collection[int] = ()) -> NullCondition:
    """The null condition that `folder` holds, or, where it has none, the empty prompt's. Raises InputError when its file is damaged.

    replaced: which of the three encoders are not the folder's own, as for NullCondition.load.
    """
    if (folder / NULL_FILE).exists():
        read_header(folder / NULL_FILE)
    with reading(folder / NULL_FILE, "copy the folder again", also=(SafetensorError,)):
        null = NullCondition.load(folder, encoder, replaced)
        for length, parts in null.by_length.items():
            check_null(length, parts, encoder)
        return null


def check_null(length: int, parts: PromptParts, encoder: PromptEncoder | None) -> None:
    """Raises ValueError unless the null condition for `length` T5 tokens is that of one prompt, finite, and of the right widths."""
    for name, value in parts.items():
        pooled = name.startswith("pooled")
        if value.ndim != (2 if pooled else 3) or value.shape[0] != 1 or not value.is_floating_point():
            raise ValueError(f"its {length}.{name} is {list(value.shape)}, which is not of one prompt")
        if not all_finite(value):
            raise ValueError(f"its {length}.{name} is not finite")
        if name == "t5" and (value.shape[1] != length or (encoder is not None and value.shape[2] != encoder.joint_dim)):
            raise ValueError(f"its {length}.t5 is {list(value.shape)}, which is not of {length} tokens of this model")
    if not 1 <= length <= MOST_T5_TOKENS:
        raise ValueError(f"it is of {length} T5 tokens")
    widths = sum(value.shape[-1] for name, value in parts.items() if name.startswith("pooled"))
    if encoder is not None and widths > encoder.pooled_dim:
        raise ValueError(f"its pooled parts are {widths} wide, the model's {encoder.pooled_dim}")


def scheduler_from(config: Mapping[str, Any], path: Path) -> FlowMatchEulerDiscreteScheduler:
    """SD3's scheduler with the settings that `path` holds for it. Raises InputError when they are another scheduler's, or damaged."""
    own = FlowMatchEulerDiscreteScheduler.__name__
    if (name := config.get("_class_name", own)) != own:
        raise InputError(f"{shown(path)} has a {shown(name, 80)}, which steps in another way; here there is {own} alone")
    with reading(path, also=(ImportError,)):
        check_times(FlowMatchEulerDiscreteScheduler.from_config(dict(config)))
        return FlowMatchEulerDiscreteScheduler.from_config(dict(config))
