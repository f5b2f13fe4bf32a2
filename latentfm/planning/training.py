"""What a run takes by its plan: memory, operations, time, bytes on disk, and what would make it fit. Needs no torch."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from latentfm.bounds import DEFAULT_PROMPTS, LARGE, captions_at_once, images_at_once
from latentfm.config import AdapterOptions
from latentfm.errors import InputError
from latentfm.optimizers import OPTIMIZERS
from latentfm.planning.cost import parameters, position_table, training_flops
from latentfm.planning.devices import EFFICIENCY, RESERVE, Device
from latentfm.planning.memory import Phase, Training, fullest, optimizer_bytes, totals, training_phases
from latentfm.planning.run import RunPlan, changed, plan_run

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
MOST_WAYS = 5


def training_of(plan: RunPlan, cpu: bool = False, pictures: int | None = None) -> Training:
    """The run as one process sees it, in its largest bucket; of a dataset of so many pictures."""
    train, data, model, processes = plan.config.train, plan.config.data, plan.model, plan.parallelism.processes
    narrow, adapter = train.weights == "bfloat16", train.adapter
    width, height = max(plan.data.buckets.shapes, key=lambda shape: shape[0] * shape[1])
    text_width, text = WIDTHS[plan.config.model.text_encoders], plan.text_tokens[0]
    encoders = text_width * sum(model.encoder_parameters.values())
    captions = {length: plan.micro_batch if data.online else captions_at_once(length, cpu) for length in plan.data.t5_lengths}
    prompts = max(number * sum(encoder.numbers(length) for encoder in model.encoders.values()) for length, number in captions.items())
    at_once = images_at_once(width * height, cpu) if width * height <= LARGE and not data.online else 1
    drawn = len(plan.config.sample.prompts) or min(DEFAULT_PROMPTS, DEFAULT_PROMPTS if pictures is None else pictures)
    base = adapter.base if adapter and adapter.base != "as_weights" else None
    return Training(
        model.image_tokens((width, height)), text, plan.micro_batch,
        "bfloat16" if narrow else "autocast" if train.mixed_precision == "bf16" else "float32",
        rank=adapter.rank if adapter else None, checkpointing=train.gradient_checkpointing, ema_on_cpu=train.ema_device == "cpu",
        master=train.master_weights, narrow_moments=train.moments == "bfloat16", state=OPTIMIZERS[train.optimizer].state,
        matrices=OPTIMIZERS[train.optimizer].matrices, accumulated=train.gradient_accumulation > 1,
        shards=plan.parallelism.shards, offloaded=plan.parallelism.offload,
        frozen=4 * model.vae + (encoders if data.online else 0), encoders=0 if data.online else encoders,
        encoding=max(4 * at_once * model.decoder.encoder_numbers(width * height), text_width * prompts), online=data.online,
        pictures=-(-drawn // processes), decoding=4 * model.decoder.numbers(width * height), cpu=cpu,
        trains=plan.trained, wide_adapters=narrow and adapter is not None, quantised=base, routed=plan.routed((width, height)),
        everywhere=plan.beyond_attention or base == "int8",  # bitsandbytes keeps the input of every 8-bit product
    )  # fmt: skip


def phases_of(plan: RunPlan, device: Device, pictures: int | None = None) -> list[Phase]:
    """What is in a process's memory in each phase of the run."""
    return training_phases(plan.model.network, training_of(plan, device.cpu, pictures))


def memory_of(phases: list[Phase], device: Device, ways: list[str]) -> dict[str, Any]:
    """The fullest phase by part, each phase's sum, whether it fits the device, and what would make it fit."""
    most = fullest(phases)
    return {
        "device": device.name, "bytes": device.memory, "reserve": RESERVE, "parts": most.parts,
        "fullest at": most.name, "at": totals(phases), "total": most.total, "fits": device.fits(most.total),
        "ways out": ways,
    }  # fmt: skip


def flops_of(plan: RunPlan, shape: tuple[int, int]) -> dict[str, int]:
    """FLOP of one picture of a bucket, forward and backward, by part."""
    train, image, text = plan.config.train, plan.model.image_tokens(shape), round(plan.text_tokens[1])
    first = 0 if plan.trained[-1] else next((block for block, count in enumerate(plan.trained) if count), 0)
    rank = train.adapter.rank if train.adapter else None
    return training_flops(plan.model.network, image, text, rank, train.gradient_checkpointing, first, plan.routed(shape))


def time_of(plan: RunPlan, device: Device, shares: Sequence[float] | None = None, efficiency: float = EFFICIENCY) -> dict[str, Any]:
    """FLOP of a picture, the mean over the buckets by their `shares` of the steps, and the time they take of a known GPU's peak."""
    train, shapes = plan.config.train, plan.data.buckets.shapes
    shares = shares or [1.0] * len(shapes)
    flops = sum(sum(flops_of(plan, shape).values()) * share for shape, share in zip(shapes, shares, strict=True)) / sum(shares)
    found = {"FLOP a picture": flops, "efficiency": efficiency, "images a second": None, "seconds a step": None, "hours": None}
    if device.gpu is None:
        return found
    speed = plan.parallelism.processes * device.gpu.tflops * 1e12 * efficiency / flops
    hours = train.steps * train.batch_size / speed / 3600
    return found | {"images a second": speed, "seconds a step": train.batch_size / speed, "hours": hours}


# On the disk


def checkpoint_bytes(plan: RunPlan) -> int:
    """Bytes of one checkpoint: what trains, its averages, its optimizer, and what it is drawn with."""
    run, numbers = training_of(plan), sum(plan.trained)
    drawn_with = numbers * 4 if plan.config.train.adapter else model_bytes(plan)
    return numbers * (run.trained_width + 4) + optimizer_bytes(plan.model.network, run, numbers) + drawn_with


def model_bytes(plan: RunPlan) -> int:
    """Bytes of the network that is saved at the end, its position table with it."""
    network = plan.model.network
    return (sum(parameters(network).values()) + position_table(network)) * WIDTHS[plan.config.output.dtype]


def cache_bytes(plan: RunPlan, pictures: Sequence[int], captions: int) -> int:
    """Bytes of a cache: moments of so many pictures in each bucket, mirrored ones too, and so many captions at each T5 length."""
    options, model, factor = plan.config.data, plan.model, plan.model.decoder.factor
    places = sum(number * (w // factor) * (h // factor) for number, (w, h) in zip(pictures, plan.data.buckets.shapes, strict=True))
    latents = (1 + options.flip) * 2 * model.decoder.latent_channels * places
    clips = sum(model.clip_tokens * encoder.width + encoder.pooled for encoder in model.encoders.values() if encoder.pooled)
    prompts = captions * sum(clips + length * model.network.text_dim for length in plan.data.t5_lengths)
    return latents * WIDTHS[options.cache_dtype] + 2 * prompts


# What would make it fit


def ways_to_fit(plan: RunPlan, device: Device, pictures: int | None = None) -> list[str]:
    """Changes to the options with which a run fits that does not: the fewest that do it, by themselves or together; at most MOST_WAYS."""

    def fits(changes: dict[str, Any]) -> bool:
        try:
            return device.fits(fullest(phases_of(with_changes(plan, changes), device, pictures)).total)
        except InputError:  # options that do not go together
            return False

    if fits({}):
        return []
    possible = {name: values for name, values in gentler(plan).items() if values}
    for number in range(1, len(possible) + 1):
        found = [words for names in combinations(possible, number) if (words := gentlest({name: possible[name] for name in names}, fits))]
        if found:
            return found[:MOST_WAYS]
    return []


def gentler(plan: RunPlan) -> dict[str, tuple[Any, ...]]:
    """Values of options that take less memory than the run's own, the gentlest first."""
    config, parallelism = plan.config, plan.parallelism
    train, each, prompts = config.train, plan.micro_batch * config.train.gradient_accumulation, config.sample.prompts or list("abcdefgh")
    trained_wholly = train.adapter is None and train.optimizer == "adamw"
    return {
        "train.gradient_checkpointing": tuple(n / 10 for n in range(1, 11) if n / 10 > train.gradient_checkpointing),
        "train.gradient_accumulation": tuple(n for n in range(train.gradient_accumulation + 1, each + 1) if each % n == 0),
        "sample.prompts": tuple(prompts[:n] for n in (4, 2, 1) if n < len(prompts)),
        "model.text_encoders": ("bfloat16",) if config.model.text_encoders == "float32" and plan.model.encoders else (),
        "train.weights": ("bfloat16",) if train.weights == "float32" and (train.adapter or trained_wholly) else (),
        "--shard": ("full",) if parallelism.processes > 1 and not parallelism.splits else (),
        "train.adapter": (AdapterOptions(),) if train.adapter is None and not (config.model.preset or train.token_routing) else (),
        "train.ema_device": ("cpu",) if train.ema_device == "same" and train.adapter is None else (),
        "train.moments": ("bfloat16",) if train.weights == "bfloat16" and train.moments == "float32" and trained_wholly else (),
    }


def with_changes(plan: RunPlan, changes: dict[str, Any]) -> RunPlan:
    """The plan of the same run with other values of options."""
    config, parallelism = plan.config, plan.parallelism
    for name, value in changes.items():
        if name == "--shard":
            parallelism = replace(parallelism, shards=parallelism.processes)
        else:
            config = changed(config, name, value)
    if "train.adapter" in changes:
        return plan_run(config, parallelism, plan.model)
    return replace(plan, config=config, parallelism=parallelism)


def gentlest(possible: dict[str, tuple[Any, ...]], fits: Callable[[dict[str, Any]], bool]) -> str | None:
    """The gentlest values of these options with which a run fits, as they are written; None when even the last of each do not."""
    chosen = {name: values[-1] for name, values in possible.items()}
    if not fits(chosen):
        return None
    for name, values in possible.items():
        chosen[name] = next(value for value in values if fits(chosen | {name: value}))
    return " ".join(written(name, value) for name, value in chosen.items())


def written(name: str, value: Any) -> str:
    """An option as it is written on the command line."""
    if name == "--shard":
        return f"--shard {value}"
    if name == "train.adapter":
        return f"train.adapter.rank={value.rank}"
    return f"{name}={json.dumps(value, separators=(',', ':'))}" if name == "sample.prompts" else f"{name}={value}"
