"""A model's weights wherever they lie: a pipeline folder, a transformer folder, or a single file in SD3's naming or diffusers'.

`open_weights` reads headers and configurations alone and checks them against the networks; the tensors stay on disk until
`load_part` puts a component's straight into a network without memory of its own, or writers.py copies them on.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from latentfm.errors import InputError
from latentfm.interchange import original
from latentfm.interchange.open_clip import clip_tokenizer
from latentfm.interchange.recognise import LORA, MMDIT, recognise
from latentfm.interchange.tensors import Held, Stored, Tensors, read_file, read_folder, target_dtype
from latentfm.models.folder import check_folder, read_info, refuse_pickle
from latentfm.models.mmdit import MMDiT
from latentfm.models.text import NULL_FILE
from latentfm.words import listed

PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
TEXT = PARTS[2:]
CLASSES = {
    "transformer": ("diffusers", "SD3Transformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "text_encoder_3": ("transformers", "T5EncoderModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "CLIPTokenizer"),
    "tokenizer_3": ("transformers", "T5Tokenizer"),
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
}
KEY = "latentfm"  # in a single file's metadata: the configurations, which weights alone do not tell whole
SD3_SCHEDULER = {"num_train_timesteps": 1000, "shift": 3.0}
ACTS = {"text_encoder": "quick_gelu", "text_encoder_2": "gelu"}
CLIP_VOCABULARY = 49408


@dataclass(frozen=True)
class Part:
    """A component: its configuration, and its tensors on disk under the names of diffusers or transformers."""

    config: dict[str, Any]
    tensors: Tensors


@dataclass(frozen=True)
class Weights:
    """What `path` holds. kind: "pipeline folder", "transformer folder", "single file (original naming)" or "(diffusers naming)".

    tokenizers: a folder for each one there is. others: folders of components that are only copied. notes: what a person
    should know about how it was read, a line each.
    """

    path: Path
    kind: str
    parts: dict[str, Part]
    metadata: dict[str, str] = field(default_factory=dict)
    tokenizers: dict[str, Path] = field(default_factory=dict)
    scheduler: dict[str, Any] | None = None
    info: dict[str, Any] = field(default_factory=dict)
    null: Path | None = None
    others: dict[str, tuple[Path, list[str]]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def open_weights(
    path: str | Path, parts: tuple[str, ...] = PARTS, like: Weights | None = None, sample_size: int | None = None
) -> Weights:
    """The weights at `path`, those of `parts`, each checked against the network its configuration makes.

    like: a pipeline folder whose configurations say of a single file what its weights do not show, where they fit it.
    sample_size: the side of the latents that the network is meant for, 128 in a file that does not say. Raises InputError for
    a path that holds something else, saying what it looks like, and for tensors missing, unknown, or of another shape.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist")
    refuse_pickle(path)
    if path.is_file():
        return open_file(path, parts, like, sample_size)
    if (path / "model_index.json").is_file():
        return open_pipeline(path, parts)
    if (path / "adapter_config.json").is_file():
        raise InputError(f"{path} is a LoRA adapter, not a model; load it on top of one, or convert it")
    if not (path / "config.json").is_file():
        raise InputError(f"{path} is no model folder: it has neither a model_index.json nor a config.json")
    part, metadata = open_component(path, "transformer")
    return Weights(path, "transformer folder", {"transformer": part}, metadata)


def open_pipeline(folder: Path, parts: tuple[str, ...]) -> Weights:
    """The components of a pipeline folder that its model_index.json names."""
    check_folder(folder, transformer="transformer" in parts)
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    named = {name: entry for name, entry in index.items() if isinstance(entry, list) and entry[0] is not None}
    if lost := [name for name in named if (name in parts or name not in PARTS) and not (folder / name).is_dir()]:
        raise InputError(f"{folder} lacks the folder {', '.join(lost)}, which its model_index.json names; its copy is not complete")
    opened = {name: open_component(folder / name, name) for name in PARTS if name in named and name in parts}
    config = folder / "scheduler" / "scheduler_config.json"
    return Weights(
        folder,
        "pipeline folder",
        {name: part for name, (part, _) in opened.items()},
        opened["transformer"][1] if "transformer" in opened else {},
        {name: folder / name for name in named if name.startswith("tokenizer")},
        read_json(config) if config.is_file() else None,
        read_info(folder),
        folder / NULL_FILE if (folder / NULL_FILE).is_file() else None,
        {name: (folder / name, entry) for name, entry in named.items() if name not in CLASSES},
    )


def open_component(folder: Path, name: str) -> tuple[Part, dict[str, str]]:
    """The component `name` that lies in `folder`, and its file's metadata."""
    tensors, metadata = read_folder(folder)
    if name == "transformer" and (kind := recognise(tensors)) != MMDIT:
        raise InputError(f"{folder} {looks_like(kind, tensors)}")
    part = Part(read_json(folder / "config.json"), without_idle(tensors))
    if wrong := problems(name, part):
        raise InputError(f"{folder} does not fit its config.json: {wrong}")
    return part, metadata


def check_transformer(folder: Path) -> None:
    """Raises InputError unless `folder` holds an MM-DiT's weights, whole and fitting their config.json; only headers are read.

    Weights saved quantised have tensors of their own and are left to their library to check.
    """
    if "quantization_config" not in read_json(folder / "config.json"):
        open_component(folder, "transformer")


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); copy the folder again") from error


def open_file(path: Path, parts: tuple[str, ...], like: Weights | None, sample_size: int | None) -> Weights:
    """The components in a single file."""
    tensors, metadata = read_file(path)
    if (kind := recognise(tensors)) != MMDIT:
        raise InputError(f"{path} {looks_like(kind, tensors)}")
    said = own_words(path, metadata)
    in_original = any("joint_blocks.0." in name for name in tensors)
    found, left = by_prefix(tensors, "joint_blocks.0." if in_original else "transformer_blocks.0.")
    if left := without_idle(left):
        raise InputError(f"{path} has {len(left)} tensors that belong to no part of an SD3 model: {listed(left)}{scaled_hint(left)}")
    opened = {}
    for name in (name for name in PARTS if name in found and name in parts):
        own = renamed(name, found[name], in_original)
        if name == "text_encoder" and name not in said:
            # SD3's authors read the first CLIP's pooled state before its projection, so the file's own means nothing; diffusers
            # too puts the identity there
            own["text_projection.weight"] = identity(own)
        part = Part(said.get(name) or config_for(name, own, like), own)
        if name == "transformer" and sample_size is not None:
            part = replace(part, config=part.config | {"sample_size": sample_size})
        if wrong := problems(name, part):
            raise InputError(f"{path}: {name} {wrong}")
        opened[name] = part
    naming = "original" if in_original else "diffusers"
    return Weights(
        path, f"single file ({naming} naming)", opened, metadata, scheduler=said.get("scheduler"), info=said.get("info") or {}
    )


def own_words(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """What a single file written here says of itself; empty for anyone else's."""
    try:
        said = json.loads(metadata.get(KEY, "{}"))
    except ValueError as error:
        raise InputError(f"{path} is damaged: its metadata's '{KEY}' cannot be read ({error})") from error
    return said if isinstance(said, dict) else {}


def by_prefix(tensors: Tensors, block: str) -> tuple[dict[str, Tensors], Tensors]:
    """The tensors of each component without their prefix, and those of none. `block` begins a name of the transformer's."""
    left, found = dict(tensors), {}
    for name in reversed(PARTS):  # the transformer last: its prefix may be empty
        for prefix in original.PREFIXES[name]:
            own = [key for key in left if key.startswith(prefix)]
            if own and (name != "transformer" or any(key.startswith(prefix + block) for key in own)):
                found[name] = {key.removeprefix(prefix): left.pop(key) for key in own}
                break
    return found, left


def renamed(name: str, tensors: Tensors, in_original: bool) -> Tensors:
    """A component's tensors, prefix gone, under the names of diffusers or transformers."""
    if in_original and name == "transformer":
        tensors = original.transformer_to_diffusers(tensors)
    if name == "vae" and not any(key.startswith("encoder.down_blocks.") for key in tensors):
        tensors = original.vae_to_diffusers(tensors)
    if name == "text_encoder_3" and "shared.weight" not in tensors and "encoder.embed_tokens.weight" in tensors:
        tensors = tensors | {"shared.weight": tensors["encoder.embed_tokens.weight"]}
    return without_idle(tensors)


def without_idle(tensors: Tensors) -> Tensors:
    """The tensors but for those that are copies or that no network has."""
    return {name: stored for name, stored in tensors.items() if not name.endswith(original.IDLE)}


def identity(tensors: Tensors) -> Stored:
    """The identity as the projection of a CLIP of these tensors."""
    token = "text_model.embeddings.token_embedding.weight"
    width = original.shape_of(tensors, token, 2)[1]
    dtype = target_dtype(tensors[token], None)
    return Held(dtype, (width, width), (), torch.eye(width, dtype=dtype))


def config_for(name: str, tensors: Tensors, like: Weights | None) -> dict[str, Any]:
    """The configuration of `tensors`: that of the pipeline folder `like` if it fits them, else what their shapes say."""
    if like and name in like.parts and not problems(name, Part(like.parts[name].config, tensors)):
        return like.parts[name].config
    if name == "transformer":
        return original.transformer_config(tensors)
    if name == "vae":
        return original.vae_config(tensors)
    return original.t5_config(tensors) if name == "text_encoder_3" else original.clip_config(tensors, ACTS[name])


def empty(name: str, config: dict[str, Any]) -> nn.Module:
    """The network of component `name` without memory: parameters and buffers on the meta device."""
    with torch.device("meta"):
        if name == "transformer":
            return MMDiT.from_config(config)
        if name == "vae":
            return AutoencoderKL.from_config(config)
        if name == "text_encoder_3":
            return T5EncoderModel(T5Config.from_dict(config))
        return CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config))


def problems(name: str, part: Part) -> str:
    """In what the tensors differ from those of the network that the configuration makes; "" when in nothing."""
    try:
        network = empty(name, part.config)
    except (ValueError, TypeError, RuntimeError) as error:
        return f"cannot be built: {str(error).splitlines()[0]}"
    expected = {key: tuple(value.shape) for key, value in network.state_dict().items() if not key.endswith(original.IDLE)}
    missing = [key for key in expected if key not in part.tensors]
    unknown = [key for key in part.tensors if key not in expected]
    shapes = [
        f"{key} {list(stored.shape)} where {list(expected[key])} is expected"
        for key, stored in part.tensors.items()
        if key in expected and stored.shape != expected[key]
    ]
    lines = [f"lacks {len(missing)} tensors: {listed(missing)}"] if missing else []
    lines += [f"has {len(unknown)} tensors too many: {listed(unknown)}{scaled_hint(unknown)}"] if unknown else []
    lines += [f"has {len(shapes)} tensors of another shape: {listed(shapes)}"] if shapes else []
    return "; ".join(lines)


def scaled_hint(names: Any) -> str:
    scaled = any("scaled_fp8" in name or name.endswith((".scale_weight", ".weight_scale", ".scale_input")) for name in names)
    return "; this is scaled float8, which is not read here: use the model's float16 or bfloat16 file" if scaled else ""


def looks_like(kind: str | None, tensors: Tensors) -> str:
    """How to say that a file is no SD3 model."""
    if kind == LORA:
        return "is a LoRA, not a model: load it on top of one, with load_lora_weights"
    if kind is not None:
        return f"looks like {kind}, not an SD3 or SD3.5 model"
    return f"is no SD3 or SD3.5 model, nor anything known here; it begins with {listed(tensors)}"


def architecture(config: dict[str, Any]) -> str:
    """The name of an MM-DiT of this configuration: a published one, or its size."""
    layers, width = config["num_layers"], config["num_attention_heads"] * config["attention_head_dim"]
    dual, norm = len(config.get("dual_attention_layers") or ()), config.get("qk_norm")
    published = {(24, 1536, 0, None): "SD3 medium", (24, 1536, 13, "rms_norm"): "SD3.5 medium", (38, 2432, 0, "rms_norm"): "SD3.5 large"}
    return published.get((layers, width, dual, norm), f"MM-DiT of {layers} layers x {width}")


def load_part(name: str, part: Part, dtype: torch.dtype) -> nn.Module:
    """The component in memory, on the CPU, in evaluation mode, in `dtype`: its weights read once, into no second copy."""
    network = empty(name, part.config)
    state = {key: stored.load(dtype if stored.dtype.is_floating_point else None) for key, stored in part.tensors.items()}
    network.load_state_dict(state, strict=False, assign=True)  # tied names are left out; the rest `problems` has checked
    if name in TEXT:
        network.tie_weights()
    if name in ACTS:  # a CLIP: the one buffer here that is not saved
        network.text_model.embeddings.position_ids = torch.arange(network.config.max_position_embeddings)[None]
    return network.eval()


def load_transformer(path: str | Path, dtype: torch.dtype = torch.float32, sample_size: int | None = None) -> MMDiT:
    """The MMDiT in a pipeline folder, a transformer folder, or a single file in SD3's naming or diffusers'.

    sample_size: the side of the latents, 128 in a file that does not say. Peak memory is the network's own. Raises InputError
    as open_weights does.
    """
    weights = open_weights(path, parts=("transformer",), sample_size=sample_size)
    return load_part("transformer", weights.parts["transformer"], dtype)


def completed(weights: Weights, base: Weights | None) -> Weights:
    """`weights` as a whole pipeline: what it lacks taken from the pipeline folder `base`, tokenizers and scheduler too.

    Without them: SD3's scheduler, CLIP's own tokenizers; a T5 without tokenizer is left out, and `notes` says so. Raises
    InputError naming what is still missing.
    """
    base = base or Weights(weights.path, "", {})
    parts = {name: found for name in PARTS if (found := weights.parts.get(name) or base.parts.get(name))}
    if missing := [name for name in ("transformer", "vae") if name not in parts]:
        raise InputError(f"{weights.path} has no {' and no '.join(missing)}; give a pipeline folder that does, to take the rest from")
    notes, tokenizers = list(weights.notes), {}
    for name in TEXT:
        tokenizer = name.replace("text_encoder", "tokenizer")
        if name not in parts:
            continue
        if folder := weights.tokenizers.get(tokenizer) or base.tokenizers.get(tokenizer):
            tokenizers[tokenizer] = folder
        elif name == "text_encoder_3":
            del parts[name]
            notes.append("T5 is left out: its tokenizer is not in the file; give a pipeline folder with a tokenizer_3 to keep it")
        elif parts[name].config["vocab_size"] != CLIP_VOCABULARY:
            raise InputError(f"{weights.path} has a {name} with a vocabulary of its own and no tokenizer; give the pipeline it is of")
    if not any(name in parts for name in TEXT):
        notes.append("no text encoder: prompts cannot be read, only prompt_embeds given; give a pipeline folder to take the encoders from")
    encoders = weights if any(name in weights.parts for name in TEXT) else base  # whose null condition and T5 length hold
    return replace(
        weights,
        parts=parts,
        tokenizers=tokenizers,
        scheduler=weights.scheduler or base.scheduler or SD3_SCHEDULER,
        info=encoders.info,
        null=encoders.null,
        others=weights.others or base.others,
        notes=tuple(notes),
    )


def load_tokenizer(name: str, weights: Weights) -> Any:
    """The tokenizer `name` of a completed pipeline."""
    from transformers import CLIPTokenizer, T5Tokenizer

    if name not in weights.tokenizers:
        length = weights.parts[name.replace("tokenizer", "text_encoder")].config["max_position_embeddings"]
        return clip_tokenizer("!" if name == "tokenizer_2" else "<|endoftext|>", length)
    return (T5Tokenizer if name == "tokenizer_3" else CLIPTokenizer).from_pretrained(weights.tokenizers[name])
