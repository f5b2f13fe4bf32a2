"""Weights that are a part of a pipeline, made a whole one of: from another pipeline folder, and from what all SD3 models share."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from latentfm.errors import InputError
from latentfm.interchange.open_clip import clip_tokenizer
from latentfm.interchange.weights import Weights, open_component
from latentfm.models.encoders import BY_NAME, T5, TEXT
from latentfm.models.folder import INDEX_FILE, PARTS, check_folder, read_config, read_index, read_info
from latentfm.models.stored import names_in
from latentfm.models.text import NULL_FILE
from latentfm.models.tokenizers import load_tokenizer
from latentfm.words import shown

SD3_SCHEDULER = {"num_train_timesteps": 1000, "shift": 3.0}
CLIP_VOCABULARY, CLIP_LENGTH = 49408, 77
NOTHING: Mapping[str, Any] = MappingProxyType({})


def open_base(folder: Path) -> Weights:
    """What a pipeline folder says, as open_weights; of components without weights there it is their configurations alone.

    Raises InputError for a folder that is no pipeline, or is damaged.
    """
    if not (folder / INDEX_FILE).is_file():
        check_folder(folder)
    named, bare = read_index(folder), {}
    for name in (name for name in PARTS if name in named and (folder / name / "config.json").is_file()):
        if not any(file.endswith((".safetensors", ".safetensors.index.json")) for file in names_in(folder / name)):
            bare[name] = read_config(folder / name / "config.json")
    opened = {
        name: open_component(folder / name, name)[0] for name in PARTS if name in named and name not in bare and (folder / name).is_dir()
    }
    config = folder / "scheduler" / "scheduler_config.json"
    return Weights(
        folder,
        "pipeline folder",
        opened,
        tokenizers={name: folder / name for name in named if name.startswith("tokenizer") and (folder / name).is_dir()},
        scheduler=read_config(config) if config.is_file() else None,
        info=read_info(folder),
        null=folder / NULL_FILE if (folder / NULL_FILE).is_file() else None,
        configs=bare,
    )


def completed(weights: Weights, base: Weights | None, given: Mapping[str, Any] = NOTHING) -> Weights:
    """`weights` as a whole pipeline but for the components `given`: what it lacks taken from the pipeline folder `base`.

    Without one: SD3's scheduler, CLIP's own tokenizers; a T5 without tokenizer is left out, and `notes` says so. Raises
    InputError naming what is still missing.
    """
    base = base or Weights(weights.path, "", {})
    parts = {name: found for name in PARTS if name not in given and (found := weights.parts.get(name) or base.parts.get(name))}
    if missing := [name for name in ("transformer", "vae") if name not in parts and name not in given]:
        raise InputError(
            f"{shown(weights.path)} has no {' and no '.join(missing)}; give a pipeline folder to take the rest from"
            + (f" ({shown(base.path)} has no weights of it)" if any(name in base.configs for name in missing) else "")
        )
    notes, tokenizers = list(weights.notes), {}
    for name, encoder in BY_NAME.items():
        if name not in parts and name not in given and not nobody_reads(parts, given):
            where = f"neither the file nor {shown(base.path)} has" if base.kind else "the file has not"
            notes.append(f"{encoder.title} is left out, zeros stand for it: {where} its weights; give a pipeline folder that has {name}")
        if (tokenizer := encoder.tokenizer) in given or not (name in parts or given.get(name) is not None):
            continue
        vocabulary = parts[name].config["vocab_size"] if name in parts else given[name].config.vocab_size
        if folder := weights.tokenizers.get(tokenizer) or base.tokenizers.get(tokenizer):
            tokenizers[tokenizer] = folder
        elif encoder.family is T5 and name in parts:
            del parts[name]
            notes.append(f"T5 is left out: its tokenizer is not in the file; give a pipeline folder with a {tokenizer} to keep it")
        elif encoder.family is T5 or vocabulary != CLIP_VOCABULARY:
            what = f"a {name} with a vocabulary of its own and no tokenizer"
            raise InputError(f"{shown(weights.path)} has {what}; give the pipeline it is of")
    if nobody_reads(parts, given):
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


def nobody_reads(parts: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    """Whether there is no text encoder at all."""
    return not any(name in parts or given.get(name) is not None for name in TEXT)


def tokenizer_of(name: str, weights: Weights) -> Any:
    """The tokenizer `name` of a completed pipeline: its folder's, or CLIP's own."""
    if name in weights.tokenizers:
        return load_tokenizer(weights.tokenizers[name])
    part = weights.parts.get(name.replace("tokenizer", "text_encoder"))
    length = CLIP_LENGTH if part is None else part.config["max_position_embeddings"]
    return clip_tokenizer("!" if name == "tokenizer_2" else "<|endoftext|>", length)
