"""What `latentfm plan` says, and with data of its own `latentfm train --dry-run`, as plain values for JSON: sizes in bytes, FLOP, hours."""

from collections.abc import Sequence
from typing import Any

from latentfm.planning.cost import forward_flops, parameters
from latentfm.planning.devices import EFFICIENCY, Device
from latentfm.planning.model import ModelSpec
from latentfm.planning.run import RunPlan
from latentfm.planning.sampling import Sampling
from latentfm.planning.training import flops_of, memory_of, phases_of, time_of, ways_to_fit


def training_summary(
    plan: RunPlan, device: Device, efficiency: float = EFFICIENCY, pictures: int | None = None, shares: Sequence[float] | None = None
) -> dict[str, Any]:
    """What a training takes; of a dataset of so many pictures, with these shares of the steps in each bucket, where they are known."""
    train, parallelism, own = plan.config.train, plan.parallelism, sum(plan.trained)
    found = network_of(plan.model, device)
    frozen = sum(found["parameters"]["network"].values()) - (0 if train.adapter else own)
    most, mean = plan.text_tokens
    forward = forward_flops(plan.model.network, plan.model.image_tokens(plan.size), round(mean))
    routed = plan.routed(plan.data.buckets.shapes[0])
    return {
        "run": {"pipeline": plan.model.name, "size": list(plan.size), "trains": trained_in_words(plan)},
        "device": found["device"], "parameters": {"trained": own, "frozen": frozen} | found["parameters"],
        "tokens": {
            "image": [plan.model.image_tokens(shape) for shape in plan.data.buckets.shapes], "text": most, "mean text": mean,
            "routed": None if routed is None else dict(zip(("first block", "last block", "kept"), routed, strict=True)),
        },
        "batch": {
            "pictures a step": train.batch_size, "processes": parallelism.processes, "machines": parallelism.machines,
            "processes a copy of the weights": parallelism.shards, "on the CPU": parallelism.offload,
            "gradient accumulation": train.gradient_accumulation,
            "pictures a process at a time": plan.micro_batch,
        },
        "FLOP an image": {"forward": forward, "training": flops_of(plan, plan.size)},
        "memory": memory_of(phases_of(plan, device, pictures), device, ways_to_fit(plan, device, pictures)),
        "time": time_of(plan, device, shares, efficiency),
    }  # fmt: skip


def sampling_summary(sampling: Sampling, device: Device, efficiency: float) -> dict[str, Any]:
    """What drawing pictures takes on a known GPU."""
    phases = sampling.phases(sampling.each, sampling.encoders)
    return {
        "run": {"pipeline": sampling.model.name, "size": list(sampling.size), "draws": f"{sampling.each} pictures at a time on a GPU"},
        **network_of(sampling.model, device),
        "tokens": {"image": [sampling.model.image_tokens(sampling.size)], "text": sampling.text_tokens},
        "FLOP an image": sampling.flops(),
        "memory": memory_of(phases, device, sampling.ways_to_fit(device)),
        "time": sampling.time(device, efficiency),
    }


def network_of(model: ModelSpec, device: Device) -> dict[str, Any]:
    """The network by part, the frozen models around it, and what it runs on."""
    by_part = {part: count for part, count in parameters(model.network).items() if count}
    return {
        "device": {"name": device.name, "bytes": device.memory, "TFLOP/s": device.gpu and device.gpu.tflops},
        "parameters": {"network": by_part, "frozen models": model.encoder_parameters | {"VAE": model.vae}},
    }


def trained_in_words(plan: RunPlan) -> str:
    """What of a network trains."""
    train, preset = plan.config.train, plan.config.model.preset
    where = "" if train.blocks is None else f" of blocks {train.blocks}"
    if train.adapter:
        base = train.weights if train.adapter.base == "as_weights" else train.adapter.base
        what = f"{train.adapter.kind} of rank {train.adapter.rank} on {len(plan.adapted)} linears{where}, the base in {base}"
    else:
        what = "every weight" if train.blocks is None else f"the weights{where}"
    return f"{f'a new {preset} network' if preset else 'its own network'}; trains {what}"
