"""A model's weights wherever they lie: a pipeline folder, a transformer folder, or a single file in SD3's naming or diffusers'.

`open_weights` reads headers and configurations alone and checks them against the networks; the tensors stay on disk until
`load_part` puts a component's straight into a network without memory of its own, or writers.py copies them on.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentfm.errors import InputError
from latentfm.files import CONTENT_ERRORS, reading, reason
from latentfm.interchange import original
from latentfm.interchange.networks import all_finite, empty
from latentfm.interchange.recognise import LORA, MMDIT, recognise
from latentfm.interchange.tensors import Held, Stored, Tensors, read_file, read_folder, target_dtype
from latentfm.models.encoders import BY_NAME, CLIP, ENCODERS, T5, TEXT
from latentfm.models.folder import PARTS, check_folder, read_config, read_info, refuse_pickle, wrong_info, wrong_setting
from latentfm.models.manifest import check_manifest
from latentfm.models.mmdit import MMDiT
from latentfm.models.text import NULL_FILE
from latentfm.words import count, listed, shown

CLASSES = {
    "transformer": ("diffusers", "SD3Transformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    **{encoder.name: ("transformers", encoder.family.model) for encoder in ENCODERS},
    **{encoder.tokenizer: ("transformers", encoder.family.tokenizer) for encoder in ENCODERS},
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
}
KEY = "latentfm"  # in a single file's metadata: the configurations, which weights alone do not tell whole
TIED = {"encoder.embed_tokens.weight": "shared.weight"}  # T5's, one tensor under two names
WIDEST_CLIP = 8192


@dataclass(frozen=True)
class Part:
    """A component: its configuration, and its tensors on disk under the names of diffusers or transformers."""

    config: dict[str, Any]
    tensors: Tensors


@dataclass(frozen=True)
class Weights:
    """What `path` holds. kind: "pipeline folder", "transformer folder", "single file (original naming)" or "(diffusers naming)".

    tokenizers: a folder for each one there is. others: folders of components that are only copied. notes: what a person
    should know about how it was read, a line each. configs: of components whose weights are not there.
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
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)

    def config(self, name: str) -> dict[str, Any] | None:
        """The configuration of component `name`; None where there is none."""
        return self.parts[name].config if name in self.parts else self.configs.get(name)


def open_weights(
    path: str | Path, parts: tuple[str, ...] = PARTS, like: Weights | None = None, sample_size: int | None = None, verify: bool = False
) -> Weights:
    """The weights at `path`, those of `parts`, each checked against the network its configuration makes.

    like: a pipeline folder whose configurations say of a single file what its weights do not show, where they fit it.
    sample_size: the side of the latents that the network is meant for, 128 in a file that does not say. verify: every byte of a folder
    is compared with its manifest. Raises InputError for a path that holds something else, saying what it looks like, for tensors
    missing, unknown, or of another shape, and for a folder that has changed since it was saved.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{shown(path)} does not exist")
    if path.is_dir() and (path / "model_index.json").is_file():
        return open_pipeline(path, parts, verify)
    refuse_pickle(path)
    if not path.is_dir():
        if verify:
            raise InputError(f"{shown(path)} is a single file, and verifying is for folders, which have a manifest; leave it out")
        try:
            with reading(path, "it is no SD3 or SD3.5 model, or a damaged one; copy it again"):
                return open_file(path, parts, like, sample_size)
        except InputError as error:
            raise error if shown(path) in str(error) else InputError(f"{shown(path)}: {error}") from error
    if (path / "adapter_config.json").is_file():
        raise InputError(f"{shown(path)} is a LoRA adapter, not a model; load it on top of one, or convert it")
    if not (path / "config.json").is_file():
        raise InputError(f"{shown(path)} is no model folder: it has neither a model_index.json nor a config.json")
    part, metadata = open_component(path, "transformer")
    check_manifest(path, verify)
    return Weights(path, "transformer folder", {"transformer": part}, metadata)


def open_pipeline(folder: Path, parts: tuple[str, ...], verify: bool = False) -> Weights:
    """The components of a pipeline folder that its model_index.json names."""
    named = check_folder(folder, transformer="transformer" in parts, without=[name for name in PARTS if name not in parts], verify=verify)
    opened = {name: open_component(folder / name, name) for name in PARTS if name in named and name in parts}
    config = folder / "scheduler" / "scheduler_config.json"
    return Weights(
        folder,
        "pipeline folder",
        {name: part for name, (part, _) in opened.items()},
        opened["transformer"][1] if "transformer" in opened else {},
        {name: folder / name for name in named if name.startswith("tokenizer")},
        read_config(config) if config.is_file() else None,
        read_info(folder),
        folder / NULL_FILE if (folder / NULL_FILE).is_file() else None,
        {name: (folder / name, list(entry)) for name, entry in named.items() if name not in CLASSES},
    )


def open_component(folder: Path, name: str, variant: str | None = None) -> tuple[Part, dict[str, str]]:
    """The component `name` that lies in `folder`, and its file's metadata; of its weights those of `variant` where they are there.

    Raises InputError for weights that are none, cut short, another model's, or unlike their config.json. Quantised weights, which have
    tensors of their own, are refused.
    """
    tensors, metadata = read_folder(folder, variant)
    config = read_config(folder / "config.json")
    if config.get("quantization_config") is not None:
        raise InputError(f"{shown(folder)} is quantised; it draws, but for this give the model in float16, bfloat16 or float32")
    if name == "transformer" and (kind := recognise(tensors)) != MMDIT:
        raise InputError(f"{shown(folder)} {looks_like(kind, tensors)}")
    part = Part(config, without_idle(tensors))
    if wrong := problems(name, part):
        raise InputError(f"{shown(folder)} does not fit its config.json: {wrong}")
    return part, metadata


def open_file(path: Path, parts: tuple[str, ...], like: Weights | None, sample_size: int | None) -> Weights:
    """The components in a single file."""
    tensors, metadata = read_file(path)
    if (kind := recognise(tensors)) != MMDIT:
        raise InputError(f"{shown(path)} {looks_like(kind, tensors)}")
    said = own_words(path, metadata)
    in_original = any("joint_blocks.0." in name for name in tensors)
    found, left = by_prefix(tensors, "joint_blocks.0." if in_original else "transformer_blocks.0.")
    if left := without_idle(left):
        raise InputError(
            f"{shown(path)} has {count(len(left), 'tensor')} that belong to no part of an SD3 model: {listed(left)}{scaled_hint(left)}"
        )
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
            raise InputError(f"{shown(path)}: {name} {wrong}")
        opened[name] = part
    naming = "original" if in_original else "diffusers"
    return Weights(path, f"single file ({naming} naming)", opened, metadata, scheduler=said.get("scheduler"), info=said.get("info") or {})


def own_words(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """What a single file written here says of itself: configurations by part, and its info; empty for anyone else's."""
    with reading(f"{shown(path)}: its metadata's '{KEY}'"):
        said = json.loads(metadata.get(KEY, "{}"))
        if not isinstance(said, dict):
            return {}
        for name, settings in said.items():
            if not isinstance(settings, (dict, type(None))):
                raise ValueError(f"{shown(name, 80)} is no configuration")
            if name == "info" and (problem := wrong_info(settings or {})):
                raise ValueError(f"it says {problem}")
            for key, value in (settings or {}).items():
                if problem := wrong_setting(key, value):
                    raise ValueError(f"it says {shown(key, 80)} {shown(json.dumps(value), 80)}, {problem}")
        return said


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
    if name in TEXT and BY_NAME[name].family is T5 and "shared.weight" not in tensors and "encoder.embed_tokens.weight" in tensors:
        tensors = tensors | {"shared.weight": tensors["encoder.embed_tokens.weight"]}
    return without_idle(tensors)


def without_idle(tensors: Tensors) -> Tensors:
    """The tensors but for those that are copies or that no network has."""
    return {name: stored for name, stored in tensors.items() if not name.endswith(original.IDLE)}


def identity(tensors: Tensors) -> Stored:
    """The identity as the projection of a CLIP of these tensors."""
    token = "text_model.embeddings.token_embedding.weight"
    width = original.shape_of(tensors, token, 2)[1]
    if width > WIDEST_CLIP:
        raise InputError(f"a CLIP {width:,} wide is none that is read; the widest is {WIDEST_CLIP:,}")
    dtype = target_dtype(tensors[token], None)
    return Held(dtype, (width, width), (), torch.eye(width, dtype=dtype))


def config_for(name: str, tensors: Tensors, like: Weights | None) -> dict[str, Any]:
    """The configuration of `tensors`: that of the pipeline folder `like` if it fits them, else what their shapes say."""
    if like and (said := like.config(name)) is not None and not problems(name, Part(said, tensors)):
        return said
    if name == "transformer":
        return original.transformer_config(tensors)
    if name == "vae":
        return original.vae_config(tensors)
    return original.t5_config(tensors) if BY_NAME[name].family is T5 else original.clip_config(tensors, BY_NAME[name].act)


def problems(name: str, part: Part) -> str:
    """In what the tensors differ from those of the network that the configuration makes; "" when in nothing."""
    try:
        network = empty(name, part.config)
    except CONTENT_ERRORS as error:
        return f"cannot be built: {reason(error)}"
    expected = {key: tuple(value.shape) for key, value in network.state_dict().items() if not key.endswith(original.IDLE)}
    missing = [key for key in expected if key not in part.tensors]
    unknown = [key for key in part.tensors if key not in expected]
    shapes = [
        f"{key} {list(stored.shape)} where {list(expected[key])} is expected"
        for key, stored in part.tensors.items()
        if key in expected and stored.shape != expected[key]
    ]
    lines = [f"lacks {count(len(missing), 'tensor')}: {listed(missing)}"] if missing else []
    lines += [f"has {count(len(unknown), 'tensor')} too many: {listed(unknown)}{scaled_hint(unknown)}"] if unknown else []
    lines += [f"has {count(len(shapes), 'tensor')} of another shape: {listed(shapes)}"] if shapes else []
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
    """The component in memory, on the CPU, in evaluation mode, in `dtype`: its weights read once, into no second copy.

    What transformers keeps in float32 beside float16 (a part of T5) stays so. Raises InputError for weights that are not finite.
    """
    network = empty(name, part.config)
    state = {key: load_tensor(name, network, key, stored, dtype) for key, stored in part.tensors.items()}
    network.load_state_dict(state, strict=False, assign=True)  # tied names are left out; the rest `problems` has checked
    if name in TEXT:
        network.tie_weights()
    if name in TEXT and BY_NAME[name].family is CLIP:  # the one buffer here that is not saved
        network.text_model.embeddings.position_ids = torch.arange(network.config.max_position_embeddings)[None]
    return network.eval()


def load_part_tensors(name: str, part: Part, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yields the state dict of what `load_part` gives, sorted by name, one tensor in memory at a time. Raises InputError as it does."""
    network = empty(name, part.config)
    for key in sorted(network.state_dict()):
        own = key if key in part.tensors else TIED[key]
        yield key, load_tensor(name, network, own, part.tensors[own], dtype)


def load_tensor(name: str, network: nn.Module, key: str, stored: Stored, dtype: torch.dtype) -> Tensor:
    """A tensor of a component as the component has it that is loaded in `dtype`. Raises InputError when it is not finite."""
    wide = tuple(getattr(network, "_keep_in_fp32_modules", None) or ()) if dtype is torch.float16 and name in TEXT else ()
    kept = torch.float32 if set(key.split(".")).intersection(wide) else dtype
    value = stored.load(kept if stored.dtype.is_floating_point else None)
    if not all_finite(value):
        raise not_finite(name, key, stored, value)
    return value


def not_finite(name: str, key: str, stored: Stored, value: Tensor) -> InputError:
    """What to say of a tensor of component `name` that is not all finite."""
    bad, where = int(value.isfinite().logical_not().sum()), shown(stored.pieces[0][0]) if stored.pieces else "the file"
    wider = f", or load it in {str(stored.dtype).removeprefix('torch.')}" if all_finite(stored.load()) else ""  # it is good there
    return InputError(
        f"the weights of the {name} are damaged: {bad:,} of the {value.numel():,} numbers of {shown(key, 100)} in {where} are NaN or "
        f"infinite in {str(value.dtype).removeprefix('torch.')}; copy it again{wider}"
    )


def load_transformer(path: str | Path, dtype: torch.dtype = torch.float32, sample_size: int | None = None) -> MMDiT:
    """The MMDiT in a pipeline folder, a transformer folder, or a single file in SD3's naming or diffusers'.

    sample_size: the side of the latents, 128 in a file that does not say. Peak memory is the network's own. Raises InputError
    as open_weights does.
    """
    weights = open_weights(path, parts=("transformer",), sample_size=sample_size)
    return load_part("transformer", weights.parts["transformer"], dtype)
