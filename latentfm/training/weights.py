"""What a run trains: its network where it computes, the parts of it that train, their averages, their optimizer, and the way to disk."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from latentfm.config import RunConfig
from latentfm.training.adapters import cast_weights, choose_trainable
from latentfm.training.checkpoint import export, storage
from latentfm.training.distributed import zero
from latentfm.training.distributed.processes import Gathering, from_main, together
from latentfm.training.distributed.shards import Parts, is_sharded, resharded, shard
from latentfm.training.models import Models
from latentfm.training.optimizers.ema import EMA
from latentfm.training.optimizers.registry import learning_rate, make_optimizer


class Weights:
    """The network of `models` placed as the options and the launcher say: on the device, or split over the processes.

    micro_batch: pictures in one forward pass of one process. lengths: the T5 lengths that a saved pipeline has null conditions for.
    """

    def __init__(self, models: Models, config: RunConfig, accelerator: Accelerator, micro_batch: int, lengths: list[int]):
        self.models, self.config, self.accelerator, self.lengths = models, config, accelerator, lengths
        options, network = config.train, models.network
        self.trained = choose_trainable(network, options, accelerator.device)
        self.size = sum(parameter.numel() for parameter in network.parameters())
        sharded = is_sharded(accelerator)
        if not sharded and not zero.is_zero():
            network.to(accelerator.device)
        self.network = network.train()
        network.set_gradient_checkpointing(options.gradient_checkpointing)
        exact = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}  # where averages and masters begin
        cast_weights(network, options)
        if options.compile:
            torch._dynamo.config.recompile_limit = 64
            network.compile_repeated_blocks(dynamic=False)
        if zero.is_zero():
            self.parts, self.optimizer = zero.split(network, accelerator, options, micro_batch)
        else:
            self.parts = Parts(network, accelerator, shard(network, accelerator) if sharded else accelerator.prepare(network))
            self.optimizer = make_optimizer(self.parts.parameters, options)
        start = {name: self.parts.part(name, value) for name, value in exact.items()}
        self.ema = EMA(start, options.ema_decay, torch.device("cpu") if options.ema_device == "cpu" else None)
        for name, master in self.parts.masters(self.optimizer).items():
            master.copy_(start[name])

    @property
    def trained_size(self) -> int:
        """How many numbers train."""
        return sum(self.parts.shape(name).numel() for name in self.parts.parameters)

    # A step

    def begin(self, step: int) -> float:
        """Sets the rate of step `step`, counted from 0, and returns it."""
        rate = learning_rate(step, self.config.train)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def update(self, step: int) -> None:
        """Moves the weights by their gradients and the averages after them, for the step-th time, counted from 1."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.parts.parameters, step, self.parts.masters(self.optimizer))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A context in which the network holds the averaged weights, in the precision it trains in."""
        resharded(self.network)
        try:
            with self.ema.applied_to(self.parts.parameters):
                self.parts.refresh()
                with self.accelerator.autocast():
                    yield
                resharded(self.network)
        finally:
            self.parts.refresh()

    # To disk and back, all processes together

    def save(self, folder: Path, step: int, info: Mapping[str, Any]) -> None:
        """Writes the checkpoint of `step` into `folder`. Raises InputError, on every process, when the disk refuses it."""
        with together(self.accelerator):
            gathering = Gathering(self.accelerator, self.parts.sharded)
            tensors = storage.pack(self.parts, self.ema, self.optimizer)
            keep = self.config.output.keep
            storage.save(folder, step, tensors, info, gathering, keep, lambda path: self.write_model(path, gathering, small=True))

    def restore(self, folder: Path, check: Callable[[Path, dict[str, Any]], None]) -> dict[str, Any]:
        """Takes on the newest whole checkpoint of `folder` and returns its info, after `check` has raised nothing of its path and it."""
        found: Path | None = None
        with together(self.accelerator):
            if self.accelerator.is_main_process:
                found = storage.newest_whole(folder, self.accelerator.print)
        path = from_main(self.accelerator, found)
        tensors, info = storage.load(path, verify=False)
        check(path, info)
        storage.unpack(tensors, self.parts, self.ema, self.optimizer)
        self.parts.refresh()
        return info

    def write(self, folder: Path) -> Path:
        """Writes folder/model, the pipeline of the averaged weights, and returns its path."""
        with together(self.accelerator):
            self.write_model(folder, Gathering(self.accelerator, self.parts.sharded))
        return folder / "model"

    def write_model(self, folder: Path, gathering: Gathering, small: bool = False) -> None:
        """As `write`; with `small`, for checkpoints, what is frozen is linked where it can be, and of an adapter there is only folder/lora.

        Merged weights would be gigabytes for megabytes.
        """
        averages: dict[str, Any] = {name: self.parts.late(name, value) for name, value in self.ema.shadow.items()}
        if small and self.config.train.adapter:
            return export.write_adapter_of(folder, self.network, averages, self.config, gathering)
        network = resharded(self.network)
        export.write_pipeline(folder / "model", self.models, network, averages, self.config, self.lengths, gathering, link=small)
