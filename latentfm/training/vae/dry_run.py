"""What a VAE's training would do and take, before a weight is loaded: its data, steps, memory and disk.

Memory is counted by running one forward pass on tensors that have shapes and no numbers.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from latentfm.errors import Problems
from latentfm.files import expanded
from latentfm.optimizers import OPTIMIZERS
from latentfm.planning.devices import EFFICIENCY, GIB, Device
from latentfm.planning.run import Parallelism, with_precision
from latentfm.training.checkpoint.resuming import check_goes_on
from latentfm.training.dry_run import check_disk, placed_on_disks
from latentfm.training.precision import has_bfloat16
from latentfm.training.vae.checks import cautions, check, data_plan, listed
from latentfm.training.vae.networks import LPIPS, Discriminator, Reconstruction
from latentfm.training.vae.options import VAEConfig
from latentfm.training.vae.weights import choose_part, settings_of
from latentfm.training.validation import split_held_out
from latentfm.words import count, shown

WORKING = 4  # tensors of a layer, in float32, while its gradient is computed


def dry_run(
    config: VAEConfig, resume: bool = False, parallelism: Parallelism | None = None, device: Device | None = None
) -> dict[str, Any]:
    """Everything about a run that can be known beforehand, as plain values for JSON; sizes in bytes.

    Raises one InputError with everything that is wrong, as far as can be known without reading pictures.
    """
    parallelism = parallelism or Parallelism.here()
    device, problems = device or Device.here(max(1, parallelism.processes // parallelism.machines)), Problems()
    config = with_precision(config, has_bfloat16(torch.device("cpu" if device.cpu else "cuda")) if device.gpu is None else True)
    with problems.collected():
        check(config, resume, parallelism, sources=False)
    with problems.collected():
        if resume:
            check_goes_on(config)
    with problems.collected():
        dataset, held_out = listed(config.data), config.validation.held_out
        if config.validation.folder:
            apart = listed(config.data.model_copy(update={"folder": config.validation.folder, "sources": None}))
        training = len(split_held_out(dataset.samples, held_out, config.train.seed)[0])
    problems.raise_all()
    size, plan = data_plan(config)
    train, judged = config.train, len(apart.samples) if config.validation.folder else held_out
    micro = train.batch_size // (parallelism.processes * train.gradient_accumulation)
    step = Step(config, max(plan.buckets.shapes, key=math.prod), micro)
    out, folder = config.output, expanded(config.output.folder)
    disk = placed_on_disks([
        ("checkpoints", folder / "checkpoints", (out.keep + 1) * step.checkpoint, f"{out.keep + 1} of {step.checkpoint / GIB:.2f} GiB"),
        ("model", folder / "model", 4 * step.numbers["the autoencoder"], "the autoencoder"),
    ])  # fmt: skip
    check_disk(disk)
    memory = step.memory()
    seconds = None
    if device.gpu is not None:
        seconds = step.flops * train.batch_size / (parallelism.processes * device.gpu.tflops * 1e12 * EFFICIENCY)
    return {
        "notes": cautions(config), "where": str(dataset.folder), "pictures": training, "held out": judged,
        "not used": {reason: len(names) for reason, names in dataset.problems_by_reason(used=False).items()},
        "size": list(size), "buckets": [list(shape) for shape in plan.buckets.shapes], "factor": plan.factor,
        "latents": [step.channels, size[1] // plan.factor, size[0] // plan.factor], "numbers": step.numbers, "trained": step.trained,
        "steps": train.steps, "epochs": train.steps * train.batch_size / training, "pictures a process at a time": micro,
        "FLOP a picture": step.flops, "seconds a step": seconds, "disk": disk,
        "memory": {"device": device.name, "bytes": device.memory, "parts": memory, "total": sum(memory.values()),
                   "fits": device.fits(sum(memory.values()))},
    }  # fmt: skip


class Step:
    """What a step on `micro` pictures of `shape` (width, height) at a time takes of a process, in bytes; counted without numbers."""

    def __init__(self, config: VAEConfig, shape: tuple[int, int], micro: int):
        train, judged = config.train, config.judged
        settings = settings_of(config.model, max(shape))
        with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=train.mixed_precision == "bf16"):
            vae = AutoencoderKL.from_config(settings)
            choose_part(vae, config.model.part)
            judge = Discriminator(config.adversarial.width, config.adversarial.layers)
            lpips = LPIPS().requires_grad_(False)
            self.channels, factor = vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1)
            pixels = torch.zeros(micro, 3, shape[1], shape[0])
            noise = torch.zeros(micro, self.channels, shape[1] // factor, shape[0] // factor)
            decoded = torch.zeros_like(pixels).requires_grad_()
            passes = [(Reconstruction(vae), (pixels, noise))]
            passes += [(judge, (decoded,)), (judge, (pixels,))] if judged else []
            passes += [(lpips, (decoded, pixels))] if config.loss.perceptual and config.loss.lpips else []
            found = [kept_and_flops(*each) for each in passes]
        self.activations, flops = (sum(column) for column in list(zip(*found, strict=True))[:2])
        self.working = WORKING * 4 * max(largest for _, _, largest in found)
        self.flops = 3 * flops // micro  # the backward pass is twice the forward one
        there = (("the autoencoder", vae, True), ("the discriminator", judge, judged), ("LPIPS", lpips, config.loss.lpips))
        self.numbers = {name: size_of(network.parameters()) for name, network, wanted in there if wanted}
        self.trained = size_of(p for p in vae.parameters() if p.requires_grad) + self.numbers.get("the discriminator", 0)
        self.optimizer = int(self.trained * OPTIMIZERS[train.optimizer].state)
        self.averages = 4 * (self.trained - self.numbers.get("the discriminator", 0))
        self.averages_elsewhere = train.ema_device == "cpu"

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint."""
        return 4 * self.trained + self.averages + self.optimizer

    def memory(self) -> dict[str, int]:
        """Bytes by part, in the fullest moment: where the backward pass begins. Measured, a step takes up to a quarter more in bf16."""
        return {
            "weights": 4 * sum(self.numbers.values()), "gradients": 4 * self.trained, "optimizer": self.optimizer,
            "averages": 0 if self.averages_elsewhere else self.averages, "activations": self.activations,
            "working": self.working,
        }  # fmt: skip


def size_of(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def kept_and_flops(network: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[int, int, int]:
    """(bytes that a forward pass keeps for the backward one, parameters left out; its FLOP; numbers in the largest tensor it keeps)."""
    own, kept, largest = {parameter.untyped_storage()._cdata for parameter in network.parameters()}, {}, 0

    def keep(value: Tensor) -> Tensor:
        nonlocal largest
        storage = value.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no other takes its place
            largest = max(largest, value.numel())
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value), FlopCounterMode(display=False) as counter:
        network(*inputs)
    return sum(storage.nbytes() for storage in kept.values()), counter.get_total_flops(), largest


def lines(found: Mapping[str, Any]) -> list[str]:
    """A dry run in words."""
    memory, numbers = found["memory"], ", ".join(f"{name} {number / 1e6:.2f}M" for name, number in found["numbers"].items())
    said = [shown(f"note: {note}") for note in found["notes"]]
    said.append(f"{count(found['pictures'], 'picture')} in {shown(found['where'])}, {found['held out']:,} held out")
    said += [f"not used, {shown(reason)}: {number:,}" for reason, number in found["not used"].items()]
    shapes = ", ".join(f"{width} x {height}" for width, height in found["buckets"])
    said.append(f"{shapes} pixels; {found['factor']} a side are one latent: {' x '.join(map(str, found['latents']))}")
    said.append(f"parameters: {numbers}; {found['trained'] / 1e6:.2f}M train")
    pace = "" if found["seconds a step"] is None else f", {found['seconds a step']:.3g} s a step at {EFFICIENCY:.0%} of the peak"
    said.append(f"{found['FLOP a picture'] / 1e9:,.1f} GFLOP a picture, forward and backward{pace}")
    at_a_time = count(found["pictures a process at a time"], "picture")
    said.append(f"{count(found['steps'], 'step')}: {found['epochs']:.4g} epochs, {at_a_time} at a time in a process")
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in memory["parts"].items())
    fits = "fits" if memory["fits"] else "does not fit: lower train.batch_size or raise train.gradient_accumulation"
    said.append(f"memory: {memory['total'] / GIB:.2f} GiB ({parts}) beside the libraries' own, of {memory['bytes'] / GIB:.1f} GiB: {fits}")
    for need in found["disk"]:
        said.append(shown(f"{need['what']}: {need['bytes'] / GIB:.2f} GiB in {need['place']}, {need['free'] / GIB:.1f} free"))
    return said
