"""The trained parameters as one process holds them: whole, or under FSDP2 its part of each.

Everything that moves or averages weights works on plain tensors, the parts, and needs to know nothing of other processes. What leaves a
process, a checkpoint or a pipeline, is whole again: gathered one tensor at a time, so that no process ever holds all of it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import parse_flag_from_env
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from latentfm.errors import InputError
from latentfm.interchange.tensors import Stored, in_order, split, write_split

LARGEST_FILE = 5 * 10**9  # bytes, as diffusers splits its own


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether FSDP2 splits the weights over the processes. Raises InputError for its first version."""
    if accelerator.num_processes == 1 or not parse_flag_from_env("ACCELERATE_USE_FSDP"):
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


@contextmanager
def no_sync(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """A context whose backward passes add to the gradients of this process only: another pass of the same step follows."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        with accelerator.no_sync(model):
            yield


def resharded(network: nn.Module) -> nn.Module:
    """`network` with all parameters split again: FSDP2 leaves the outermost ones whole after a forward pass without gradients."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return network


@dataclass(frozen=True)
class Late(Stored):
    """A tensor that is made whole only when it is written, by `value`."""

    value: Callable[[], Tensor]

    @classmethod
    def of(cls, dtype: torch.dtype, shape: Iterable[int], value: Callable[[], Tensor]) -> "Late":
        return cls(dtype, tuple(shape), (), value)

    def blocks(self) -> Iterator[Tensor]:
        yield self.value().detach().cpu().contiguous().view(-1)


class Parts:
    """The trainable parameters of a network by name: `parameters` are they themselves or, where they are split, this process's parts.

    A part shares the memory of the parameter it belongs to. Make it after the network has its final precision and placement.
    """

    def __init__(self, network: nn.Module):
        self.whole_ones = {name: p for name, p in resharded(network).named_parameters() if p.requires_grad}
        self.parameters = {
            name: nn.Parameter(p.detach().to_local()) if isinstance(p, DTensor) else p for name, p in self.whole_ones.items()
        }
        self.sharded = any(isinstance(p, DTensor) for p in self.whole_ones.values())
        self.names = {id(p): name for name, p in self.parameters.items()}

    def take_gradients(self) -> None:
        """Hands the gradients of split parameters to their parts."""
        for name, part in self.parameters.items():
            if part is not self.whole_ones[name]:
                gradient = self.whole_ones[name].grad
                part.grad, self.whole_ones[name].grad = None if gradient is None else gradient.to_local(), None

    def part(self, name: str, value: Tensor) -> Tensor:
        """This process's part of `value`, a whole tensor of the shape of parameter `name`."""
        parameter = self.whole_ones[name]
        if not isinstance(parameter, DTensor):
            return value
        placed = value.to(parameter.device)
        return distribute_tensor(placed, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local().clone()

    def whole(self, name: str, part: Tensor) -> Tensor:
        """The whole tensor whose part, shaped like that of parameter `name`, each process gives. A collective where they are split."""
        parameter = self.whole_ones[name]
        if not isinstance(parameter, DTensor) or part.shape != parameter.to_local().shape:
            return part
        placed = part.to(parameter.device)
        shape, stride = parameter.shape, parameter.stride()
        return DTensor.from_local(
            placed, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
        ).full_tensor()  # fmt: skip

    def late(self, name: str, part: Tensor) -> Late:
        """`whole`, when it is written."""
        whole = self.whole_ones.get(name)  # None: something of the optimizer that belongs to no one parameter
        if not isinstance(whole, DTensor) or part.shape != whole.to_local().shape:
            return Late.of(part.dtype, part.shape, lambda: part)
        return Late.of(part.dtype, whole.shape, lambda: self.whole(name, part))

    def sum_over_parts(self, value: Tensor) -> Tensor:
        """The sum of a scalar over the processes that hold different parts, in place."""
        parameter = next(iter(self.whole_ones.values()))
        if isinstance(parameter, DTensor):
            for dimension, placement in enumerate(parameter.placements):
                if placement.is_shard():
                    torch.distributed.all_reduce(value, group=parameter.device_mesh.get_group(dimension))
        return value


class Gathering:
    """Writes whole tensors into files on the main process, while the others help to make them; called by all alike.

    A write that fails is told by `error` and not raised where others would be left waiting for their next tensor.
    """

    def __init__(self, accelerator: Accelerator, sharded: bool):
        self.main, self.sharded = accelerator.is_main_process, sharded
        self.error: Exception | None = None

    @contextmanager
    def careful(self) -> Iterator[None]:
        """A context, on the main process, whose failure is kept until the others need nothing more of it."""
        try:
            yield
        except Exception as error:
            self.error = self.error or error

    def raise_error(self) -> None:
        """Raises what failed, if anything did: at the end, when nobody waits."""
        if self.error is not None:
            raise self.error

    def write(self, folder: Path, stem: str, tensors: Mapping[str, Stored], dtype: torch.dtype | None = None) -> None:
        """Writes folder/STEM.safetensors (above LARGEST_FILE shards and an index), floating-point tensors in `dtype` where it is given."""
        files = split(dict(tensors), dtype, LARGEST_FILE)
        ordered = [file[name] for file in files for name in in_order(file, dtype)]  # as write_split goes
        waiting = iter([stored for stored in ordered if isinstance(stored, Late)])

        def counted(stored: Stored) -> Stored:
            if not isinstance(stored, Late):
                return stored
            return replace(stored, value=lambda: next(waiting).value())

        if self.main and self.error is None:
            with self.careful():
                counting = [{name: counted(stored) for name, stored in file.items()} for file in files]
                write_split(folder, stem, counting, {"format": "pt"}, dtype)
        for late in waiting if self.sharded else ():  # all of them on the other processes, on the main one what a failure left
            late.value()


def whole_of(value: Tensor) -> Tensor:
    """A tensor that may be split over the processes, whole. A collective where it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """A context after which every process raises InputError when the main one could not do its part."""
    problem: BaseException | None = None
    try:
        yield
    except (InputError, OSError) as error:
        problem = error
    told = from_main(accelerator, None if problem is None else str(problem))
    if accelerator.num_processes > 1 and told is not None:
        raise InputError(told) from problem
    if problem is not None:
        raise problem


def from_main(accelerator: Accelerator, value: Any) -> Any:
    """The main process's `value`, on every process."""
    if accelerator.num_processes == 1:
        return value
    told = [value]
    torch.distributed.broadcast_object_list(told, src=0)
    return told[0]
