"""`latentfm convert`: SD3 weights and LoRA adapters from one form on disk into another, never in memory whole."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentfm.cli.checks import check_at_least_one, check_name
from latentfm.cli.terminal import progress_bar, quiet_libraries, say, table
from latentfm.errors import InputError
from latentfm.files import existing_parent
from latentfm.interchange.lora.formats import FORMATS
from latentfm.models.folder import GROUPS
from latentfm.words import UNITS, shown

if TYPE_CHECKING:
    from latentfm.interchange.conversion import Conversion

DTYPES = ("float16", "bfloat16", "float32")
NAMINGS = ("original", "diffusers")
SHARD_SIZE = "10GB"


def convert(
    source: Annotated[
        Path,
        typer.Argument(metavar="IN", help="A .safetensors file, a pipeline or transformer folder, a LoRA's file or folder."),
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
        typer.Option(
            help="Of a single file: original (SD3's, the default) or diffusers (a transformer alone). "
            f"Of a LoRA file: {', '.join(FORMATS)}; diffusers is the default.",
            show_default=False,
        ),
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
    """Convert SD3 / SD3.5 weights between single files and folders, and LoRA adapters between the programs that train and use them.

    OUT decides. A name ending in .safetensors is a single file in SD3's original naming, as other programs read it; any other name is
    a stock pipeline folder, for `latentfm generate --model`, fine-tuning and diffusers. A single file often lacks the text
    encoders or T5's tokenizer: --pipeline names a folder to take them from. Weights are copied bit for bit unless --dtype asks otherwise.

    A LoRA becomes a file, as --naming has it, or a folder of peft's. A LoKr or LoHa is written as the LoRA that computes the same.
    """
    check_options(target, pipeline, transformer_only, parts, naming, max_shard_size)
    check_name("--dtype", dtype or "float32", DTYPES)
    check_name("--naming", naming or "original", (*NAMINGS, *(name for name in FORMATS if name not in NAMINGS)))
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

    from latentfm.interchange.conversion import adapter_conversion, check_space, model_conversion
    from latentfm.interchange.lora.files import is_adapter

    kind = getattr(torch, dtype) if dtype else None
    if is_adapter(source):
        if pipeline or parts or max_shard_size or sample_size:
            apply = "--naming, --dtype, --transformer-only, --verify and --overwrite apply to it"
            raise InputError(f"{shown(source)} is a LoRA: of the options only {apply}")
        plan = adapter_conversion(source, target, transformer_only, naming, kind, verify)
    else:
        check_name("--naming", naming or "original", NAMINGS)
        plan = model_conversion(source, target, pipeline, transformer_only, wanted, naming or "original", sample_size, kind, most, verify)
    for note in plan.notes:
        say(f"note: {note}")
    check_space(target, plan.size)
    run(target, plan)
    show_table(plan)
    print(target)


def check_options(
    target: Path, pipeline: Path | None, transformer_only: bool, parts: str | None, naming: str | None, max_shard_size: str | None
) -> None:
    """Raises InputError for an option that the kind of `target` gives nothing to do."""
    if target.suffix == ".safetensors":
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
    parent = existing_parent(own.parent)
    if not parent.is_dir():
        raise InputError(f"OUT {shown(target)}: {shown(parent)} is a file, not a folder; give another place")
    if not target.exists():
        return
    if not overwrite:
        raise InputError(f"OUT {shown(target)} exists; give another name, or --overwrite to replace it")
    known = any((target / name).is_file() for name in ("model_index.json", "config.json", "adapter_config.json"))
    if target.is_dir() != (not (target.suffix == ".safetensors")) or (target.is_dir() and not known):
        raise InputError(f"OUT {shown(target)} is nothing that this command writes, so it is not overwritten; give another name")


def run(target: Path, plan: "Conversion") -> None:
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


def show_table(plan: "Conversion") -> None:
    """Prints the summary on stderr."""
    from rich.console import Console

    console = Console(stderr=True, width=None if sys.stderr.isatty() else 200)
    columns = ("part", "tensors", "parameters", "dtype", "size", "from", "to")
    table(console, plan.title, columns, plan.rows, texts=("dtype", "from", "to"))
