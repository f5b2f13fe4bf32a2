"""What a run would do and take, before a model is loaded: its data, steps, memory, time and disk, in closed form where there is one.

`dry_run` reads configurations, headers of weights and of pictures. It fails where the run would fail, as far as can be known, and it
writes nothing.
"""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from latentfm.config import RunConfig
from latentfm.data.images import UnreadableImage, upright_size
from latentfm.data.loader import Dropout
from latentfm.data.mixture import Mixture
from latentfm.data.sources import Dataset, Sample
from latentfm.data.stream import Stream
from latentfm.errors import InputError
from latentfm.files import expanded
from latentfm.models.cost import block_products, forward_flops, parameters, trained, training_flops
from latentfm.models.folder import read_config, read_info, t5_length
from latentfm.models.gpus import EFFICIENCY, GIB, GPU, RESERVE, known_gpu
from latentfm.models.memory import Moment, Training, by_name, highest, training_moments
from latentfm.training.checkpoint.resuming import check_goes_on
from latentfm.training.checks import Found, Launch, Setup, cautions, examined, existing_parent
from latentfm.training.precision import has_bfloat16, with_precision
from latentfm.training.prepare import CAPTIONS_AT_ONCE, IMAGES_AT_ONCE, LARGE
from latentfm.training.samples import DEFAULT_PROMPTS
from latentfm.training.sources import open_dataset
from latentfm.training.validation import split_held_out

# bytes of an optimizer's state for each number it moves; of adamw the closed forms know. 8 bits are in blocks of 256 with a float32 each;
# adafactor keeps a row and a column of each matrix, next to nothing
EIGHT_BITS = 2 * (1 + 4 / 256)
STATE = {"adamw8bit": EIGHT_BITS, "paged_adamw": 8.0, "paged_adamw8bit": EIGHT_BITS, "adafactor": 0.01, "prodigy": 16.0, "lion": 4.0}
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
SHOWN = 20  # names in a list


class Device(NamedTuple):
    """What a process would compute on, and how much of its memory it can have. gpu: None where the data sheet is not known."""

    name: str
    memory: int  # bytes
    gpu: GPU | None
    cpu: bool = False

    @classmethod
    def of(cls, gpu: GPU) -> "Device":
        return cls(gpu.name, int(gpu.gib * GIB), gpu)

    @classmethod
    def here(cls, launch: Launch) -> "Device":
        """The first GPU of this machine, or its CPU, whose memory the processes share."""
        if torch.cuda.is_available():
            found = torch.cuda.get_device_properties(0)
            return cls(found.name, found.total_memory, known_gpu(found.name))
        import psutil  # as Accelerate does

        return cls("CPU", psutil.virtual_memory().available // max(1, launch.processes // launch.machines), None, cpu=True)


def dry_run(
    config: RunConfig, resume: bool = False, launch: Launch | None = None, device: Device | None = None,
    on_picture: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:  # fmt: skip
    """Everything about a run that can be known beforehand, as plain values for JSON; sizes in bytes, times in seconds or hours.

    launch: how many processes, told by the environment if not given; device: what each computes on, what is here if not given.
    `on_picture` is told how many of how many headers of pictures have been read. Raises one InputError with everything that is wrong:
    what `checks.examined` finds, no usable picture, too few to hold out, too little room on a disk. Memory that does not suffice is an
    estimate, and so no error: "fits" is False then.
    """
    launch = launch or Launch.here()
    device, found = device or Device.here(launch), Found()
    bfloat16 = has_bfloat16(torch.device("cpu" if device.cpu else "cuda")) if device.gpu is None else True  # all that are known have it
    given, config = config, with_precision(config, bfloat16)
    setup, dataset = examined(config, resume, launch, found), None
    if resume:
        with found.noting():
            check_goes_on(config)
    with found.noting():
        dataset = open_dataset(config.data)
    if setup is None or dataset is None:
        found.raised()
    pictures = None
    with found.noting():
        pictures = sized(dataset, setup, on_picture)
    if pictures is None:
        found.raised()
    disk = disk_needs(setup, pictures, device)
    with found.noting():
        check_disk(disk)
    found.raised()
    return {
        "run": what_trains(setup), "options": options_of(given, config), "notes": cautions(config),
        "data": data_of(dataset, pictures, setup),
        "buckets": table(setup, pictures), "steps": steps_of(setup, pictures), "tokens": tokens_of(setup),
        "parameters": parameters_of(setup),
        "P(no condition)": Dropout(config.train.dropout, config.train.dropout_each).p_unconditional(setup.encoders),
        "batch": {
            "pictures a step": config.train.batch_size, "processes": launch.processes, "machines": launch.machines,
            "processes a copy of the weights": launch.shard, "on the CPU": launch.offload,
            "gradient accumulation": config.train.gradient_accumulation, "pictures a process at a time": setup.micro_batch,
        },
        "memory": memory_of(setup, device, len(pictures.samples)), "time": time_of(setup, pictures, device), "disk": disk,
        "places": places(config, setup), "environment": {"torch": torch.__version__, "device": device.name},
    }  # fmt: skip


# The data


class Pictures(NamedTuple):
    """The pictures to train on: their samples, sizes [N, 2] (width, height) and buckets [N]; and those that are not trained on, by name."""

    samples: list[Sample]
    sizes: np.ndarray
    buckets: np.ndarray
    unreadable: list[str]
    cropped: list[str]
    held_out: int
    mixture: Mixture


def sized(dataset: Dataset, setup: Setup, on_picture: Callable[[int, int], None]) -> Pictures:
    """The pictures with sizes and buckets, by their headers alone. Raises InputError when none is left to train on."""
    options, samples, sizes, unreadable, cropped = setup.config.data, [], [], [], []
    for number, sample in enumerate(dataset.samples, start=1):
        try:
            size = upright_size(sample.path)
        except UnreadableImage as error:
            unreadable.append(str(error))
            continue
        finally:
            on_picture(number, len(dataset.samples))
        lost = setup.buckets.crop(*size)
        if lost > options.max_crop:
            cropped.append(f"{sample.id} ({size[0]} x {size[1]}, {lost:.0%} cropped away)")
            continue
        samples.append(sample)
        sizes.append(size)
    if not samples:
        first = next(iter(unreadable or cropped))
        raise InputError(f"none of the {len(dataset.samples)} pictures in {dataset.folder} can be trained on; the first: {first}")
    train, held_out = split_held_out(samples, setup.config.validation.held_out, setup.config.train.seed)
    kept = [samples[index] for index in train]
    shapes = np.array(sizes)[train]
    buckets = setup.buckets.of_all(shapes)
    return Pictures(
        kept, shapes, buckets, unreadable, cropped, len(held_out), Mixture.of(kept, setup.config.train.seed, buckets)
    )


def data_of(dataset: Dataset, pictures: Pictures, setup: Setup) -> dict[str, Any]:
    """Pictures, captions, sources and problems."""
    sources = Counter(sample.share for sample in dataset.samples)
    reasons: dict[str, list[str]] = {}
    for problem in dataset.problems:
        if problem.used:
            continue
        reasons.setdefault(problem.reason, []).append(problem.path)
    reasons |= {"picture that cannot be read": pictures.unreadable} if pictures.unreadable else {}
    reasons |= {f"more than data.max_crop {setup.config.data.max_crop:g} cropped away": pictures.cropped} if pictures.cropped else {}
    return {
        "where": str(dataset.folder), "pictures": len(pictures.samples), "held out": pictures.held_out,
        "captions": sum(len(sample.captions) for sample in pictures.samples), "masks": sum(s.mask is not None for s in pictures.samples),
        "draws an epoch": pictures.mixture.per_epoch,
        "sources": [
            {"name": share.source, "pictures": count, "rate": share.rate, "regularisation": share.regularisation}
            for share, count in sources.items()
        ],
        "not used": [{"reason": reason, "count": len(names), "first": names[:SHOWN]} for reason, names in reasons.items()],
    }  # fmt: skip


def table(setup: Setup, pictures: Pictures) -> list[dict[str, Any]]:
    """A row a bucket: its shape, pictures, what is cropped away of them, and its steps an epoch, in the mean."""
    rows, total = [], len(pictures.samples)
    groups = Counter()
    for group in pictures.mixture.groups:
        groups[group.bucket] += len(group.indices) * float(group.rate)
    for index, (width, height) in enumerate(setup.buckets.shapes):
        lost = [setup.buckets.crop(*size) for size in pictures.sizes[pictures.buckets == index].tolist()]
        rows.append({
            "width": width, "height": height, "pictures": len(lost), "share": len(lost) / total,
            "mean crop": float(np.mean(lost)) if lost else 0.0, "worst crop": max(lost, default=0.0),
            "steps an epoch": groups[index] / setup.config.train.batch_size,
        })  # fmt: skip
    return rows


def steps_of(setup: Setup, pictures: Pictures) -> dict[str, float]:
    """Steps, those of an epoch (the first one, exactly), and epochs in all."""
    train = setup.config.train
    stream = Stream(pictures.mixture, train.batch_size, train.seed)
    return {
        "steps": train.steps, "in the first epoch": stream.steps_in(0), "an epoch": pictures.mixture.per_epoch / train.batch_size,
        "epochs": train.steps * train.batch_size / pictures.mixture.per_epoch, "warm-up": train.warmup_steps,
        "validations": validations(setup.config), "checkpoints": -(-train.steps // setup.config.output.checkpoint_every),
    }  # fmt: skip


def validations(config: RunConfig) -> int:
    """How often the held-out loss is measured: before the first step, every so many, after the last."""
    return 0 if not config.validation.held_out else 1 + -(-config.train.steps // config.validation.every)


# The network


def what_trains(setup: Setup) -> dict[str, str]:
    """The model and what of it trains, in words."""
    train = setup.config.train
    where = "" if train.blocks is None else f" of blocks {train.blocks}"
    if train.adapter:
        base = train.weights if train.adapter.base == "as_weights" else train.adapter.base
        what = f"{train.adapter.kind} of rank {train.adapter.rank} on {len(setup.adapted)} linears{where}, the base in {base}"
    else:
        what = "every weight" if train.blocks is None else f"the weights{where}"
    network = f"a new {setup.config.model.preset} network" if setup.config.model.preset else "its own network"
    return {"pipeline": str(setup.folder), "network": network, "trains": what}


def parameters_of(setup: Setup) -> dict[str, Any]:
    """Numbers that train, numbers of the network that do not, and the frozen models'."""
    whole, own = sum(parameters(setup.model.network).values()), sum(setup.trained)
    frozen = whole if setup.config.train.adapter else whole - own
    return {"trained": own, "frozen": frozen, "frozen models": setup.model.encoders | {"VAE": setup.model.vae}}


def text_tokens(setup: Setup) -> tuple[int, float]:
    """(the most, the mean) text tokens of a step."""
    clip = setup.model.text_tokens - t5_length(read_info(setup.folder))
    mean = sum(length * share for length, share in setup.lengths.items()) / sum(setup.lengths.values())
    return clip + max(setup.lengths), clip + mean


def tokens_of(setup: Setup) -> dict[str, Any]:
    """Tokens of a picture in each bucket and of a prompt."""
    most, mean = text_tokens(setup)
    images = [setup.model.image_tokens(shape) for shape in setup.buckets.shapes]
    routed = setup.routed(*setup.buckets.shapes[0])
    named = None if routed is None else dict(zip(("first block", "last block", "kept"), routed))
    return {"image": images, "text": most, "mean text": mean, "routed": named}


# Memory, time, disk


def training_of(setup: Setup, device: Device, pictures: int) -> Training:
    """The run as one process sees it, in its largest bucket."""
    train, model = setup.config.train, setup.model
    narrow, launch = train.weights == "bfloat16", setup.launch
    precision = "bfloat16" if narrow else "autocast" if train.mixed_precision == "bf16" else "float32"
    width, height = max(setup.buckets.shapes, key=lambda shape: shape[0] * shape[1])
    adapter, encoders = train.adapter, WIDTHS[setup.config.model.text_encoders] * sum(model.encoders.values())
    drawn = len(setup.config.sample.prompts) or min(DEFAULT_PROMPTS, pictures)
    base, online = adapter.base if adapter and adapter.base != "as_weights" else None, setup.config.data.online
    at_once = IMAGES_AT_ONCE if width * height <= LARGE and not online else 1
    return Training(
        model.image_tokens((width, height)), text_tokens(setup)[0], setup.micro_batch, precision,
        rank=adapter.rank if adapter else None, checkpointing=train.gradient_checkpointing, ema_on_cpu=train.ema_device == "cpu",
        master=train.master_weights, narrow_moments=train.moments == "bfloat16", state=STATE.get(train.optimizer),
        accumulated=train.gradient_accumulation > 1, gpus=launch.shard, shard=launch.sharding,
        frozen=4 * model.vae + (encoders if online else 0), encoders=0 if online else encoders,
        encoding=max(4 * at_once * model.decoder.encoder_numbers(width * height), text_encoding(setup)), online=online,
        pictures=-(-drawn // setup.launch.processes), decoding=4 * model.decoder.numbers(width * height), cpu=device.cpu,
        trains=setup.trained, wide_adapters=narrow and adapter is not None, quantised=base, routed=setup.routed(width, height),
        everywhere=setup.beyond_attention or base == "int8",  # bitsandbytes keeps the input of every 8-bit product
    )  # fmt: skip


def text_encoding(setup: Setup) -> int:
    """Bytes that T5 takes beside its weights for the captions encoded together: inner numbers of its feed-forward, attention's scores."""
    path, length = setup.folder / "text_encoder_3" / "config.json", max(setup.lengths)
    if not path.is_file():
        return 0
    t5, together = read_config(path), setup.micro_batch if setup.config.data.online else CAPTIONS_AT_ONCE
    numbers = length * (3 * (t5["d_ff"] + t5["d_model"]) + 2 * t5["num_heads"] * length)
    return together * numbers * WIDTHS[setup.config.model.text_encoders]


def memory_of(setup: Setup, device: Device, pictures: int) -> dict[str, Any]:
    """The fullest moment of a process by part, each moment's sum, and whether it fits the device."""
    moments: list[Moment] = training_moments(setup.model.network, training_of(setup, device, pictures))
    fullest = highest(moments)
    return {
        "device": device.name, "bytes": device.memory, "reserve": RESERVE, "parts": {part: n for part, n in fullest.parts.items() if n},
        "fullest at": fullest.name, "at": by_name(moments), "total": fullest.total, "fits": fullest.total + RESERVE <= device.memory,
    }  # fmt: skip


def flops_of(setup: Setup, shape: tuple[int, int]) -> int:
    """FLOP of one picture of a bucket, forward and backward.

    Of frozen blocks before the first that trains there is a forward pass alone; blocks that tokens bypass have fewer of them.
    """
    train, net, image, text = setup.config.train, setup.model.network, setup.model.image_tokens(shape), round(text_tokens(setup)[1])
    rank = train.adapter.rank if train.adapter else None
    found = sum(training_flops(net, image, text, rank, train.gradient_checkpointing).values())
    first = next((block for block, count in enumerate(setup.trained) if count), 0)
    if first and first < net.layers and not setup.trained[-1]:
        forward = sum(forward_flops(net, image, text).values())
        found = int(forward + (found - forward) * (1 - first / net.layers))
    if routed := setup.routed(*shape):
        for block in range(routed[0], routed[1] + 1):
            found -= sum(trained(p, rank) for p in block_products(net, block, image, text, rank or 0))
            found += sum(trained(p, rank) for p in block_products(net, block, routed[2], text, rank or 0))
    return found


def time_of(setup: Setup, pictures: Pictures, device: Device) -> dict[str, Any]:
    """FLOP of a picture, the mean over the buckets, and the time they take at EFFICIENCY of a known GPU's peak."""
    train = setup.config.train
    rows = [(flops_of(setup, shape), row["steps an epoch"]) for shape, row in zip(setup.buckets.shapes, table(setup, pictures))]
    flops = sum(each * weight for each, weight in rows) / sum(weight for _, weight in rows)
    found = {"FLOP a picture": flops, "efficiency": EFFICIENCY, "images a second": None, "seconds a step": None, "hours": None}
    if device.gpu is None:
        return found
    speed = setup.launch.processes * device.gpu.tflops * 1e12 * EFFICIENCY / flops
    hours = train.steps * train.batch_size / speed / 3600
    return found | {"images a second": speed, "seconds a step": train.batch_size / speed, "hours": hours}


def disk_needs(setup: Setup, pictures: Pictures, device: Device) -> list[dict[str, Any]]:
    """What is written where, its size, what of that size may be there already, and the room on its disk."""
    config = setup.config
    out, cache = expanded(config.output.folder), expanded(config.data.cache)
    train, whole, numbers = config.train, sum(parameters(setup.model.network).values()), sum(setup.trained)
    run = training_of(setup, device, len(pictures.samples))
    state = 8 / (2 if run.narrow_moments else 1) if run.state is None else run.state
    drawn_with = numbers * 4 if train.adapter else whole * WIDTHS[config.output.dtype]
    one = int(numbers * (run.trained_width + 4 + state + 4 * run.master)) + drawn_with
    made = -(-train.steps // config.output.checkpoint_every)
    kept = min(config.output.keep, made) + 1 + (config.validation.held_out > 0)  # one more while it is written, and the best
    needs = [
        ("checkpoints", out / "checkpoints", kept * one, f"{kept} of {one / GIB:.2f} GiB, one of them while it is written"),
        ("model", out / "model", whole * WIDTHS[config.output.dtype], "the network; the frozen models are linked where the disk allows it"),
    ]
    if not config.data.online:
        needs.insert(0, ("cache", cache, cache_bytes(setup, pictures), "VAE moments and prompt embeddings"))
    found = []
    for what, place, size, words in needs:
        parent = existing_parent(place)
        found.append({
            "what": what, "place": str(place), "bytes": size, "there": min(size, stored(place)), "free": shutil.disk_usage(parent).free,
            "disk": parent.stat().st_dev, "is": words,
        })  # fmt: skip
    return found


def cache_bytes(setup: Setup, pictures: Pictures) -> int:
    """Bytes of a run's entries in the cache: moments of every picture, mirrored ones too, and each caption at each T5 length."""
    options, model = setup.config.data, setup.model
    factor, latents = model.decoder.factor, 0
    for shape, count in zip(setup.buckets.shapes, np.bincount(pictures.buckets, minlength=len(setup.buckets.shapes)).tolist()):
        latents += count * 2 * model.decoder.latent_channels * (shape[0] // factor) * (shape[1] // factor)
    clip = model.text_tokens - t5_length(read_info(setup.folder))
    fixed = 0
    for name in ("text_encoder", "text_encoder_2"):
        config = setup.folder / name / "config.json"
        if config.is_file():
            widths = read_config(config)
            fixed += clip * widths["hidden_size"] + widths["projection_dim"]
    captions = len({caption for sample in pictures.samples for caption in sample.captions})
    texts = captions * sum(fixed + length * model.network.text_dim for length in setup.lengths)
    return (1 + options.flip) * latents * WIDTHS[options.cache_dtype] + 2 * texts


def stored(place: Path) -> int:
    """Bytes of the files below a folder; 0 when there is none."""
    return sum(path.stat().st_size for path in place.rglob("*") if path.is_file()) if place.is_dir() else 0


def check_disk(needs: list[dict[str, Any]]) -> None:
    """Raises InputError for a disk with too little room for all that goes there, what may be there already left out."""
    for disk in {need["disk"] for need in needs}:
        own = [need for need in needs if need["disk"] == disk]
        wanted, free = sum(need["bytes"] - need["there"] for need in own), own[0]["free"]
        if wanted > free:
            parts = ", ".join(f"{need['what']} {need['bytes'] / GIB:.1f} in {need['place']}" for need in own)
            raise InputError(
                f"{wanted / GIB:.1f} GiB are needed and {free / GIB:.1f} free ({parts}); free some space, choose another disk for "
                "data.cache or output.folder, or lower output.keep"
            )


# In words


def options_of(given: RunConfig, config: RunConfig) -> dict[str, dict[str, Any]]:
    """Every option by name: its value, its default where that is another one, and what was given where the value was chosen here."""
    found: dict[str, dict[str, Any]] = {}
    for section, field in RunConfig.model_fields.items():
        values, asked = getattr(config, section), getattr(given, section)
        dumped = values.model_dump(mode="json")
        for key, option in field.annotation.model_fields.items():
            default = None if option.is_required() else option.get_default(call_default_factory=True)
            same = not option.is_required() and getattr(values, key) == default
            chosen = getattr(asked, key) != getattr(values, key)
            found[f"{section}.{key}"] = {"value": dumped[key]} | ({} if same else {"default": default})
            found[f"{section}.{key}"] |= {"given": getattr(asked, key)} if chosen else {}
    return found


def places(config: RunConfig, setup: Setup) -> dict[str, str]:
    """Where everything is written."""
    out = expanded(config.output.folder).absolute()
    cache = {} if config.data.online else {"cache": str(expanded(config.data.cache).absolute())}
    return {
        **cache, "metrics": str(out / "metrics.jsonl"), "run page": str(out / "run.html"), "pictures": str(out / "samples"),
        "checkpoints": str(out / "checkpoints"), "model": str(out / "model"),
    }  # fmt: skip
