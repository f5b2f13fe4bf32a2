"""`latentfm convert`: SD3 weights and LoRA adapters from one form on disk into another, never in memory whole."""

import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from latentfm.cli.checks import check_at_least_one, check_name
from latentfm.cli.terminal import progress_bar, quiet_libraries, say
from latentfm.errors import InputError
from latentfm.models.encoders import TEXT
from latentfm.words import count, shown

if TYPE_CHECKING:
    import torch

    from latentfm.interchange.lora import Adapter
    from latentfm.interchange.tensors import Tensors
    from latentfm.interchange.weights import Weights

DTYPES = ("float16", "bfloat16", "float32")
NAMINGS = ("original", "diffusers")
GROUPS = {"transformer": ("transformer",), "vae": ("vae",), "text": TEXT}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
SHARD_SIZE = "10GB"


class Plan(NamedTuple):
    """A conversion that has been checked: its title, the lines of its table, its bytes, and write(path, advance)."""

    title: str
    rows: list[list[str]]
    size: int
    write: Callable[[Path, Callable[[int], None]], None]


def convert(
    source: Annotated[
        Path,
        typer.Argument(metavar="IN", help="A .safetensors file, a pipeline or transformer folder, a LoRA file, or a peft adapter folder."),
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A name ending in .safetensors for a single file, else a folder.")],
    pipeline: Annotated[
        Path | None, typer.Option(help="A pipeline folder to take from what IN lacks: VAE, encoders, tokenizers.", show_default=False)
    ] = None,
    transformer_only: Annotated[
        bool, typer.Option("--transformer-only", help="Into a folder: the transformer alone. Of a LoRA: leave the text encoders' out.")
    ] = False,
    parts: Annotated[
        str | None,
        typer.Option("--with", help="Parts of a single file: transformer, vae, text. Default: all there are.", show_default=False),
    ] = None,
    naming: Annotated[
        str | None,
        typer.Option(help="Of a single file: original (SD3's) or diffusers (a transformer alone). Default: original.", show_default=False),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float16, bfloat16 or float32. Default: as stored; float8 becomes bfloat16.", show_default=False)
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help=f"Of a folder: the largest file, as in 500MB. Default: {SHARD_SIZE}.", show_default=False)
    ] = None,
    sample_size: Annotated[
        int | None, typer.Option(help="Side of the latents, where a single file does not say it: 128.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT, once the new one is complete.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every byte of the folders that are read with what was saved there first.")
    ] = False,
) -> None:
    """Convert SD3 / SD3.5 weights between single files and folders, and LoRA adapters between diffusers and peft.

    OUT decides. A name ending in .safetensors is a single file in SD3's original naming, as other programs read it; any other name is
    a stock pipeline folder, for `latentfm generate --model`, fine-tuning and diffusers. A single file often lacks the text
    encoders or T5's tokenizer: --pipeline names a folder to take them from. Weights are copied bit for bit unless --dtype asks otherwise.
    """
    check_options(target, pipeline, transformer_only, parts, naming, max_shard_size)
    check_name("--dtype", dtype or "float32", DTYPES)
    check_name("--naming", naming or "original", NAMINGS)
    if sample_size is not None:
        check_at_least_one({"--sample-size": sample_size})
    wanted, most = wanted_groups(parts), parse_bytes(max_shard_size or SHARD_SIZE)
    if not source.exists():
        raise InputError(f"{shown(source)} does not exist")
    if verify and not (source.is_dir() or pipeline):
        raise InputError(f"--verify does nothing here: {shown(source)} is a single file, and only folders have a manifest")
    check_places(source, target, pipeline, overwrite)

    quiet_libraries()
    import torch

    from latentfm.interchange.lora import is_adapter

    kind = getattr(torch, dtype) if dtype else None
    if is_adapter(source):
        if pipeline or parts or naming or max_shard_size or sample_size:
            apply = "--dtype, --transformer-only, --verify and --overwrite apply to it"
            raise InputError(f"{shown(source)} is a LoRA: of the options only {apply}")
        plan = plan_adapter(source, target, transformer_only, kind, verify)
    else:
        plan = plan_model(source, target, pipeline, transformer_only, wanted, naming or "original", sample_size, kind, most, verify)
    check_space(target, plan.size)
    run(target, plan)
    show_table(plan)
    print(target)


def check_options(
    target: Path, pipeline: Path | None, transformer_only: bool, parts: str | None, naming: str | None, max_shard_size: str | None
) -> None:
    """Raises InputError for an option that the kind of `target` gives nothing to do."""
    if is_file_name(target):
        given = {"--max-shard-size": max_shard_size}
        way_out = "OUT is a single file, which its name ending in .safetensors says"
    else:
        given = {"--with": parts, "--naming": naming}
        way_out = "OUT is a folder; for a single file let its name end in .safetensors"
    if useless := [option for option, value in given.items() if value]:
        raise InputError(f"{useless[0]} does nothing here: {way_out}")
    if transformer_only and pipeline:
        raise InputError("--transformer-only takes nothing from --pipeline; give one of the two")
    if transformer_only and parts:
        raise InputError("--transformer-only and --with say the same; give --with transformer")
    if naming == "diffusers" and (pipeline or (parts or "transformer") != "transformer"):
        raise InputError("--naming diffusers is for a transformer alone; for more parts use the original naming, or a folder")


def is_file_name(target: Path) -> bool:
    return target.suffix == ".safetensors"


def wanted_groups(text: str | None) -> list[str] | None:
    """The groups of "transformer,vae,text"; None stays None. Raises InputError."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names or [text]:
        check_name("--with", name, tuple(GROUPS))
    return names


def parse_bytes(text: str) -> int:
    """Bytes of "500MB" or "10GB". Raises InputError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(KB|MB|GB|)\s*", text, re.IGNORECASE)
    if not found or not (size := int(float(found[1]) * UNITS[found[2].upper()])):
        raise InputError(f"--max-shard-size {text!r} is no size; write it as in 500MB or 10GB")
    return size


def check_places(source: Path, target: Path, pipeline: Path | None, overwrite: bool) -> None:
    """Raises InputError when writing `target` would lose something, or there is no place for it."""
    inputs = [path.resolve() for path in (source, pipeline) if path is not None]
    if (own := target.resolve()) in inputs or any(own in path.parents for path in inputs):
        raise InputError(f"OUT {shown(target)} is, or holds, what is read; give another name")
    if any(path in own.parents for path in inputs):
        outer = source if inputs[0] in own.parents else pipeline
        raise InputError(f"OUT {shown(target)} lies inside {shown(outer)}; give a place outside it")
    parent = next(place for place in (own.parent, *own.parents) if place.exists())
    if not parent.is_dir():
        raise InputError(f"OUT {shown(target)}: {shown(parent)} is a file, not a folder; give another place")
    if not target.exists():
        return
    if not overwrite:
        raise InputError(f"OUT {shown(target)} exists; give another name, or --overwrite to replace it")
    known = any((target / name).is_file() for name in ("model_index.json", "config.json", "adapter_config.json"))
    if target.is_dir() != (not is_file_name(target)) or (target.is_dir() and not known):
        raise InputError(f"OUT {shown(target)} is nothing that this command writes, so it is not overwritten; give another name")


def check_space(target: Path, size: int) -> None:
    """Raises InputError when the disk of `target` has less than `size` bytes free."""
    place = next(place for place in target.resolve().parents if place.exists())
    free = shutil.disk_usage(place).free
    if free < size:
        has = f"{shown(place)} has {in_units(free)} free"
        raise InputError(f"OUT {shown(target)} takes {in_units(size)}, and {has}; make room, or give another place")


def plan_adapter(source: Path, target: Path, transformer_only: bool, dtype: "torch.dtype | None", verify: bool) -> Plan:
    """The conversion of a LoRA. Raises InputError when it would change or lose something."""
    from latentfm.interchange.lora import open_adapter, write_diffusers, write_peft
    from latentfm.interchange.lora_names import ENCODERS
    from latentfm.interchange.tensors import written_bytes

    adapter = open_adapter(source, verify)
    if is_file_name(target) == source.is_file():
        way_out = "a folder for peft" if source.is_file() else "a name ending in .safetensors for diffusers"
        raise InputError(f"{shown(source)} is a {adapter.kind} already; give as OUT {way_out}")
    if adapter.left_out and not transformer_only:
        raise InputError(
            f"{shown(source)} adapts the text encoders too ({count(adapter.left_out, 'tensor')}: {', '.join(ENCODERS)}), and a peft folder "
            "holds one model's adapter; --transformer-only leaves them out"
        )
    to, write = ("diffusers LoRA file", write_diffusers) if is_file_name(target) else ("peft adapter folder", write_peft)
    rows = [row("transformer", adapter.tensors, dtype, adapter.kind, to)]
    size = written_bytes(adapter.tensors, dtype)
    return Plan(lora_title(adapter), rows, size, lambda path, advance: write(path, adapter, dtype, advance))


def lora_title(adapter: "Adapter") -> str:
    config = adapter.config
    kind = "DoRA" if config.get("use_dora") else "LoRA"
    return f"{kind} of rank {config.get('r')}{' and others' if config.get('rank_pattern') else ''}, alpha {config.get('lora_alpha')}"


def plan_model(
    source: Path, target: Path, pipeline: Path | None, transformer_only: bool, wanted: list[str] | None, naming: str,
    sample_size: int | None, dtype: "torch.dtype | None", most: int, verify: bool,
) -> Plan:  # fmt: skip
    """The conversion of a model. Raises InputError when something is missing or wrong."""
    from latentfm.interchange.tensors import written_bytes
    from latentfm.interchange.weights import architecture, completed, open_weights
    from latentfm.interchange.writers import carried, write_component, write_pipeline, write_single
    from latentfm.models.folder import PARTS
    from latentfm.models.manifest import write_manifest

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

    for note in [*weights.notes, *lossy_notes(weights, is_file_name(target))]:
        say(f"note: {note}")
    rows = [
        row(name, part.tensors, dtype, place(name, weights if name in own else base), place_in(target, name, naming, transformer_only))
        for name, part in weights.parts.items()
    ]
    network = weights.parts.get("transformer")
    title = architecture(network.config) if network else "without a transformer"
    return Plan(title, rows, sum(written_bytes(part.tensors, dtype) for part in weights.parts.values()), write)


def lossy_notes(weights: "Weights", single: bool) -> list[str]:
    """What a single file does not carry to other programs, a line each."""
    import torch

    if not single or "text_encoder" not in weights.parts:
        return []
    projection = weights.parts["text_encoder"].tensors["text_projection.weight"].load(torch.float32)
    if projection.shape[0] == projection.shape[1] and torch.equal(projection, torch.eye(len(projection))):
        return []
    return ["the first CLIP has a projection of its own, which other programs ignore in SD3's naming; latentfm reads it back"]


def place(name: str, weights: "Weights") -> str:
    """Where a component lies in `weights`."""
    if weights.kind.startswith("single file"):
        return weights.kind
    return f"{weights.path.name}/{name}" if weights.kind == "pipeline folder" else weights.path.name


def place_in(target: Path, name: str, naming: str, transformer_only: bool) -> str:
    """Where a component is written."""
    if is_file_name(target):
        return f"single file ({naming} naming)"
    return target.name if transformer_only else f"{target.name}/{name}"


def row(name: str, tensors: "Tensors", dtype: "torch.dtype | None", source: str, target: str) -> list[str]:
    """A line of the table: part, tensors, parameters, dtype, bytes, from, to."""
    from latentfm.interchange.tensors import target_dtype, written_bytes

    before, after = (
        "+".join(sorted({str(kind(stored)).removeprefix("torch.") for stored in tensors.values()}))
        for kind in (lambda stored: stored.dtype, lambda stored: target_dtype(stored, dtype))
    )
    kinds = before if before == after else f"{before} -> {after}"
    parameters = sum(stored.numel for stored in tensors.values())
    return [name, f"{len(tensors):,}", f"{parameters:,}", kinds, in_units(written_bytes(tensors, dtype)), source, target]


def in_units(size: float) -> str:
    """Bytes in words: "4.34 GB"."""
    unit = next((unit for unit in ("GB", "MB", "KB") if size >= UNITS[unit]), "")
    return f"{size / UNITS[unit]:.2f} {unit}" if unit else f"{size} bytes"


def run(target: Path, plan: Plan) -> None:
    """Writes `target`, whole or not at all, with a bar that counts megabytes."""
    from latentfm.files import whole_or_nothing

    with progress_bar() as bar, whole_or_nothing(target) as partial:
        task = bar.add_task("writing, MB", total=max(1, plan.size // UNITS["MB"]))
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            bar.update(task, completed=done // UNITS["MB"])

        plan.write(partial, advance)


def show_table(plan: Plan) -> None:
    """Prints the summary on stderr."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=plan.title, title_justify="left")
    for column in ("part", "tensors", "parameters", "dtype", "size", "from", "to"):
        table.add_column(column, justify="right" if column in ("tensors", "parameters", "size") else "left")
    for cells in plan.rows:
        table.add_row(*(escape(shown(cell)) for cell in cells))
    Console(stderr=True, width=None if sys.stderr.isatty() else 200).print(table)
