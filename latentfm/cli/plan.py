"""`latentfm plan`: what a training or a drawing would cost, before anything is bought, downloaded or started. Needs no GPU and no torch."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentfm.bounds import MOST_AT_ONCE
from latentfm.cli.checks import check_at_least_one, check_at_most, check_name
from latentfm.cli.completion import Overrides, names
from latentfm.errors import InputError
from latentfm.models.presets import PRESETS
from latentfm.planning.devices import EFFICIENCY, GPU, GPUS, Device
from latentfm.words import shown

if TYPE_CHECKING:
    from latentfm.config import RunConfig
    from latentfm.planning.model import ModelSpec
    from latentfm.planning.run import Parallelism

SHARDS, DTYPES = ("none", "full", "offload"), ("float32", "bfloat16")


def plan(
    overrides: Overrides = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="A run's YAML file.", show_default=False)] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help=f"A network's size among SD3's encoders: {', '.join(PRESETS)}. Default: sd3-medium.",
            show_default=False,
            autocompletion=names(PRESETS),
        ),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Instead: a pipeline or transformer folder, whose configuration is read.", show_default=False)
    ] = None,
    generate: Annotated[
        int | None, typer.Option(help="Instead of training: draw so many pictures at a time, over all GPUs.", show_default=False)
    ] = None,
    dtype: Annotated[str, typer.Option(help="--generate: float32 or bfloat16.")] = "bfloat16",
    gpu: Annotated[str, typer.Option(help=f"Which GPU: {', '.join(GPUS)}.", autocompletion=names(GPUS))] = "h100",
    gpus: Annotated[int, typer.Option(help="How many GPUs.")] = 1,
    shard: Annotated[
        str, typer.Option(help="none: a copy of the weights on each GPU (DDP); full: split over all (FSDP2); offload: split, on the CPU.")
    ] = "none",
    peak: Annotated[float | None, typer.Option(help="Another GPU's peak in bfloat16, TFLOP/s.", show_default=False)] = None,
    gpu_memory: Annotated[float | None, typer.Option(help="Another GPU's memory, in GiB.", show_default=False)] = None,
    efficiency: Annotated[float, typer.Option(help="The share of the peak that is reached, above 0 up to 1.")] = EFFICIENCY,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Say what a run would cost: parameters, operations, memory by part, and time.

    The options are a run's own; --generate reads data.size, data.t5_lengths and sample's steps, guidance and solver of them. Needs no GPU,
    no data and no model. The memory is that of the fullest GPU in its fullest phase, with 1.5 GiB left free; when it does not fit, the
    plan says what would make it fit. The time is operations over the GPUs' peak times --efficiency.
    """
    from latentfm.cli.plan_tables import show_plan
    from latentfm.planning.run import plan_data, plan_run
    from latentfm.planning.sampling import Sampling
    from latentfm.planning.summary import sampling_summary, training_summary

    device, parallelism = Device.of(chosen_gpu(gpu, peak, gpu_memory)), chosen_parallelism(gpus, shard)
    check_name("--dtype", dtype, DTYPES)
    if not 0 < efficiency <= 1:
        raise InputError(f"--efficiency {efficiency:g} must be above 0 and at most 1")
    run, spec = options(config, overrides or []), chosen_model(config, overrides or [], preset, model)
    if generate is None:
        if dtype != "bfloat16":
            raise InputError(f"--dtype {dtype} goes with --generate; a training's precision is train.weights")
        found = training_summary(plan_run(run, parallelism, spec), device, efficiency)
    else:
        check_at_least_one({"--generate": generate})
        check_at_most({"--generate": (generate, MOST_AT_ONCE * gpus)})
        if generate % gpus:
            raise InputError(f"--generate {generate} does not divide by {gpus} GPUs")
        if shard != "none":
            raise InputError(f"--shard {shard} is for training, not for --generate; leave it out")
        if dtype == "float32" and peak is None:
            raise InputError("drawing in float32 is far slower than a GPU's bfloat16 peak; give its float32 peak with --peak, in TFLOP/s")
        spec = spec or plan_run(run).model
        size, data = plan_data(run.data, spec, generate)
        text = spec.clip_tokens + max(data.t5_lengths)
        sampling = Sampling(spec, size, text, run.sample.steps, run.sample.guidance, dtype, generate, gpus, run.sample.solver)
        found = sampling_summary(sampling, device, efficiency)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        show_plan(found)


def options(config: Path | None, overrides: list[str]) -> "RunConfig":
    """The run that is planned; where its data is and where it is written need not be said. Raises InputError."""
    from latentfm.config import load_config, read_options
    from latentfm.planning.run import with_precision

    given = (read_options(config).get("data") if config else None) or {}
    known = any(word.startswith(("data.folder=", "data.sources=")) for word in overrides) or {"folder", "sources"} & {*given}
    more = [] if known else ["data.folder=-"]
    return with_precision(load_config(config, [*overrides, *more, "output.folder=-"]), bfloat16=True)


def chosen_model(config: Path | None, overrides: list[str], preset: str | None, model: Path | None) -> "ModelSpec | None":
    """The network that --preset or --model name; None for the run's own. Raises InputError."""
    from latentfm.planning.model import preset_model, read_model

    if model is not None and preset is not None:
        raise InputError(f"give --preset {shown(preset)} or --model {shown(model)}, not both")
    if model is not None:
        return read_model(model)
    own = config is not None or any(word.startswith("model.") for word in overrides)
    return None if own and preset is None else preset_model(preset or "sd3-medium")


def chosen_gpu(name: str, peak: float | None = None, memory: float | None = None) -> GPU:
    """The GPU of this name, or another one by its peak in TFLOP/s and its memory in GiB. Raises InputError."""
    check_name("--gpu", name.lower(), tuple(GPUS))
    for option, value in (("--peak", peak), ("--gpu-memory", memory)):
        if value is not None and not 0 < value <= 1e6:
            raise InputError(f"{option} {value:g} must be above 0")
    known = GPUS[name.lower()]
    return GPU(known.name if peak is None else "another", peak or known.tflops, memory or known.gib)


def chosen_parallelism(gpus: int, shard: str, machines: int = 1) -> "Parallelism":
    """Each GPU with a copy of the weights, or all of them with one, on them or on the CPU. Raises InputError."""
    from latentfm.planning.run import Parallelism

    check_at_least_one({"--gpus": gpus})
    check_name("--shard", shard, SHARDS)
    if shard == "full" and gpus == 1:
        raise InputError("--shard full splits over several GPUs; say how many with --gpus")
    return Parallelism(gpus, machines, 1 if shard == "none" else gpus, offload=shard == "offload")
