"""The trained parameters as one process holds them: whole, or under FSDP2 its rows of each.

Everything that moves or averages weights works on plain local tensors and needs to know nothing of other processes. A checkpoint is
written and read row by row as well (`checkpoint.storage`), so that no process ever holds or sends all of a model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import parse_flag_from_env
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor

from latentfm.errors import InputError
from latentfm.interchange.tensors import Stored
from latentfm.training.optimizers.adamw import clip_gradient, masters_of


def is_fsdp(accelerator: Accelerator) -> bool:
    """Whether FSDP2 is to split the weights over the processes, be it a single one. Raises InputError for its first version."""
    if not torch.distributed.is_initialized() or not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return False
    if getattr(accelerator.state, "fsdp_plugin", None) is None:
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()  # on CPUs Accelerate passes over what its configuration asks for
    if accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise InputError("FSDP version 1 is not supported; set fsdp_version: 2 in Accelerate's configuration, as in configs/accelerate")
    return True


def fully_sharded(network: nn.Module, accelerator: Accelerator) -> nn.Module:
    """`network` with its blocks and itself split over the processes by FSDP2, as Accelerate's configuration says.

    Blocks are gathered in bfloat16 under mixed precision; gradients are summed in float32. The inputs keep their precision: times in
    bfloat16 would collapse. With fsdp_offload_params what is split lies on the CPU, gradients and all that the optimizer has too.
    """
    plugin = accelerator.state.fsdp_plugin
    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if accelerator.mixed_precision == "bf16" else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        plugin.cpu_offload = CPUOffloadPolicy(pin_memory=accelerator.device.type == "cuda")  # without a GPU it cannot be pinned
    plugin.cpu_ram_efficient_loading = False
    plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = transformer_auto_wrap_policy, network._no_split_modules
    return fsdp2_prepare_model(accelerator, network)


def is_split(network: nn.Module) -> bool:
    """Whether FSDP2 has split weights of `network` over the processes, which then compute together or not at all."""
    return any(isinstance(parameter, DTensor) for parameter in network.parameters())


def resharded(network: nn.Module) -> nn.Module:
    """`network` with all parameters split again: FSDP2 leaves the outermost ones whole after a forward pass without gradients."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return network


class Chunk(NamedTuple):
    """What one process has of a tensor: the rows from number `first` on, or all of it, and the shape of all of it."""

    value: Tensor
    first: int
    shape: torch.Size


class LocalShards:
    """The trainable parameters of a network by name: `parameters` are they themselves or, where they are split, this process's rows.

    A shard shares the memory of the parameter it belongs to. Make it after the network has its final precision and placement; `model` is
    what the forward passes of a training go through.
    """

    def __init__(self, network: nn.Module, accelerator: Accelerator | None = None, model: nn.Module | None = None):
        self.accelerator, self.model = accelerator, network if model is None else model
        self.of_network = {name: p for name, p in resharded(network).named_parameters() if p.requires_grad}
        split = {name: p for name, p in self.of_network.items() if isinstance(p, DTensor)}
        self.parameters = self.of_network | {name: nn.Parameter(p.detach().to_local()) for name, p in split.items()}
        self.first_row = {name: p.__create_chunk_list__()[0].offsets[0] for name, p in split.items()}
        self.split = bool(self.first_row)
        self.names = {id(p): name for name, p in self.parameters.items()}

    # A step

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """A context for one forward and backward pass of a step; of all but the `last` the gradients stay in the processes."""
        if last:
            yield
        elif isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(False)
            try:
                yield
            finally:
                self.model.set_requires_gradient_sync(True)
        else:
            with self.accelerator.no_sync(self.model):
                yield

    def clip_gradient(self, max_norm: float) -> Tensor:
        """The 2-norm of the step's whole gradient, a float32 scalar on the device; a longer gradient is scaled down to `max_norm`."""
        for name in self.first_row:
            gradient, self.of_network[name].grad = self.of_network[name].grad, None
            self.parameters[name].grad = None if gradient is None else gradient.to_local()
        return clip_gradient(self.parameters.values(), max_norm, self.sum_over_shards)

    def sum_over_shards(self, value: Tensor) -> Tensor:
        """The sum of a scalar over the processes that hold different rows, on the device that computes."""
        if self.split:
            parameter, value = next(iter(self.of_network.values())), value.to(self.accelerator.device)
            for dimension, placement in enumerate(parameter.placements):
                if placement.is_shard():
                    torch.distributed.all_reduce(value, group=parameter.device_mesh.get_group(dimension))
        return value

    def masters(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """The float32 weights by name that the shards are the rounding of, none where these are all there is."""
        return masters_of(optimizer, self.names)

    # Whole tensors and shards

    def shape(self, name: str) -> torch.Size:
        """The shape of a parameter, whole."""
        return self.of_network[name].shape

    def local(self, name: str, whole: Tensor) -> Tensor:
        """This process's rows of `whole`, which has the shape of parameter `name`; it shares the memory where it can."""
        if name not in self.first_row:
            return whole
        own = self.parameters[name]
        return whole.narrow(0, self.first_row[name], len(own)).to(own.device) if len(own) else torch.empty_like(own, dtype=whole.dtype)

    def chunk(self, name: str, value: Tensor) -> Chunk:
        """A shard as a part of the whole, where `value` is shaped like that of parameter `name`; else `value`, of which each has all."""
        if name in self.first_row and value.shape == self.parameters[name].shape:
            return Chunk(value, self.first_row[name], self.shape(name))
        return Chunk(value, 0, value.shape)

    def read(self, name: str, stored: Stored) -> Tensor:
        """Inverse of `chunk`: this process's rows of a stored tensor, and no others, are read."""
        if name in self.first_row and stored.shape == self.shape(name):
            stored = stored.rows(self.first_row[name], len(self.parameters[name]))
        return stored.load()
