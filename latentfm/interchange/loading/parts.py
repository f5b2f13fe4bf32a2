"""The components of a pipeline as from_pretrained and from_single_file ask for them: found, checked, loaded, and put where they belong."""

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from torch import nn

from latentfm.bounds import MOST_SIDE
from latentfm.errors import InputError
from latentfm.files import reason
from latentfm.interchange.completing import completed, open_base, tokenizer_of
from latentfm.interchange.components import EXTRA, check_together, load_component, scheduler_from
from latentfm.interchange.loading.keywords import DOWNLOAD, dtype_asked_for, dtype_of, named_by, quantisation, quantisation_of
from latentfm.interchange.loading.placing import Places, bytes_of, places_of
from latentfm.interchange.networks import empty
from latentfm.interchange.weights import CLASSES, Weights, load_part, open_weights
from latentfm.models.encoders import BY_NAME, CLIP, ENCODERS, TEXT
from latentfm.models.folder import PARTS, check_folder, left_out, read_config, refuse_pickle
from latentfm.models.stored import variants_in
from latentfm.words import listed, shown

logger = logging.getLogger(__name__)
COMPONENTS = (*CLASSES, *EXTRA)
# what a pipeline reads of its networks' configurations as soon as it is made
SETTINGS = {"transformer": "joint_attention_dim", "vae": "block_out_channels"} | {
    encoder.name: "projection_dim" if encoder.family is CLIP else "d_model" for encoder in ENCODERS
}
LINK = re.compile(
    r"(?:https?://)?(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)/(?:(?:blob|resolve)/([^/]+)/)?(.+)"
)  # repository, revision, file


@dataclass(frozen=True)
class Loaded:
    """A pipeline's components by name, None for those that are left out; where they were put, and how they were quantised."""

    components: dict[str, Any]
    places: Places
    quantization: PipelineQuantizationConfig | None = None


def components_in(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The components among a loading call's keyword arguments, taken out of them. Raises InputError for one that is none."""
    given = {name: kwargs.pop(name) for name in COMPONENTS if name in kwargs}
    for name, part in given.items():
        check_component(name, part)
    return given


def check_component(name: str, part: Any) -> None:
    """Raises InputError for a component that cannot be `name`; None is none."""
    if name == "scheduler":
        good = hasattr(part, "set_timesteps") and not isinstance(part, type)
    elif name in PARTS:
        good = isinstance(part, nn.Module) and hasattr(getattr(part, "config", None), SETTINGS[name])
    else:
        good = hasattr(part, "config") if name == "image_encoder" else callable(part) and not isinstance(part, nn.Module)
    if part is not None and not good:
        raise InputError(f"{name}={shown(repr(part), 60)} is no {name}; give one in memory, or None to leave it out")


def replaced_by(given: Mapping[str, Any]) -> list[int]:
    """Which of the three text encoders are, they or their tokenizers, not the folder's own."""
    return [number for number, encoder in enumerate(ENCODERS) if {encoder.name, encoder.tokenizer} & given.keys()]


def folder_of(cls: type[DiffusionPipeline], name: str | Path, kwargs: Mapping[str, Any]) -> Path:
    """The folder called `name`, or that of the hub's model of that name, which is fetched. Raises InputError when there is none."""
    if not isinstance(name, str | os.PathLike):
        raise InputError(f"a model is given by its folder, or its name on the hub, not by {shown(repr(name), 60)}")
    folder = Path(name)
    if folder.is_dir():
        return folder
    if not is_hub_name(folder):
        check_folder(folder)
    refuse_pickle(folder)
    wanted = {key: value for key, value in kwargs.items() if key in (*DOWNLOAD, *COMPONENTS, "variant")}
    try:
        return Path(cls.download(str(name), use_safetensors=True, **wanted))
    except (OSError, ValueError) as error:
        raise InputError(f"no such model folder: {shown(folder)}; as a model on the hub it did not load either: {reason(error)}") from error


def is_hub_name(name: Path) -> bool:
    """Whether a path that is no folder may be the name of a model on the hub."""
    return not (name.exists() or name.is_absolute() or len(name.parts) != 2 or name.parts[0] in (".", ".."))


def load_folder(folder: Path, given: Mapping[str, Any], kwargs: Mapping[str, Any], verify: bool) -> Loaded:
    """The components of the pipeline in `folder`, those `given` in their place. Raises InputError as from_pretrained does."""
    dtype, variant, config = dtype_asked_for(kwargs), kwargs.get("variant"), quantisation(kwargs.get("quantization_config"))
    absent = [name for name in left_out(folder) if name in PARTS]
    loaded = dict.fromkeys(absent) | idle_tokenizers(folder, given) | given
    index = check_folder(folder, transformer="transformer" not in loaded, without=loaded.keys(), verify=verify, variant=variant)
    if unknown := index.keys() - set(COMPONENTS):
        logger.warning("%s has components that are not of this pipeline and are left out: %s", shown(folder), listed(sorted(unknown)))
    names = [name for name in COMPONENTS if name in index and name not in loaded]
    check_variant(folder, variant, [name for name in names if name in PARTS])
    if unknown := named_by(config) - set(names):
        logger.warning("quantization_config names what is not loaded from the folder, and stays as it is: %s", listed(sorted(unknown)))

    def sizes() -> dict[str, int]:
        outlines = {name: empty(name, read_config(folder / name / "config.json")) for name in names if name in PARTS}
        networks = {name: part for name, part in given.items() if isinstance(part, nn.Module)}
        found = {name: bytes_of(network, dtype_of(name, dtype)) for name, network in outlines.items()}
        return found | {name: bytes_of(network) for name, network in networks.items()}

    places = places_of(kwargs.get("device_map"), kwargs.get("max_memory"), sizes)
    for name in names:
        how = quantisation_of(name, config)
        loaded[name] = load_component(folder, name, index[name][1], dtype_of(name, dtype), variant, how, places.device(name))
    if lost := [name for name in ("transformer", "vae", "scheduler") if name not in loaded]:
        raise InputError(f"{shown(folder)} has no {' and no '.join(lost)}; give one, or another folder")
    for name in (name for name in TEXT if loaded.get(name) is not None):
        if (tokenizer := BY_NAME[name].tokenizer) not in loaded:
            raise InputError(f"{shown(folder)} has a {name} and no {tokenizer}; its copy is not complete")
    check_together({name: part for name, part in loaded.items() if name not in given}, folder)
    return Loaded(put(loaded, places), places, config)


def idle_tokenizers(folder: Path, given: Mapping[str, Any]) -> dict[str, None]:
    """The tokenizers that are not there, and not needed since their encoders are left out."""
    idle = [encoder.tokenizer for encoder in ENCODERS if encoder.name in given and given[encoder.name] is None]
    return dict.fromkeys(name for name in idle if not (folder / name).is_dir())


def check_variant(folder: Path, variant: str | None, names: list[str]) -> None:
    """Raises InputError when none of the components has weights of the variant; which has not has its plain ones."""
    there = {name: variants_in(folder / name) for name in names}
    if variant is not None and there and not any(variant in found for found in there.values()):
        others = sorted({kind for found in there.values() for kind in found})
        raise InputError(
            f"{shown(folder)} has no weights of the variant {shown(variant, 60)}; "
            + (f"there are {listed(others)}" if others else "there are the plain ones alone: leave variant out")
        )


def put(components: Mapping[str, Any], places: Places) -> dict[str, Any]:
    """The components, each where it belongs."""
    return {name: places.put(name, part) if isinstance(part, nn.Module) else part for name, part in components.items()}


def load_file(path: str | Path, pipeline: str | Path | None, given: Mapping[str, Any], kwargs: Mapping[str, Any]) -> tuple[Weights, Loaded]:
    """What the single file at `path` holds, made a whole pipeline, and its components, those `given` in their place.

    Raises InputError as from_single_file does.
    """
    dtype, base, size = dtype_asked_for(kwargs), None, kwargs.get("sample_size")
    places_given = {"a single file": path, "pipeline": pipeline or "", "config": kwargs.get("config") or ""}
    if wrong := next((what for what, place in places_given.items() if not isinstance(place, str | os.PathLike)), None):
        raise InputError(f"{wrong} is given by its path, not by {shown(repr(places_given[wrong]), 60)}")
    if size is not None and not (type(size) is int and 1 <= size <= MOST_SIDE):
        raise InputError(f"sample_size {shown(repr(size), 60)} is no side of latents, a whole number from 1 to {MOST_SIDE:,}; SD3's is 128")
    if pipeline is not None and kwargs.get("config") is not None:
        raise InputError("pipeline, a folder to take from what the file lacks, may say what config says too; give one of the two")
    if pipeline is not None:
        base = open_weights(pipeline)
    elif kwargs.get("config") is not None:
        base = open_base(configuration_of(kwargs["config"], kwargs))
    wanted = tuple(name for name in PARTS if name not in given)
    weights = open_weights(file_of(path, kwargs), parts=wanted, like=base, sample_size=size)
    weights = completed(weights, base, given)
    for note in weights.notes:
        logger.warning(note)
    places = places_of(
        kwargs.get("device_map"),
        kwargs.get("max_memory"),
        lambda: {name: bytes_of(empty(name, part.config), dtype_of(name, dtype)) for name, part in weights.parts.items()},
    )
    components = {name: load_part(name, part, dtype_of(name, dtype)) for name, part in weights.parts.items()}
    reading = [encoder for encoder in ENCODERS if encoder.name in weights.parts or given.get(encoder.name) is not None]
    components |= {encoder.tokenizer: tokenizer_of(encoder.tokenizer, weights) for encoder in reading if encoder.tokenizer not in given}
    components |= {} if "scheduler" in given else {"scheduler": scheduler_from(weights.scheduler, weights.path)}
    return weights, Loaded(put(components | given, places), places)


def file_of(path: str | Path, kwargs: Mapping[str, Any]) -> Path:
    """The single file at `path`; one that is a link to the hub is fetched. Raises InputError for a pickle, and when it cannot be had."""
    if (link := LINK.fullmatch(str(path))) is None:
        return Path(path)
    repository, revision, name = link.groups()
    refuse_pickle(Path(name))
    if not name.endswith(".safetensors"):
        raise InputError(f"{shown(path)} is no safetensors file by its name; only these are loaded")
    from huggingface_hub import hf_hub_download

    wanted = {key: value for key, value in kwargs.items() if key in DOWNLOAD and key != "proxies" and value is not None}
    try:
        return Path(hf_hub_download(repository, name, **{"revision": revision} | wanted))
    except (OSError, ValueError) as error:
        raise InputError(f"{shown(path)} did not load: {reason(error)}") from error


def configuration_of(name: str | Path, kwargs: Mapping[str, Any]) -> Path:
    """The folder `name`, or the configurations and tokenizers of the hub's model of that name, which are fetched."""
    folder = Path(name)
    if folder.is_dir() or not is_hub_name(folder):
        return folder
    from huggingface_hub import snapshot_download

    wanted = {key: value for key, value in kwargs.items() if key in DOWNLOAD and key != "proxies" and value is not None}
    patterns = ["*.json", "*/*.json", "*.txt", "*/*.txt", "*/*.model"]
    try:
        return Path(snapshot_download(str(name), allow_patterns=patterns, **wanted))
    except (OSError, ValueError) as error:
        raise InputError(
            f"config: no such folder: {shown(folder)}; as a model on the hub it did not load either: {reason(error)}"
        ) from error
