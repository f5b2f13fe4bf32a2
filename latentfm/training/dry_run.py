"""What a run would do and take, before a model is loaded: its data, steps, memory, time and disk, in closed form where there is one.

`dry_run` reads configurations, headers of weights and of pictures. It fails where the run would fail, as far as can be known, and it
writes nothing.
"""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentfm.bundled import pipeline_folder
from latentfm.config import OPTIONS, RunConfig, default_of
from latentfm.data.from_options import open_dataset
from latentfm.data.images import UnreadableImage, upright_size
from latentfm.data.loader import Dropout
from latentfm.data.mixture import Mixture
from latentfm.data.placement import Placement
from latentfm.data.sources import Dataset, Sample
from latentfm.data.stream import Stream
from latentfm.errors import InputError, Problems
from latentfm.files import existing_parent, expanded
from latentfm.planning.devices import GIB, Device
from latentfm.planning.run import Parallelism, RunPlan, with_precision
from latentfm.planning.summary import training_summary
from latentfm.planning.training import cache_bytes, checkpoint_bytes, model_bytes
from latentfm.training.checkpoint.resuming import check_goes_on
from latentfm.training.checks import cautions, check
from latentfm.training.models import frozen_files
from latentfm.training.pairs import pairs_of
from latentfm.training.precision import has_bfloat16
from latentfm.training.validation import split_held_out
from latentfm.words import in_units

SHOWN = 20  # names in a list


def dry_run(
    config: RunConfig, resume: bool = False, parallelism: Parallelism | None = None, device: Device | None = None,
    on_picture: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:  # fmt: skip
    """Everything about a run that can be known beforehand, as plain values for JSON; sizes in bytes, times in seconds or hours.

    parallelism: told by the environment if not given; device: what each process computes on, what is here if not given.
    `on_picture` is told how many of how many headers of pictures have been read. Raises one InputError with everything that is wrong:
    what `check` finds, no usable picture, too few to hold out, too little room on a disk. Memory that does not suffice is an
    estimate, and so no error: "fits" is False then.
    """
    parallelism = parallelism or Parallelism.here()
    device, problems = device or Device.here(max(1, parallelism.processes // parallelism.machines)), Problems()
    bfloat16 = has_bfloat16(torch.device("cpu" if device.cpu else "cuda")) if device.gpu is None else True  # all that are known have it
    given, config = config, with_precision(config, bfloat16)
    plan = dataset = None
    with problems.collected():
        plan = check(config, resume, parallelism, sources=False)
    with problems.collected():
        if resume:
            check_goes_on(config)
    with problems.collected():
        dataset = open_dataset(config.data) if config.data.pairs is None else pairs_of(config)
    if plan and dataset:
        with problems.collected():
            placed, unreadable = read_pictures(dataset, plan, on_picture)
            disk = disk_needs(plan, placed)
            check_disk(disk)
    problems.raise_all()
    train = config.train
    buckets = [{name.replace("_", " "): value for name, value in row.items()} for row in placed.buckets(placed.trained)]
    return {
        **training_summary(plan, device, pictures=int(placed.trained.sum()), shares=[row["steps an epoch"] for row in buckets]),
        "options": options_of(given, config), "notes": cautions(config), "data": data_of(dataset, placed, unreadable), "buckets": buckets,
        "steps": steps_of(plan, placed.mixture), "disk": disk, "places": places(config),
        "P(no condition)": Dropout(train.dropout, train.dropout_each).p_unconditional(len(plan.model.encoders)),
        "environment": {"torch": torch.__version__, "device": device.name},
    }  # fmt: skip


# The data


def read_pictures(dataset: Dataset, plan: RunPlan, on_picture: Callable[[int, int], None]) -> tuple[Placement, list[str]]:
    """(where the run places the pictures, by their headers alone; why those without a size cannot be read).

    Raises InputError when no picture is left to train on.
    """
    samples, unreadable = dataset.samples, []
    sizes, readable = np.full((len(samples), 2), plan.size, np.int64), np.ones(len(samples), bool)  # pairs are of the run's size
    for number, sample in enumerate(samples if plan.config.data.pairs is None else ()):
        try:
            sizes[number] = upright_size(sample.path)
        except UnreadableImage as error:
            unreadable.append(str(error))
            readable[number] = False
        finally:
            on_picture(number + 1, len(samples))
    held_out, seed = plan.config.validation.held_out, plan.config.train.seed
    placed = Placement.of(samples, sizes, readable, plan.data, lambda usable: split_held_out(usable, held_out, seed)[1] if usable else [])
    if not placed.used.any():
        first = next(iter(unreadable or left_out(placed)))
        raise InputError(f"none of the {len(samples)} pictures in {dataset.folder} can be trained on; the first: {first}")
    return placed, unreadable


def left_out(placed: Placement) -> list[str]:
    """The pictures that would lose too much to the crop, in words, the worst first."""
    size_of = placed.sizes.tolist()
    return [f"{placed.samples[i].id} ({size_of[i][0]} x {size_of[i][1]}, {placed.lost[i]:.0%} cropped away)" for i in placed.left_out()]


def data_of(dataset: Dataset, placed: Placement, unreadable: list[str]) -> dict[str, Any]:
    """Pictures, captions, sources and problems."""
    samples, cropped = trained(placed), left_out(placed)
    reasons = dataset.problems_by_reason(used=False)
    reasons |= {"picture that cannot be read": unreadable} if unreadable else {}
    reasons |= {f"more than data.max_crop {placed.plan.max_crop:g} cropped away": cropped} if cropped else {}
    return {
        "where": str(dataset.folder), "pictures": len(samples), "held out": int((placed.used & ~placed.trained).sum()),
        "captions": sum(len(sample.captions) for sample in samples), "masks": sum(s.mask is not None for s in samples),
        "draws an epoch": placed.mixture.per_epoch(),
        "sources": [
            {"name": share.source, "pictures": count, "rate": share.rate, "regularisation": share.regularisation}
            for share, count in Counter(sample.share for sample in dataset.samples).items()
        ],
        "not used": [{"reason": reason, "count": len(names), "first": names[:SHOWN]} for reason, names in reasons.items()],
    }  # fmt: skip


def trained(placed: Placement) -> list[Sample]:
    return [placed.samples[index] for index in np.flatnonzero(placed.trained)]


def steps_of(plan: RunPlan, mixture: Mixture) -> dict[str, float]:
    """Steps, those of an epoch (the first one, exactly), and epochs in all."""
    config, train = plan.config, plan.config.train
    stream = Stream(mixture, train.batch_size, train.seed)
    # before the first step, every so many, after the last
    validations = 0 if not config.validation.held_out else 1 + -(-train.steps // config.validation.every)
    return {
        "steps": train.steps, "in the first epoch": stream.steps_in(0), "an epoch": mixture.per_epoch() / train.batch_size,
        "epochs": train.steps * train.batch_size / mixture.per_epoch(), "warm-up": train.warmup_steps,
        "validations": validations, "checkpoints": -(-train.steps // config.output.checkpoint_every),
    }  # fmt: skip


# The disk


def disk_needs(plan: RunPlan, placed: Placement) -> list[dict[str, Any]]:
    """What is written where, its size, what of that size may be there already, and the room on its disk."""
    config = plan.config
    out, folder = expanded(config.output.folder), pipeline_folder(config.model.pipeline)
    frozen = [(name, (folder / name).stat()) for name in frozen_files(folder)]
    disk = existing_parent(out).stat().st_dev
    copied = sum(status.st_size for name, status in frozen if name.endswith(".json") or status.st_dev != disk)  # the others are linked
    one = checkpoint_bytes(plan) + (0 if config.train.adapter else copied)
    made = -(-config.train.steps // config.output.checkpoint_every)
    kept = min(config.output.keep, made) + 1 + (config.validation.held_out > 0)  # one more while it is written, and the best
    needs = [
        ("checkpoints", out / "checkpoints", kept * one, f"{kept} of {one / GIB:.2f} GiB, one of them while it is written"),
        ("model", out / "model", model_bytes(plan) + sum(status.st_size for _, status in frozen), "the network and the frozen models"),
    ]
    if not config.data.online:
        captions = len({caption for sample in trained(placed) for caption in sample.captions})
        each = np.bincount(placed.bucket_of[placed.trained], minlength=len(plan.data.buckets.shapes)).tolist()
        size = cache_bytes(plan, each, captions)
        needs.insert(0, ("cache", expanded(config.data.cache), size, "VAE moments and prompt embeddings"))
    return placed_on_disks(needs)


def placed_on_disks(needs: list[tuple[str, Path, int, str]]) -> list[dict[str, Any]]:
    """A row for each (what, where, bytes, in words): what of it may be there already, and the room on its disk."""
    found = []
    for what, place, size, words in needs:
        parent = existing_parent(place)
        found.append({
            "what": what, "place": str(place), "bytes": size, "there": min(size, stored(place)), "free": shutil.disk_usage(parent).free,
            "disk": parent.stat().st_dev, "is": words,
        })  # fmt: skip
    return found


def stored(place: Path) -> int:
    """Bytes of the files below a folder that are nowhere else too; 0 when there is none."""
    found = (path.stat() for path in place.rglob("*") if path.is_file()) if place.is_dir() else ()
    return sum(status.st_size for status in found if status.st_nlink == 1)


def check_disk(needs: list[dict[str, Any]]) -> None:
    """Raises InputError for a disk with too little room for all that goes there, what may be there already left out."""
    for disk in {need["disk"] for need in needs}:
        own = [need for need in needs if need["disk"] == disk]
        wanted, free = sum(need["bytes"] - need["there"] for need in own), own[0]["free"]
        if wanted > free:
            parts = ", ".join(f"{need['what']} {in_units(need['bytes'])} in {need['place']}" for need in own)
            raise InputError(
                f"{in_units(wanted)} are needed and {in_units(free)} free ({parts}); free some space, choose another disk for data.cache "
                "or output.folder, or lower output.keep"
            )


# The options


def options_of(given: RunConfig, config: RunConfig) -> dict[str, dict[str, Any]]:
    """Every option by name: its value, its default where that is another one, and what was given where the value was chosen here."""
    found, dumped = {}, config.model_dump(mode="json")
    for name, option in OPTIONS.items():
        section, key = name.split(".")
        value, asked, default = getattr(getattr(config, section), key), getattr(getattr(given, section), key), default_of(name)
        found[name] = {"value": dumped[section][key]}
        found[name] |= {} if value == default and not option.is_required() else {"default": default}
        found[name] |= {} if value == asked else {"given": asked}
    return found


def places(config: RunConfig) -> dict[str, str]:
    """Where everything is written."""
    out = expanded(config.output.folder).absolute()
    cache = {} if config.data.online else {"cache": str(expanded(config.data.cache).absolute())}
    return {
        **cache, "metrics": str(out / "metrics.jsonl"), "run page": str(out / "run.html"), "pictures": str(out / "samples"),
        "checkpoints": str(out / "checkpoints"), "model": str(out / "model"),
    }  # fmt: skip
