"""`latentfm plan`: what a training or a drawing would cost, before anything is bought, downloaded or started. Needs no GPU and no torch."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from latentfm.cli.checks import check_at_least_one, check_name, check_size, parse_size
from latentfm.errors import InputError
from latentfm.models.cost import forward_flops, lora_parameters, parameters, training_flops
from latentfm.models.described import Model, preset_model, read_model
from latentfm.models.gpus import EFFICIENCY, GIB, GPU, GPUS, RESERVE
from latentfm.models.memory import Moment, Training, by_name, drawing_moments, highest, training_moments
from latentfm.models.presets import PRESETS
from latentfm.words import shown

MODES, WEIGHTS, SHARDS = ("full", "lora", "generate"), ("float32", "bfloat16"), ("none", "full", "offload")
TRAINING, LORA, DRAWING = MODES[:2], MODES[1:2], MODES[2:]


@dataclass(frozen=True)
class Choices:
    """How a network is trained: what `latentfm train` has options for, and what a plan may suggest to change."""

    mode: str
    weights: str
    checkpointing: float
    accumulation: int
    rank: int
    shard: str
    ema: bool
    master_weights: bool
    moments: str
    pictures: int


class Run(NamedTuple):
    """What is drawn or trained on, and by which machines."""

    size: tuple[int, int]  # width and height in pixels
    batch: int  # over all GPUs
    gpus: int
    card: GPU
    efficiency: float
    steps: int
    guidance: float

    @property
    def flops_a_second(self) -> float:
        """Of one GPU."""
        return self.card.tflops * 1e12 * self.efficiency

    def fits(self, moments: list[Moment]) -> bool:
        return highest(moments).total + RESERVE <= self.card.gib * GIB


def plan(
    preset: Annotated[
        str | None, typer.Option(help=f"A network's size: {', '.join(PRESETS)}. Default: sd3-medium.", show_default=False)
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Instead: a pipeline or transformer folder, whose configuration is read.", show_default=False)
    ] = None,
    mode: Annotated[str, typer.Option(help="full: train every weight. lora: train adapters. generate: draw pictures.")] = "full",
    resolution: Annotated[
        str | None, typer.Option(help="Pixels: WIDTHxHEIGHT, or one number for a square. Default: the model's.", show_default=False)
    ] = None,
    batch: Annotated[int, typer.Option(help="Pictures an optimizer step (or drawn at a time), over all GPUs and accumulation.")] = 8,
    gpus: Annotated[int, typer.Option(help="How many GPUs.")] = 1,
    gpu: Annotated[str, typer.Option(help=f"Which GPU: {', '.join(GPUS)}.")] = "h100",
    peak: Annotated[float | None, typer.Option(help="Another GPU's peak in bfloat16, TFLOP/s.", show_default=False)] = None,
    gpu_memory: Annotated[float | None, typer.Option(help="Another GPU's memory, in GiB.", show_default=False)] = None,
    efficiency: Annotated[float, typer.Option(help="The share of the peak that is reached, above 0 up to 1.")] = EFFICIENCY,
    tokens: Annotated[int | None, typer.Option(help="Text tokens. Default: the model's, SD3's 77 + 256.", show_default=False)] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps [1000], or the sampler's [28].", show_default=False)] = None,
    weights: Annotated[
        str | None, typer.Option(help="float32 (training; products in bfloat16) or bfloat16 (drawing).", show_default=False)
    ] = None,
    checkpointing: Annotated[float, typer.Option(help="Training: share of the blocks that is computed again, 0 to 1.")] = 0.0,
    accumulation: Annotated[int, typer.Option(help="Training: forward passes an optimizer step is split into.")] = 1,
    shard: Annotated[
        str, typer.Option(help="Training: none, a copy on each GPU (DDP); full, split over all (FSDP2); offload, split and on the CPU.")
    ] = "none",
    rank: Annotated[int, typer.Option(help="lora: its rank, on query, key, value and output of both streams.")] = 16,
    ema: Annotated[bool, typer.Option("--ema/--no-ema", help="Training: float32 averages of what trains.")] = True,
    master_weights: Annotated[bool, typer.Option("--master-weights", help="Training: float32 masters of bfloat16 weights.")] = False,
    moments: Annotated[str, typer.Option(help="Training: of the optimizer, float32 or bfloat16.")] = "float32",
    pictures: Annotated[int, typer.Option(help="Training: sample pictures drawn together along the way; 0 for none.")] = 8,
    guidance: Annotated[float, typer.Option(help="generate: above 1 the network runs twice a step.")] = 3.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Say what a run would cost: parameters, operations, memory by part, and time.

    Needs no GPU and no model. The memory is that of the fullest GPU at its fullest moment, with 1.5 GiB left free; when it does not
    fit, the plan says what would make it fit. The time is operations over the GPUs' peak times --efficiency.
    """
    for option, name, names in (("--mode", mode, MODES), ("--gpu", gpu.lower(), tuple(GPUS)), ("--shard", shard, SHARDS)):
        check_name(option, name, names)
    weights = weights or ("bfloat16" if mode == "generate" else "float32")
    check_name("--weights", weights, WEIGHTS)
    check_name("--moments", moments, WEIGHTS)
    check_at_least_one({"--batch": batch, "--gpus": gpus, "--accumulation": accumulation, "--rank": rank, "--pictures": pictures + 1})
    check_at_least_one({option: n for option, n in (("--tokens", tokens), ("--steps", steps)) if n is not None})
    for option, value, most in (("--efficiency", efficiency, 1), ("--peak", peak, None), ("--gpu-memory", gpu_memory, None)):
        if value is not None and not (0 < value <= (most or 1e6)):
            raise InputError(f"{option} {value:g} must be above 0" + (f" and at most {most}" if most else ""))
    if not 0 <= checkpointing <= 1:
        raise InputError(f"--checkpointing {checkpointing:g} must be from 0 (no block) to 1 (every block)")
    choices = Choices(mode, weights, checkpointing, accumulation, rank, shard, ema, master_weights, moments, pictures)
    check_they_go_together(choices, gpus, guidance, peak)
    if batch % (gpus * accumulation):
        raise InputError(f"--batch {batch} does not divide by {gpus} GPUs times --accumulation {accumulation}")
    if model is not None and preset is not None:
        raise InputError(f"give --preset {shown(preset)} or --model {shown(model)}, not both")
    described = read_model(model) if model is not None else preset_model(preset or "sd3-medium")
    card = GPUS[gpu.lower()]
    if peak is not None or gpu_memory is not None:
        card = GPU(card.name if peak is None else "another", peak or card.tflops, gpu_memory or card.gib)
    described = described._replace(text_tokens=tokens or described.text_tokens)
    steps = steps or (28 if mode == "generate" else 1000)
    run = Run(picture_size(described, resolution), batch, gpus, card, efficiency, steps, guidance)
    found = drawing(described, run, choices.weights) if mode == "generate" else training(described, run, choices)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        show(found)


def check_they_go_together(choices: Choices, gpus: int, guidance: float, peak: float | None) -> None:
    """Raises InputError for an option that the mode does not read, or that needs another one."""
    bound = [
        ("--guidance", guidance != 3.0, DRAWING), ("--rank", choices.rank != 16, LORA),
        ("--checkpointing", choices.checkpointing > 0, TRAINING), ("--accumulation", choices.accumulation > 1, TRAINING),
        ("--shard", choices.shard != "none", TRAINING), ("--no-ema", not choices.ema, TRAINING),
        ("--master-weights", choices.master_weights, TRAINING),
        ("--moments", choices.moments != "float32", TRAINING), ("--pictures", choices.pictures != 8, TRAINING),
    ]  # fmt: skip
    for option, given, modes in bound:
        if given and choices.mode not in modes:
            raise InputError(f"{option} goes with --mode {' or '.join(modes)}, not with {choices.mode}")
    if choices.weights == "float32" and (choices.master_weights or choices.moments == "bfloat16"):
        option = "--master-weights" if choices.master_weights else "--moments bfloat16"
        raise InputError(f"{option} goes with --weights bfloat16; give that too, or leave it out")
    if choices.shard == "full" and gpus == 1:
        raise InputError("--shard full splits over several GPUs; say how many with --gpus")
    if choices.mode == "generate" and choices.weights == "float32" and peak is None:
        raise InputError("drawing in float32 is far slower than the GPUs' bfloat16 peaks; give the float32 peak with --peak, in TFLOP/s")


def picture_size(model: Model, resolution: str | None) -> tuple[int, int]:
    """(width, height) in pixels. Raises InputError for what is no size, or does not fit the patches or the position table."""
    multiple = model.decoder.factor * model.network.patch
    width, height = parse_size(resolution, "--resolution") if resolution is not None else (model.side, model.side)
    check_size(width, height, multiple, model.network.table * multiple, "--resolution")
    return width, height


def training(model: Model, run: Run, choices: Choices) -> dict[str, Any]:
    """The whole answer for a training run, as --json prints it."""
    net, image, text = model.network, model.image_tokens(run.size), model.text_tokens
    rank = choices.rank if choices.mode == "lora" else None

    def moments(choices: Choices) -> list[Moment]:
        return training_moments(net, Training(
            image, text,
            batch=run.batch // (run.gpus * choices.accumulation),
            precision="autocast" if choices.weights == "float32" else "bfloat16",
            rank=choices.rank if choices.mode == "lora" else None,
            checkpointing=choices.checkpointing, ema=choices.ema,
            master=choices.master_weights, narrow_moments=choices.moments == "bfloat16",
            accumulated=choices.accumulation > 1, gpus=run.gpus, shard=choices.shard,
            frozen=4 * model.vae, encoders=4 * sum(model.encoders.values()),  # both in float32
            pictures=choices.pictures, decoding=4 * model.decoder.numbers(run.size[0] * run.size[1]),
        ))  # fmt: skip

    flops = training_flops(net, image, text, rank, choices.checkpointing)
    speed = run.gpus * run.flops_a_second / sum(flops.values())
    hours = run.steps * run.batch / speed / 3600
    trained = sum(parameters(net).values()) if rank is None else sum(lora_parameters(net, i, rank) for i in range(net.layers))
    out = ways_out(choices, lambda changed: run.fits(moments(changed)), run.batch // run.gpus, run.gpus)
    return {
        **in_common(model, run, choices.mode),
        "trained parameters": trained,
        "FLOP an image": {"forward": forward_flops(net, image, text), "training": flops},
        "pictures a GPU at a time": run.batch // (run.gpus * choices.accumulation),
        **of_memory(moments(choices), run, out),
        "time": {
            "images a second": speed, "seconds a step": run.batch / speed, "steps": run.steps, "hours": hours,
            "GPU hours": run.gpus * hours,
        },
    }  # fmt: skip


def drawing(model: Model, run: Run, weights: str) -> dict[str, Any]:
    """The whole answer for drawing pictures, as --json prints it."""
    net, image, text = model.network, model.image_tokens(run.size), model.text_tokens
    pixels, width, guided, each = run.size[0] * run.size[1], 2 if weights == "bfloat16" else 4, run.guidance > 1, run.batch // run.gpus
    encoders = width * sum(model.encoders.values())

    def moments(pictures: int, encoders: int) -> list[Moment]:
        decoding = width * model.decoder.numbers(pixels)
        return drawing_moments(net, image, text, pictures, guided, run.steps, width, encoders + width * model.vae, decoding)

    def most(encoders: int) -> int:
        """The most pictures up to those asked for that fit; 0 when not even one does."""
        return next((n for n in range(each, 0, -1) if run.fits(moments(n, encoders))), 0)

    out = []
    if most(encoders) < each:
        out += [f"--batch {run.gpus * most(encoders)}"] if most(encoders) else []
        fewer = "" if most(0) == each else f"--batch {run.gpus * most(0)} and "
        out += [f"{fewer}the text encoders off the GPU while drawing (pipe.enable_model_cpu_offload())"] if most(0) else []
    once = forward_flops(net, image, text)
    picture = {"the network's steps": run.steps * (1 + guided) * sum(once.values()), "decoding": model.decoder.flops(pixels)}
    seconds = sum(picture.values()) / run.flops_a_second
    return {
        **in_common(model, run, "generate"),
        "FLOP an image": {"forward": once, "picture": picture},
        "pictures a GPU at a time": each,
        **of_memory(moments(each, encoders), run, out),
        "time": {"images a second": run.gpus / seconds, "seconds a picture": seconds, "steps": run.steps, "guidance": run.guidance},
    }


def in_common(model: Model, run: Run, mode: str) -> dict[str, Any]:
    """What training's and drawing's answers begin with."""
    return {
        "model": model.name, "mode": mode, "width": run.size[0], "height": run.size[1], "image tokens": model.image_tokens(run.size),
        "text tokens": model.text_tokens, "GPUs": run.gpus, "GPU": {"name": run.card.name, "TFLOP/s": run.card.tflops, "GiB": run.card.gib},
        "efficiency": run.efficiency, "parameters": {part: count for part, count in parameters(model.network).items() if count},
        "frozen parameters": model.encoders | {"VAE": model.vae},
    }  # fmt: skip


def of_memory(moments: list[Moment], run: Run, out: list[str]) -> dict[str, Any]:
    """The answer's part on memory: the fullest moment by part, each moment's sum, whether it fits, and the ways out."""
    fullest = highest(moments)
    return {
        "memory": {part: size for part, size in fullest.parts.items() if size}, "fullest at": fullest.name, "memory at": by_name(moments),
        "reserve": RESERVE, "fits": run.fits(moments), "ways out": out,
    }  # fmt: skip


def ways_out(choices: Choices, fits: Callable[[Choices], bool], each: int, gpus: int) -> list[str]:
    """Changes to the options with which a run fits that does not: the fewest that do it, by themselves or together; at most five."""
    if fits(choices):
        return []
    accumulations = tuple(n for n in range(choices.accumulation + 1, each + 1) if each % n == 0)
    fractions = tuple(n / 10 for n in range(1, 11) if n / 10 > choices.checkpointing)
    changes: dict[str, tuple[Any, ...]] = {
        "checkpointing": fractions, "accumulation": accumulations, "pictures": tuple(n for n in (4, 2, 1, 0) if n < choices.pictures),
        "weights": ("bfloat16",) if choices.weights == "float32" else (),
        "shard": ("full",) if gpus > 1 and choices.shard == "none" else (),
        "mode": ("lora",) if choices.mode == "full" else (), "ema": (False,) if choices.ema and choices.mode == "full" else (),
        "moments": ("bfloat16",) if choices.weights == "bfloat16" and choices.moments == "float32" else (),
    }  # fmt: skip
    names = [name for name, values in changes.items() if values]
    for count in range(1, len(names) + 1):
        found = [words for those in combinations(names, count) if (words := least(choices, {name: changes[name] for name in those}, fits))]
        if found:
            return found[:5]
    return []


def least(choices: Choices, changes: dict[str, tuple[Any, ...]], fits: Callable[[Choices], bool]) -> str | None:
    """The gentlest values of these options with which a run fits, as they are written; None when even the last of each do not."""
    kept = {name: values[-1] for name, values in changes.items()}
    if not fits(replace(choices, **kept)):
        return None
    for name, values in changes.items():
        kept[name] = next(value for value in values if fits(replace(choices, **(kept | {name: value}))))
    return " ".join("--no-ema" if name == "ema" else f"--{name} {value:g}" if name == "checkpointing" else f"--{name} {value}"
                    for name, value in kept.items())  # fmt: skip


def show(found: dict[str, Any]) -> None:
    """Prints the answer as tables on stdout."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)

    def table(title: str, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]], last: tuple[str, ...] | None = None) -> None:
        made = Table(title=title, title_justify="left", title_style="bold", min_width=56)
        for index, column in enumerate(columns):
            made.add_column(column, justify="right" if index else "left")
        for row in rows:
            made.add_row(*row)
        if last:
            made.add_section()
            made.add_row(*last)
        console.print(made)

    counts, card = found["parameters"], found["GPU"]
    console.print(
        f"[bold]{escape(shown(found['model']))}[/bold], {found['mode']}, "
        f"{found['width']} x {found['height']}: {found['image tokens']} image tokens and "
        f"{found['text tokens']} text tokens, {found['GPUs']} x {card['name']} ({card['TFLOP/s']:g} TFLOP/s, {card['GiB']:g} GiB)"
    )
    table("Parameters", ("", ""), ((part, count_of(n)) for part, n in counts.items()), ("in all", count_of(sum(counts.values()))))
    if "trained parameters" in found:
        console.print(f"trained: {count_of(found['trained parameters'])}")
    once, other = found["FLOP an image"].values()
    what = list(found["FLOP an image"])[1]
    parts = {**dict.fromkeys(once), **dict.fromkeys(other)}
    unit, size = ("TFLOP", 1e12) if sum(once.values()) > 1e11 else ("GFLOP", 1e9)
    rows = ((part, *(f"{flops[part] / size:.3f}" if part in flops else "" for flops in (once, other))) for part in parts)
    total = ("in all", *(f"{sum(flops.values()) / size:.3f}" for flops in (once, other)))
    table(f"{unit} an image", ("", "forward", what), rows, total)
    memory = found["memory"]
    at_a_time = found["pictures a GPU at a time"]
    heading = f"Memory of a GPU, {at_a_time} picture{'s' * (at_a_time > 1)} at a time, at its fullest: {found['fullest at']}"
    table(heading, ("", "GiB"), ((part, f"{n / GIB:.2f}") for part, n in memory.items()), ("in all", f"{sum(memory.values()) / GIB:.2f}"))
    console.print("; ".join(f"{moment} {total / GIB:.1f}" for moment, total in found["memory at"].items()) + " GiB")
    sentence = f"{sum(memory.values()) / GIB:.1f} + {found['reserve'] / GIB:g} to leave free, of {card['GiB']:g} GiB"
    if found["fits"]:
        console.print(f"[bold green]fits[/bold green]: {sentence}")
    else:
        out = "; or ".join(found["ways out"]) or "nothing here makes it fit: take a GPU with more memory, or a smaller model or resolution"
        console.print(f"[bold red]does not fit[/bold red]: {sentence}\n" + (f"fits with {out}" if found["ways out"] else out))
    time = found["time"]
    speed = f"{time['images a second']:.3g} images/s at {found['efficiency']:.0%} of the peak"
    if "hours" in time:
        console.print(f"{speed}; {time['steps']} steps take {duration(time['hours'])}, {time['GPU hours']:.3g} GPU hours")
    else:
        console.print(f"{speed}; {time['seconds a picture']:.3g} s a picture of {time['steps']} steps at guidance {time['guidance']:g}")


def count_of(number: int) -> str:
    """A number of parameters with its unit."""
    unit, size = ("B", 1e9) if number >= 1e9 else ("M", 1e6) if number >= 1e6 else ("k", 1e3)
    return f"{number / size:.3f} {unit}"


def duration(hours: float) -> str:
    """Hours in the unit that suits them."""
    if hours < 1:
        return f"{hours * 60:.3g} min" if hours * 60 >= 1 else f"{hours * 3600:.3g} s"
    return f"{hours:.3g} h" if hours < 48 else f"{hours / 24:.3g} days"
