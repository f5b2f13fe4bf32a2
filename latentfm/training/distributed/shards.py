"""The trained parameters as one process holds them: whole, or under FSDP2 its part of each (ZeRO's parts are in zero.py).

Everything that moves or averages weights works on plain tensors, the parts, and needs to know nothing of other processes. What leaves a
process, a checkpoint or a pipeline, is whole again: gathered one tensor at a time, so that no process ever holds all of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import parse_flag_from_env
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from latentfm.errors import InputError
from latentfm.training.distributed.processes import Late
from latentfm.training.optimizers.adamw import clip_gradient, masters_of


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether FSDP2 splits the weights over the processes, be it a single one. Raises InputError for its first version."""
    if not torch.distributed.is_initialized() or not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return False
    if getattr(accelerator.state, "fsdp_plugin", None) is None:
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()  # on CPUs Accelerate passes over what its configuration asks for
    if accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise InputError("FSDP version 1 is not supported; set fsdp_version: 2 in Accelerate's configuration, as in configs/accelerate")
    return True


def shard(network: nn.Module, accelerator: Accelerator) -> nn.Module:
    """`network` with its blocks and itself split over the processes by FSDP2, as Accelerate's configuration says.

    Blocks are gathered in bfloat16 under mixed precision; gradients are summed in float32. The inputs keep their precision: times in
    bfloat16 would collapse.
    """
    plugin = accelerator.state.fsdp_plugin
    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if accelerator.mixed_precision == "bf16" else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    plugin.cpu_ram_efficient_loading = False
    plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = transformer_auto_wrap_policy, network._no_split_modules
    return fsdp2_prepare_model(accelerator, network)


def is_split(network: nn.Module) -> bool:
    """Whether FSDP2 or ZeRO 3 has split weights of `network` over the processes, which then compute together or not at all."""
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in network.parameters())


def resharded(network: nn.Module) -> nn.Module:
    """`network` with all parameters split again: FSDP2 leaves the outermost ones whole after a forward pass without gradients."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return network


class Parts:
    """The trainable parameters of a network by name: `parameters` are they themselves or, where they are split, this process's parts.

    A part shares the memory of the parameter it belongs to. Make it after the network has its final precision and placement; `model` is
    what the forward passes of a training go through.
    """

    def __init__(self, network: nn.Module, accelerator: Accelerator | None = None, model: nn.Module | None = None):
        self.network, self.accelerator, self.model = resharded(network), accelerator, network if model is None else model
        self.whole_ones = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.parameters = {
            name: nn.Parameter(p.detach().to_local()) if isinstance(p, DTensor) else p for name, p in self.whole_ones.items()
        }
        self.sharded = any(isinstance(p, DTensor) for p in self.whole_ones.values())
        self.names = {id(p): name for name, p in self.parameters.items()}

    # A step

    @contextmanager
    def summing(self, last: bool) -> Iterator[None]:
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

    def backward(self, loss: Tensor) -> None:
        """The backward pass of `loss`, within `summing`."""
        self.accelerator.backward(loss)

    def gradient_norm(self, bound: float) -> Tensor:
        """The 2-norm of the step's whole gradient, a float32 scalar; the parts' gradients are scaled down to `bound` where it is longer."""
        for name, part in self.parameters.items():
            if part is not self.whole_ones[name]:
                gradient = self.whole_ones[name].grad
                part.grad, self.whole_ones[name].grad = None if gradient is None else gradient.to_local(), None
        return clip_gradient(self.parameters.values(), bound, self.sum_over_parts)

    def masters(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """The float32 weights by name that the parts are the rounding of, none where these are all there is."""
        return masters_of(optimizer, self.names)

    def refresh(self) -> None:
        """Has the network compute with what the parts hold now: somebody wrote into them. Nothing to do where they share its memory."""

    # Whole tensors and parts

    def shape(self, name: str) -> torch.Size:
        """The shape of a parameter, whole."""
        return self.whole_ones[name].shape

    def part(self, name: str, value: Tensor) -> Tensor:
        """This process's part of `value`, a whole tensor of the shape of parameter `name`."""
        parameter = self.whole_ones[name]
        if not isinstance(parameter, DTensor):
            return value
        placed = value.to(parameter.device)
        return distribute_tensor(placed, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local().clone()

    def is_part(self, name: str, value: Tensor) -> bool:
        """Whether `value` is this process's part of a tensor of the shape of parameter `name`: of it itself, or of a moment of it."""
        whole = self.whole_ones.get(name)  # None: something of the optimizer that belongs to no one parameter
        return isinstance(whole, DTensor) and value.shape == whole.to_local().shape

    def whole(self, name: str, part: Tensor) -> Tensor:
        """The whole tensor whose part, shaped like that of parameter `name`, each process gives. A collective where they are split."""
        if not self.is_part(name, part):
            return part
        parameter = self.whole_ones[name]
        placed = part.to(parameter.device)
        shape, stride = parameter.shape, parameter.stride()
        return DTensor.from_local(
            placed, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
        ).full_tensor()  # fmt: skip

    def late(self, name: str, part: Tensor) -> Late:
        """`whole`, when it is written."""
        shape = self.shape(name) if self.is_part(name, part) else part.shape
        return Late.of(part.dtype, shape, lambda: self.whole(name, part))

    def sum_over_parts(self, value: Tensor) -> Tensor:
        """The sum of a scalar over the processes that hold different parts, in place."""
        parameter = next(iter(self.whole_ones.values()))
        if isinstance(parameter, DTensor):
            for dimension, placement in enumerate(parameter.placements):
                if placement.is_shard():
                    torch.distributed.all_reduce(value, group=parameter.device_mesh.get_group(dimension))
        return value
