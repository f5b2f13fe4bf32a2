"""What a run trains: its network where it computes, the weights of it that train, their averages, their optimizer, and the way to disk."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from latentfm.config import RunConfig, Section
from latentfm.interchange.tensors import Held, Stored, Tensors
from latentfm.training.adapters import cast_weights, choose_trainable
from latentfm.training.checkpoint import export, storage
from latentfm.training.checkpoint.state import pack, unpack
from latentfm.training.distributed.processes import broadcast_from_main, raise_on_all_ranks
from latentfm.training.distributed.shards import Chunk, LocalShards, fully_sharded, is_fsdp, resharded
from latentfm.training.models import Models
from latentfm.training.optimizers.ema import EMA
from latentfm.training.optimizers.factory import learning_rate, make_optimizer


class Weights(ABC):
    """What of a `network` trains, its averages, its optimizer, and the way to disk, all processes together.

    A class of its own makes `network`, `shards`, `optimizer` and `ema`, and writes the model.
    """

    config: Section
    accelerator: Accelerator
    network: nn.Module
    shards: LocalShards
    optimizer: torch.optim.Optimizer
    ema: EMA
    size: int  # numbers in the network

    @property
    def trained_size(self) -> int:
        """How many numbers train."""
        return sum(self.shards.shape(name).numel() for name in self.shards.parameters)

    # A step

    def set_learning_rate(self, step: int) -> float:
        """Sets the rate of step `step`, counted from 0, and returns it."""
        rate = learning_rate(step, self.config.train)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def update(self, step: int) -> None:
        """Moves the weights by their gradients and the averages after them, for the step-th time, counted from 1."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.shards.parameters, step, self.shards.masters(self.optimizer))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A context in which the network holds the averaged weights, in the precision it trains in."""
        resharded(self.network)
        with self.ema.applied_to(self.shards.parameters):
            with self.accelerator.autocast():
                yield
            resharded(self.network)

    # To disk and back, all processes together

    def save(self, folder: Path, step: int, info: Mapping[str, Any]) -> None:
        """Writes the checkpoint of `step` into `folder`. Raises InputError, on every process, when the disk refuses it."""
        keep = self.config.output.keep
        storage.save(folder, step, self.chunks(), info, self.accelerator, keep, lambda path: self.write_model(path, path, True))

    def restore(self, folder: Path, check: Callable[[Path, dict[str, Any]], None]) -> dict[str, Any]:
        """Takes on the newest whole checkpoint of `folder` and returns its info, after `check` has raised nothing of its path and it."""
        found: Path | None = None
        with raise_on_all_ranks(self.accelerator):
            if self.accelerator.is_main_process:
                found = storage.newest_whole(folder, self.accelerator.print)
        path = broadcast_from_main(self.accelerator, found)
        tensors, info = storage.load(path, verify=False)
        check(path, info)
        self.take(tensors)
        return info

    def chunks(self) -> dict[str, Chunk]:
        """What this process has of a checkpoint's tensors."""
        return pack(self.shards, self.ema, self.optimizer)

    def take(self, tensors: Tensors) -> None:
        """Takes on what a checkpoint holds. Raises InputError when it is of other parameters."""
        unpack(tensors, self.shards, self.ema, self.optimizer)

    def write(self, folder: Path, checkpoint: Path) -> Path:
        """Writes folder/model, what the averaged weights make, which `checkpoint` holds too, and returns its path."""
        with raise_on_all_ranks(self.accelerator):
            if self.accelerator.is_main_process:
                self.write_model(folder, checkpoint)
        return folder / "model"

    @abstractmethod
    def write_model(self, folder: Path, checkpoint: Path, small: bool = False) -> None:
        """As `write`, by the main process; `small` for a checkpoint, which need not hold what lies elsewhere already."""


class TrainedWeights(Weights):
    """The network of `models` placed as the options and the launcher say: on the device, or split over the processes.

    lengths: the T5 lengths that a saved pipeline has null conditions for.
    """

    def __init__(self, models: Models, config: RunConfig, accelerator: Accelerator, lengths: list[int]):
        self.models, self.config, self.accelerator, self.lengths = models, config, accelerator, lengths
        options, network = config.train, models.network
        self.trained = choose_trainable(network, options, accelerator.device)
        self.size = sum(parameter.numel() for parameter in network.parameters())
        fsdp = is_fsdp(accelerator)
        if not fsdp:
            network.to(accelerator.device)
        self.network = network.train()
        network.set_gradient_checkpointing(options.gradient_checkpointing)
        exact = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}  # where averages and masters begin
        drawn = fsdp and config.model.preset and options.blocks  # frozen weights that are in no file
        self.frozen = {name: Held.of(p.cpu()) for name, p in network.named_parameters() if drawn and not p.requires_grad}
        cast_weights(network, options)
        if options.compile:
            network.compile_repeated_blocks()
        self.shards = LocalShards(network, accelerator, fully_sharded(network, accelerator) if fsdp else accelerator.prepare(network))
        self.optimizer = make_optimizer(self.shards.parameters, options)
        start = {name: self.shards.local(name, value) for name, value in exact.items()}
        self.ema = EMA(start, options.ema_decay, torch.device("cpu") if options.ema_device == "cpu" else None)
        for name, master in self.shards.masters(self.optimizer).items():
            master.copy_(start[name])

    def write_model(self, folder: Path, checkpoint: Path, small: bool = False) -> None:
        """As `write`, by the main process; with `small` what is frozen is linked where it can be, and an adapter is in folder/lora alone.

        Merged weights would be gigabytes for megabytes. Averages that are split are read from the checkpoint: nobody holds all of them.
        """
        averages: dict[str, Stored] = {name: Held.of(value) for name, value in self.ema.shadow.items()}
        if self.shards.split:
            stored = storage.tensors_of(checkpoint)
            averages = self.frozen | {name: stored[f"ema.{name}"] for name in averages}
        if small and self.config.train.adapter:
            export.write_adapter_of(folder, self.network, averages, self.config)
        else:
            export.write_pipeline(folder / "model", self.models, self.network, averages, self.config, self.lengths, link=small)
