"""Gradients, optimizer and, in stage 3, weights split over the processes by DeepSpeed's ZeRO (Rajbhandari et al. 2020).

DeepSpeed keeps float32 weights, a range of each on every process, beside the network's own, which are float32 or, in mixed precision,
bfloat16, and steps the run's optimizer on these ranges. Draws, checks, averages and checkpoints are the same as without it, so that a run
goes on from DeepSpeed to DDP or FSDP2 and back.
"""

import copy
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, parse_flag_from_env
from torch import Tensor, nn

from latentfm.config import TrainOptions
from latentfm.errors import InputError
from latentfm.models.memory import ZERO_BUCKET
from latentfm.training.distributed.shards import Parts
from latentfm.training.optimizers.registry import make_optimizer

ASKED = "ACCELERATE_USE_DEEPSPEED"  # what Accelerate's launcher sets
STAGES = (2, 3)
OPTIMIZERS = ("adamw", "lion")  # that look at single numbers, and keep nothing but tensors of them


def is_zero() -> bool:
    """Whether the launcher asks for DeepSpeed."""
    return parse_flag_from_env(ASKED)


@contextmanager
def not_by_accelerate() -> Iterator[None]:
    """A context in which Accelerate does not know of DeepSpeed: it would take over the step, and how the text encoders are loaded."""
    asked = os.environ.pop(ASKED, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[ASKED] = asked


def check_zero(options: TrainOptions, stage: int) -> None:
    """Raises InputError where DeepSpeed is missing, or its ZeRO `stage` does not go with the options. Imports nothing of it."""
    if find_spec("deepspeed") is None:
        raise InputError("ZeRO needs deepspeed, which is not installed: pip install 'latentfm[deepspeed]'")
    if options.optimizer not in OPTIMIZERS:
        raise InputError(f"train.optimizer={options.optimizer} looks at whole parameters, ZeRO splits them; take {' or '.join(OPTIMIZERS)}")
    if options.weights != "float32":
        raise InputError(
            f"train.weights={options.weights} does not go with ZeRO, which keeps float32 weights, split, and computes with bfloat16 "
            "copies of them where train.mixed_precision is bf16; leave train.weights out"
        )
    if options.adapter and options.adapter.base != "as_weights":
        raise InputError(f"train.adapter.base={options.adapter.base} does not go with ZeRO; take DDP, or leave it out")
    if options.compile and stage == 3:
        raise InputError("train.compile does not go with ZeRO 3, which gathers weights within the blocks; take ZeRO 2 or FSDP2")


def asked_of_zero() -> tuple[int, bool]:
    """(the stage, whether the optimizer is on the CPU) that the launcher asks for. Raises InputError for what is not supported."""
    if "LOCAL_RANK" not in os.environ:
        raise InputError("DeepSpeed needs a launcher, for one process too: accelerate launch --config_file ... -m latentfm train ...")
    told = launcher_configuration()
    zero = told["zero_optimization"]
    if zero.get("stage") not in STAGES:
        raise InputError(f"ZeRO stage {zero.get('stage')} is not supported; take zero_stage: 2 or 3 in Accelerate's configuration, or DDP")
    if "optimizer" in told or "scheduler" in told:
        raise InputError("DeepSpeed's configuration has an optimizer or scheduler; leave it out: train.optimizer and train.decay say which")
    places = [zero.get(f"offload_{what}", {}).get("device", "none") for what in ("optimizer", "param")]
    if "nvme" in places:
        raise InputError("DeepSpeed's offloading to nvme is not supported: averages and checkpoints need the weights in memory; take cpu")
    return zero["stage"], places[0] == "cpu"


def launcher_configuration() -> dict[str, Any]:
    """DeepSpeed's configuration as Accelerate's launcher was told it. Raises InputError for a file that cannot be read."""
    try:
        return copy.deepcopy(DeepSpeedPlugin(zero3_init_flag=False).deepspeed_config)
    except (OSError, ValueError) as error:
        raise InputError(f"DeepSpeed's configuration: {error}") from error


def split(network: nn.Module, accelerator: Accelerator, options: TrainOptions, micro_batch: int) -> tuple["ZeroParts", "ZeroOptimizer"]:
    """The parts of `network`, which DeepSpeed splits over the processes as Accelerate's configuration says, and their optimizer."""
    if accelerator.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it says at length that it found nothing else
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if accelerator.device.type == "cpu":  # gloo is there, and compiling this takes a minute, or for ever after one that was killed
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = configuration(options, micro_batch, accelerator.num_processes)
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    engine, *_ = deepspeed.initialize(model=network, optimizer=make_optimizer(trained, options), config=config, dist_init_required=False)
    parts = ZeroParts(network, accelerator, engine)
    return parts, ZeroOptimizer(parts, options)


def configuration(options: TrainOptions, micro_batch: int, processes: int) -> dict[str, Any]:
    """What DeepSpeed is given: what the launcher was told, and what the run's options say."""
    told, bound = launcher_configuration(), options.max_grad_norm
    return told | {
        "zero_optimization": {"reduce_bucket_size": ZERO_BUCKET} | told["zero_optimization"],
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": options.gradient_accumulation,
        "train_batch_size": micro_batch * options.gradient_accumulation * processes,
        "gradient_clipping": 0.0 if bound == float("inf") else bound,
        # a gradient that is not finite then moves nothing; the trainer has ended the run before
        "bf16": {"enabled": options.mixed_precision == "bf16", "check_grad_overflow": True},
        "fp16": {"enabled": False},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # PyTorch's fused AdamW steps on a CPU as well
        "steps_per_print": None,
    }


class Range(NamedTuple):
    """Which numbers of a parameter, flattened, this process moves, and where in one of DeepSpeed's flat float32 tensors they are."""

    start: int
    count: int
    group: int  # of the flat tensors
    offset: int


class ZeroParts(Parts):
    """The trainable parameters where DeepSpeed splits them: `parameters` are the float32 ranges of this process, [n], n from 0."""

    def __init__(self, network: nn.Module, accelerator: Accelerator, engine: Any):
        self.network, self.accelerator, self.model, self.zero = network, accelerator, engine, engine.optimizer
        self.whole_ones = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.stage, self.sharded = engine.zero_optimization_stage(), True
        self.flat = self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups
        groups = self.zero.fp16_groups if self.stage == 3 else self.zero.bit16_groups
        group_of = {id(p): group for group, members in enumerate(groups) for p in members}
        self.ranges = {name: self.range_of(p, group_of[id(p)]) for name, p in self.whole_ones.items()}
        self.parameters = {name: nn.Parameter(self.within(self.flat[r.group], r)) for name, r in self.ranges.items()}
        self.names = {id(p): name for name, p in self.parameters.items()}

    def range_of(self, parameter: nn.Parameter, group: int) -> Range:
        """This process's range of a parameter."""
        if self.stage == 3:  # equal shares of every parameter, the last ones filled up with padding
            _, offset, share = self.zero.grad_position[self.zero.get_param_id(parameter)]
            start = min(share * self.accelerator.process_index, parameter.ds_numel)
            return Range(start, min(share, parameter.ds_numel - start), group, offset)
        found = parameter._hp_mapping  # equal shares of all the parameters behind one another: of most it is all or nothing
        if found is None:
            return Range(0, 0, group, 0)
        return Range(found.lp_fragment_address.start, found.hp_fragment_address.numel, group, found.hp_fragment_address.start)

    @staticmethod
    def within(flat: Tensor, place: Range) -> Tensor:
        """The numbers of a range in a flat tensor, sharing its memory."""
        return flat.detach().narrow(0, place.offset, place.count)

    @contextmanager
    def summing(self, last: bool) -> Iterator[None]:
        self.model.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss, scale_wrt_gas=False)  # the loss is divided by the passes of a step already

    def gradient_norm(self, bound: float) -> Tensor:
        """As Parts'; DeepSpeed scales the gradients itself, in the optimizer's step, by the same bound."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        zero = self.zero
        norm = combine_grad_norm_groups(zero._get_norm_groups()) if self.stage == 3 else zero.scaled_global_norm()
        return torch.as_tensor(norm, dtype=torch.float32)

    def masters(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """The parts themselves, which are float32: the network's weights are their rounding."""
        return {name: part.detach() for name, part in self.parameters.items()}

    @torch.no_grad()
    def refresh(self) -> None:
        if self.stage != 3:
            self.zero.update_lp_params()
            return
        self.zero._partition_all_parameters()
        for group in range(len(self.flat)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        if self.zero.persistent_parameters:  # small ones, which are whole on every process
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    def shape(self, name: str) -> torch.Size:
        parameter = self.whole_ones[name]
        return getattr(parameter, "ds_shape", parameter.shape)

    def part(self, name: str, value: Tensor) -> Tensor:
        place = self.ranges[name]
        return value.reshape(-1).narrow(0, place.start, place.count).to(self.flat[place.group].device, torch.float32, copy=True)

    def is_part(self, name: str, value: Tensor) -> bool:
        return name in self.ranges and value.shape == (self.ranges[name].count,)

    def whole(self, name: str, part: Tensor) -> Tensor:
        if not self.is_part(name, part):
            return part
        place, shape = self.ranges[name], self.shape(name)
        bits = torch.zeros(shape.numel(), dtype=torch.int32, device=self.accelerator.device)  # whose sum with zeros is exact, -0 too
        bits.narrow(0, place.start, place.count).copy_(part.view(torch.int32))
        torch.distributed.all_reduce(bits)
        return bits.view(torch.float32).view(shape)


class ZeroOptimizer(torch.optim.Optimizer):
    """What the trainer sees of the optimizer that DeepSpeed steps: groups of parts, and a state by part that shares its memory."""

    def __init__(self, parts: ZeroParts, options: TrainOptions):
        self.parts, self.base = parts, parts.zero.optimizer
        shown = [{key: value for key, value in group.items() if key != "params"} for group in self.base.param_groups]
        members: list[list[nn.Parameter]] = [[] for _ in shown]
        for name, parameter in parts.parameters.items():
            members[self.group_of(parts.ranges[name])].append(parameter)
        super().__init__([group | {"params": own} for group, own in zip(shown, members, strict=True)], {"lr": options.learning_rate})
        for flat in parts.flat:
            self.base.state[flat] = {key: torch.zeros_like(flat) if like else value for key, value, like in beginning(options, flat)}
        for name, parameter in parts.parameters.items():
            place = parts.ranges[name]
            flat = parts.flat[place.group]
            self.state[parameter] = {
                key: parts.within(value, place) if value.shape == flat.shape else value for key, value in self.base.state[flat].items()
            }

    def group_of(self, place: Range) -> int:
        """Which of the optimizer's groups a range belongs to: stage 3 splits these again."""
        return self.parts.zero.sub_group_to_group_id[place.group] if self.parts.stage == 3 else place.group

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group, base in zip(self.param_groups, self.base.param_groups, strict=True):
            base["lr"] = group["lr"]
        self.parts.model.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: DeepSpeed has taken the gradients."""


def beginning(options: TrainOptions, flat: Tensor) -> list[tuple[str, Tensor, bool]]:
    """(key, value, whether it has a number for each weight) of what the run's optimizer keeps of a parameter before its first step: zeros.

    Learnt from one weight that it steps by nothing.
    """
    probe = nn.Parameter(torch.zeros(1, 1, device=flat.device))
    probe.grad = torch.zeros_like(probe)
    optimizer = make_optimizer({"probe": probe}, options)
    optimizer.step()
    return [(key, torch.zeros_like(value), value.shape == probe.shape) for key, value in optimizer.state[probe].items()]


def gathered(parameter: Tensor) -> Tensor:
    """A parameter that ZeRO 3 splits, whole. A collective."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()
