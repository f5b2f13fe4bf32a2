"""A conversion of weights or of a LoRA from one form on disk into another: checked before a byte is written, never in memory whole."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from latentfm.adapters import kind_of
from latentfm.errors import InputError
from latentfm.interchange.lora.files import Adapter, open_adapter
from latentfm.interchange.lora.formats import FORMATS
from latentfm.interchange.lora.kinds import KINDS
from latentfm.interchange.lora.writing import spelt, write_peft
from latentfm.interchange.tensors import Tensors, target_dtype, write_file, written_bytes
from latentfm.interchange.weights import Weights, architecture, completed, open_weights
from latentfm.interchange.writers import carried, write_component, write_pipeline, write_single
from latentfm.models.folder import GROUPS, PARTS
from latentfm.models.manifest import write_manifest
from latentfm.words import count, in_units, shown


class Conversion(NamedTuple):
    """A conversion that has been checked: its title, the lines of its table, its bytes, write(path, advance), and what to know of it."""

    title: str
    rows: list[list[str]]
    size: int
    write: Callable[[Path, Callable[[int], None]], None]
    notes: tuple[str, ...] = ()


def is_file_name(target: Path) -> bool:
    return target.suffix == ".safetensors"


def check_space(target: Path, size: int) -> None:
    """Raises InputError when the disk of `target` has less than `size` bytes free."""
    place = next(place for place in target.resolve().parents if place.exists())
    free = shutil.disk_usage(place).free
    if free < size:
        has = f"{shown(place)} has {in_units(free)} free"
        raise InputError(f"OUT {shown(target)} takes {in_units(size)}, and {has}; make room, or give another place")


def adapter_conversion(
    source: Path, target: Path, transformer_only: bool, naming: str | None, dtype: torch.dtype | None, verify: bool
) -> Conversion:
    """The conversion of a LoRA, into the spelling `naming` of FORMATS where `target` is a file (None: diffusers').

    Raises InputError when it would change or lose something.
    """
    adapter = open_adapter(source, verify=verify)
    spelling = (naming or "diffusers") if is_file_name(target) else "peft"
    if adapter.spelling == spelling and adapter.kinds == ("lora",) and dtype is None:
        way_out = "a name ending in .safetensors for diffusers" if spelling == "peft" else "a folder for peft, or another --naming"
        raise InputError(f"{shown(source)} is a {adapter.title} already; give as OUT {way_out}")
    if transformer_only:
        if "transformer" not in adapter.tensors:
            raise InputError(f"--transformer-only leaves nothing: {shown(source)} adapts the text encoders alone")
        adapter = replace(adapter, **{part: {"transformer": getattr(adapter, part)["transformer"]} for part in ("tensors", "configs")})
    others = {owner: tensors for owner, tensors in adapter.tensors.items() if owner != "transformer"}
    if spelling == "peft" and "transformer" not in adapter.tensors:
        raise InputError(f"{shown(source)} adapts the text encoders alone; a peft folder would hold nothing of it")
    if spelling == "peft" and others:
        number = sum(map(len, others.values()))
        raise InputError(
            f"{shown(source)} adapts the text encoders too ({count(number, 'tensor')}: {', '.join(others)}), and a peft folder "
            "holds one model's adapter; --transformer-only leaves them out"
        )
    if spelling == "peft":
        title, written = "peft adapter folder", adapter.tensors["transformer"]
    else:
        title = FORMATS[spelling].title
        written, metadata = spelt(adapter, spelling, dtype)
    rows = [row(owner, tensors, dtype, adapter.title, title) for owner, tensors in adapter.tensors.items()]

    def write(path: Path, advance: Callable[[int], None]) -> None:
        if spelling == "peft":
            write_peft(path, adapter, dtype, advance)
        else:
            write_file(path, written, metadata, None, advance)

    return Conversion(lora_title(adapter), rows, written_bytes(written, dtype if spelling == "peft" else None), write, lora_notes(adapter))


def lora_title(adapter: Adapter) -> str:
    config = next(iter(adapter.configs.values()))
    kind = kind_of(config).title
    return f"{kind} of rank {config.get('r')}{' and others' if config.get('rank_pattern') else ''}, alpha {config.get('lora_alpha')}"


def lora_notes(adapter: Adapter) -> tuple[str, ...]:
    """What of the adapter is not as it was, a line each."""
    others = [KINDS[kind].title for kind in adapter.kinds if kind != "lora"]
    return tuple(f"it is a {kind}, and is written as the LoRA that computes the same; there is no way back" for kind in others)


def model_conversion(
    source: Path, target: Path, pipeline: Path | None, transformer_only: bool, wanted: list[str] | None, naming: str,
    sample_size: int | None, dtype: torch.dtype | None, most: int, verify: bool,
) -> Conversion:  # fmt: skip
    """The conversion of a model. Raises InputError when something is missing or wrong."""

    alone = transformer_only or naming == "diffusers"
    chosen = GROUPS["transformer"] if alone else tuple(name for group in wanted or GROUPS for name in GROUPS[group])
    base = open_weights(pipeline, verify=verify) if pipeline else None
    if base and base.kind != "pipeline folder":
        raise InputError(f"--pipeline {shown(pipeline)} is a {base.kind}; give a pipeline folder, with a model_index.json")
    weights = open_weights(source, chosen, base, sample_size, verify and source.is_dir())
    own = set(weights.parts)
    if is_file_name(target) or transformer_only:
        found = {name: part for name in PARTS if name in chosen and (part := weights.parts.get(name) or (base and base.parts.get(name)))}
        scheduler = weights.scheduler or (base.scheduler if base else None)
        weights = replace(weights, parts=found, scheduler=scheduler, info=weights.info or (base.info if base else {}))
        if lost := [group for group in wanted or ["transformer"] if not any(name in weights.parts for name in GROUPS[group])]:
            raise InputError(f"--with {lost[0]}: {shown(source)} has none; --pipeline names a folder to take it from")
    else:
        weights = completed(weights, base)

    def write(path: Path, advance: Callable[[int], None]) -> None:
        if is_file_name(target):
            write_single(path, weights, naming, dtype, advance)
        elif transformer_only:
            write_component(path, "transformer", weights.parts["transformer"], carried(weights.metadata), dtype, most, advance)
            write_manifest(path)
        else:
            write_pipeline(path, weights, dtype, most, advance)

    rows = [
        row(name, part.tensors, dtype, place(name, weights if name in own else base), place_in(target, name, naming, transformer_only))
        for name, part in weights.parts.items()
    ]
    network = weights.parts.get("transformer")
    title = architecture(network.config) if network else "without a transformer"
    size = sum(written_bytes(part.tensors, dtype) for part in weights.parts.values())
    return Conversion(title, rows, size, write, (*weights.notes, *lossy_notes(weights, is_file_name(target))))


def lossy_notes(weights: Weights, single: bool) -> list[str]:
    """What a single file does not carry to other programs, a line each."""

    if not single or "text_encoder" not in weights.parts:
        return []
    projection = weights.parts["text_encoder"].tensors["text_projection.weight"].load(torch.float32)
    if projection.shape[0] == projection.shape[1] and torch.equal(projection, torch.eye(len(projection))):
        return []
    return ["the first CLIP has a projection of its own, which other programs ignore in SD3's naming; latentfm reads it back"]


def place(name: str, weights: Weights) -> str:
    """Where a component lies in `weights`."""
    if weights.kind.startswith("single file"):
        return weights.kind
    return f"{weights.path.name}/{name}" if weights.kind == "pipeline folder" else weights.path.name


def place_in(target: Path, name: str, naming: str, transformer_only: bool) -> str:
    """Where a component is written."""
    if is_file_name(target):
        return f"single file ({naming} naming)"
    return target.name if transformer_only else f"{target.name}/{name}"


def row(name: str, tensors: Tensors, dtype: torch.dtype | None, source: str, target: str) -> list[str]:
    """A line of the table: part, tensors, parameters, dtype, bytes, from, to."""

    before, after = (
        "+".join(sorted({str(kind(stored)).removeprefix("torch.") for stored in tensors.values()}))
        for kind in (lambda stored: stored.dtype, lambda stored: target_dtype(stored, dtype))
    )
    kinds = before if before == after else f"{before} -> {after}"
    parameters = sum(stored.numel for stored in tensors.values())
    return [name, f"{len(tensors):,}", f"{parameters:,}", kinds, in_units(written_bytes(tensors, dtype)), source, target]
