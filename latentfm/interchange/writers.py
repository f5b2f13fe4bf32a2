"""Weights found by weights.py written on: as one safetensors file, as a component's folder, as a whole pipeline folder. Streamed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from latentfm.errors import InputError
from latentfm.files import check_regular
from latentfm.interchange import original
from latentfm.interchange.completing import tokenizer_of
from latentfm.interchange.networks import vae_class
from latentfm.interchange.tensors import Tensors, write_file, write_shards
from latentfm.interchange.weights import CLASSES, KEY, Part, Weights, empty
from latentfm.models.encoders import BY_NAME, TEXT
from latentfm.models.folder import INFO_FILE, check_links, write_stock_names
from latentfm.models.manifest import write_manifest
from latentfm.models.stored import own_files
from latentfm.models.text import NULL_FILE
from latentfm.words import shown


def carried(metadata: dict[str, str]) -> dict[str, str]:
    """The metadata that still holds for the weights elsewhere: not our configurations, nor a hash of other bytes."""
    return {"format": "pt"} | {key: value for key, value in metadata.items() if key != KEY and "hash" not in key}


def single_file(weights: Weights, naming: str) -> tuple[Tensors, dict[str, str]]:
    """The tensors and metadata of `weights` as one file, naming "original", or "diffusers" for a transformer alone."""
    said: dict[str, Any] = {name: part.config for name, part in weights.parts.items()}
    if set(weights.parts) != {"transformer"}:
        said |= {"scheduler": weights.scheduler, "info": weights.info}
    metadata = carried(weights.metadata) | {KEY: json.dumps(said)}
    if naming == "diffusers":
        return weights.parts["transformer"].tensors, metadata
    tensors: Tensors = {}
    for name, part in weights.parts.items():
        own = part.tensors
        if name == "transformer":
            own = original.transformer_to_original(own)
        elif name == "vae":
            if (kind := vae_class(part.config).__name__) != CLASSES["vae"][1]:
                what = f"{shown(weights.path)} has an {kind} as its VAE, which has no names in SD3's single files"
                raise InputError(f"{what}; name the others (--with)")
            own = original.vae_to_original(own)
        tensors |= {original.PREFIXES[name][0] + key: stored for key, stored in own.items()}
    return tensors, metadata


def write_component(
    folder: Path, name: str, part: Part, metadata: dict[str, str], dtype: torch.dtype | None, most: int, advance: Callable[[int], None]
) -> None:  # fmt: skip
    """Writes a component's folder: config.json, and its weights in shards of at most `most` bytes."""
    network = empty(name, part.config)
    if name in TEXT:
        network.config.architectures = [CLASSES[name][1]]
        network.config.save_pretrained(folder)
    else:
        network.save_config(folder)
    stem = "model" if name in TEXT else "diffusion_pytorch_model"
    write_shards(folder, stem, part.tensors, metadata, dtype, most, advance)


def write_pipeline(
    folder: Path, weights: Weights, dtype: torch.dtype | None, most: int, advance: Callable[[int], None] = lambda _: None
) -> None:
    """Writes a completed `weights` as a stock StableDiffusion3Pipeline folder."""
    folder.mkdir()
    index: dict[str, Any] = {"image_encoder": [None, None], "feature_extractor": [None, None]}
    for name in CLASSES:
        is_there = name in weights.parts or name == "scheduler" or name.replace("tokenizer", "text_encoder") in weights.parts
        index[name] = list(CLASSES[name]) if is_there else [None, None]
    if "vae" in weights.parts:
        index["vae"][1] = vae_class(weights.parts["vae"].config).__name__
    for name, part in weights.parts.items():
        metadata = carried(weights.metadata) if name == "transformer" else {"format": "pt"}
        write_component(folder / name, name, part, metadata, dtype, most, advance)
        if name in TEXT:
            tokenizer = BY_NAME[name].tokenizer
            if tokenizer in weights.tokenizers:
                copy_files(weights.tokenizers[tokenizer], folder / tokenizer)
            else:
                tokenizer_of(tokenizer, weights).save_pretrained(folder / tokenizer)
    (folder / "scheduler").mkdir()
    scheduler = {"_class_name": CLASSES["scheduler"][1], **weights.scheduler}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n", "utf-8")
    for name, (source, entry) in weights.others.items():
        copy_files(source, folder / name)
        index[name] = entry
    if weights.null:
        check_regular(weights.null)
        shutil.copy(weights.null, folder / NULL_FILE)
    if weights.info:
        (folder / INFO_FILE).write_text(json.dumps(weights.info, indent=2) + "\n", "utf-8")
    (folder / "model_index.json").write_text(json.dumps(index), "utf-8")
    write_stock_names(folder)
    write_manifest(folder)


def copy_files(source: Path, target: Path) -> None:
    """Copies the files of a component that is only copied, pickles left out.

    Raises SpecialFile for what is no regular file, and InputError for a link out of the component's pipeline.
    """
    paths = [source / name for name in own_files(source)]
    check_links(source.parent, paths)
    target.mkdir()
    for path in paths:
        check_regular(path)
        shutil.copyfile(path, target / path.name)


def write_single(
    path: Path, weights: Weights, naming: str, dtype: torch.dtype | None, advance: Callable[[int], None] = lambda _: None
) -> None:
    """Writes `weights` as one safetensors file, naming "original", or "diffusers" for a transformer alone."""
    tensors, metadata = single_file(weights, naming)
    write_file(path, tensors, metadata, dtype, advance)
