"""The answers of `latentfm plan`, as plain values for JSON: sizes in bytes, times in seconds or hours."""

from typing import Any

from latentfm.planning.cost import forward_flops, parameters
from latentfm.planning.devices import Device
from latentfm.planning.memory import Phase
from latentfm.planning.model import ModelSpec
from latentfm.planning.run import RunPlan
from latentfm.planning.sampling import Sampling
from latentfm.planning.training import flops_of, memory_of, phases_of, time_of, ways_to_fit


def training_summary(plan: RunPlan, device: Device, efficiency: float) -> dict[str, Any]:
    """What a training takes on a known GPU; its operations and tokens are those of the base of its buckets."""
    text, gpus, adapter = round(plan.text_tokens[1]), plan.parallelism.processes, plan.config.train.adapter
    time = time_of(plan, device, efficiency=efficiency)
    forward = forward_flops(plan.model.network, plan.model.image_tokens(plan.size), text)
    return {
        **in_common(plan.model, adapter.kind if adapter else "full", plan.size, text, gpus, device, efficiency),
        "trained parameters": sum(plan.trained),
        "FLOP an image": {"forward": forward, "training": flops_of(plan, plan.size)},
        "pictures a GPU at a time": plan.micro_batch,
        **of_memory(phases_of(plan, device), device, ways_to_fit(plan, device)),
        "time": {
            "images a second": time["images a second"], "seconds a step": time["seconds a step"], "steps": plan.config.train.steps,
            "hours": time["hours"], "GPU hours": gpus * time["hours"],
        },
    }  # fmt: skip


def sampling_summary(sampling: Sampling, device: Device, efficiency: float) -> dict[str, Any]:
    """What drawing pictures takes on a known GPU."""
    return {
        **in_common(sampling.model, "generate", sampling.size, sampling.text_tokens, sampling.gpus, device, efficiency),
        "FLOP an image": sampling.flops(),
        "pictures a GPU at a time": sampling.each,
        **of_memory(sampling.phases(sampling.each, sampling.encoders), device, sampling.ways_to_fit(device)),
        "time": sampling.time(device, efficiency),
    }


def in_common(
    model: ModelSpec, mode: str, size: tuple[int, int], text: int, gpus: int, device: Device, efficiency: float
) -> dict[str, Any]:
    """What both answers begin with."""
    gpu = device.gpu
    return {
        "model": model.name, "mode": mode, "width": size[0], "height": size[1], "image tokens": model.image_tokens(size),
        "text tokens": text, "GPUs": gpus, "GPU": {"name": gpu.name, "TFLOP/s": gpu.tflops, "GiB": gpu.gib}, "efficiency": efficiency,
        "parameters": {part: count for part, count in parameters(model.network).items() if count},
        "frozen parameters": model.encoder_parameters | {"VAE": model.vae},
    }  # fmt: skip


def of_memory(phases: list[Phase], device: Device, ways: list[str]) -> dict[str, Any]:
    """Both answers' part on memory: the fullest phase by part, each phase's sum, whether it fits, and what would make it fit."""
    found = memory_of(phases, device)
    return {
        "memory": found["parts"], "fullest at": found["fullest at"], "memory at": found["at"], "reserve": found["reserve"],
        "fits": found["fits"], "ways out": ways,
    }  # fmt: skip
