"""A run's plan: what its options and its pipeline folder come to, worked out once, before a weight or a picture is read. Needs no torch."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from latentfm.adapters import ADAPTERS
from latentfm.bundled import pipeline_folder
from latentfm.config import DataOptions, RunConfig, TrainOptions
from latentfm.data.buckets import Buckets, DataPlan, base_shape
from latentfm.errors import InputError, Problems
from latentfm.models.folder import network_settings
from latentfm.models.linears import BLOCKS, LORA_TARGETS, adapted_linears, ends_with, parse_blocks
from latentfm.planning.cost import Network, block_linears, block_parameters, parameters
from latentfm.planning.model import ModelSpec, read_model

if TYPE_CHECKING:
    from latentfm.data.loader import Routing


@dataclass(frozen=True)
class Parallelism:
    """How many processes a run has, on how many machines, and over how many of them a copy of the weights is split (1: each has one).

    offload: whether FSDP2 keeps what it splits on the CPU, but while it is used.
    """

    processes: int = 1
    machines: int = 1
    shards: int = 1
    offload: bool = False

    @property
    def splits(self) -> bool:
        """Whether FSDP2 has the weights, of one process too, instead of DDP."""
        return self.shards > 1 or self.offload

    @classmethod
    def here(cls, environment: Mapping[str, str] | None = None) -> "Parallelism":
        """What the launcher, torchrun or accelerate, has told this process in its environment."""
        told = os.environ if environment is None else environment
        processes = int(told.get("WORLD_SIZE", 1))
        machines = max(1, processes // int(told.get("LOCAL_WORLD_SIZE", processes)))
        fsdp, offload = (told.get(name, "").lower() in ("1", "true") for name in ("ACCELERATE_USE_FSDP", "FSDP_OFFLOAD_PARAMS"))
        replicas = int(told.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", 1))
        return cls(processes, machines, max(1, processes // replicas) if fsdp else 1, fsdp and offload)


@dataclass(frozen=True)
class RunPlan:
    """What a run's options come to: the one record that trainer, cache, data check, dry run and `latentfm plan` are built from."""

    config: RunConfig
    parallelism: Parallelism
    model: ModelSpec  # the network's sizes, and those of the frozen models around it
    size: tuple[int, int]  # width and height in pixels of the base of the buckets, and of sample pictures
    data: DataPlan
    trained: tuple[int, ...]  # how many numbers train in each block, and last in what is around the blocks
    adapted: tuple[str, ...]  # the linears that an adapter is added to

    @property
    def micro_batch(self) -> int:
        """Pictures in one forward pass of one process."""
        return self.config.train.batch_size // (self.parallelism.processes * self.config.train.gradient_accumulation)

    @property
    def beyond_attention(self) -> bool:
        """Whether an adapter lies on other linears than LORA_TARGETS."""
        return any(not any(ends_with(name, target) for target in LORA_TARGETS) for name in self.adapted)

    @property
    def text_tokens(self) -> tuple[int, float]:
        """(the most, the mean) text tokens of a step."""
        shares = self.data.t5_lengths
        mean = sum(length * share for length, share in shares.items()) / sum(shares.values())
        return self.model.clip_tokens + max(shares), self.model.clip_tokens + mean

    @property
    def routing(self) -> "Routing | None":
        """How image tokens are drawn that pass through all blocks; None where all do."""
        from latentfm.data.loader import Routing  # which imports torch

        options = self.config.train.token_routing
        return None if options is None else Routing(options.keep, self.model.network.patch)

    def routed(self, size: tuple[int, int]) -> tuple[int, int, int] | None:
        """First and last block that image tokens of a picture of `size` pixels bypass, and how many go in; None without routing."""
        options, factor = self.config.train.token_routing, self.model.decoder.factor
        if options is None:
            return None
        kept, _ = self.routing.counts(size[1] // factor, size[0] // factor)
        return (*options.blocks(self.model.network.layers), kept)


def plan_run(config: RunConfig, parallelism: Parallelism | None = None, model: ModelSpec | None = None) -> RunPlan:
    """The plan of a run. model: in the place of the one that config.model names.

    Reads configurations and the headers of weights. Raises one InputError with everything that is wrong: sizes that do not divide, a batch
    that does not split over the processes, blocks and adapter targets that do not exist, a preset that does not.
    """
    parallelism = parallelism or Parallelism.here()
    if model is None:
        folder = pipeline_folder(config.model.pipeline)
        model = read_model(folder, network_settings(folder, config.model.preset))
    problems = Problems()
    with problems.collected():
        check_batch(config.train, parallelism.processes)
    with problems.collected():
        size, data = plan_data(config.data, model, config.train.batch_size)
    with problems.collected():
        trained, adapted = trained_numbers(model.network, config.train)
    problems.raise_all()
    plan = RunPlan(config, parallelism, model, size, data, trained, adapted)
    check_routing(plan)
    return plan


def plan_data(options: DataOptions, model: ModelSpec, batch_size: int) -> tuple[tuple[int, int], DataPlan]:
    """(the base of the buckets, what becomes of pictures and captions). Raises InputError for sizes that do not fit the network."""
    multiple, largest = model.multiple, model.network.table * model.multiple
    size = base_shape(options.size, model.side, multiple, largest)
    buckets = Buckets.make(*size, multiple, options.buckets, options.max_aspect, largest)
    lengths = options.t5_lengths or {model.t5_tokens: 1.0}
    return size, DataPlan(buckets, model.decoder.factor, options.max_crop, batch_size, lengths)


def trained_numbers(network: Network, options: TrainOptions) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """(how many numbers train in each block, and last in what is around them; the linears that an adapter is added to).

    Raises InputError for blocks or linears that the network has not.
    """
    blocks = range(network.layers)
    chosen = blocks if options.blocks is None else parse_blocks(options.blocks, network.layers)
    if options.adapter is None:
        each = [block_parameters(network, block) for block in blocks]
        around = sum(parameters(network).values()) - sum(each) if options.blocks is None else 0
        return (*(number if block in chosen else 0 for block, number in enumerate(each)), around), ()
    linears = {f"{BLOCKS}{i}.{name}": sizes for i in blocks for name, sizes in block_linears(network, i).items()}
    adapted = adapted_linears(linears, options.adapter.targets, chosen)
    each = [0] * network.layers
    for name in adapted:
        inputs, outputs = linears[name]
        magnitudes = outputs if ADAPTERS[options.adapter.kind].magnitudes else 0
        each[int(name.split(".")[1])] += options.adapter.rank * (inputs + outputs) + magnitudes
    return (*each, 0), tuple(adapted)


def check_batch(options: TrainOptions, processes: int) -> None:
    """Raises InputError for a batch that does not split evenly over processes and accumulation."""
    parts = processes * options.gradient_accumulation
    if options.batch_size % parts:
        near = [size for size in (options.batch_size // parts * parts, (options.batch_size // parts + 1) * parts) if size]
        raise InputError(
            f"train.batch_size {options.batch_size} does not divide by {processes} processes times gradient_accumulation "
            f"{options.gradient_accumulation}; {' or '.join(map(str, near))} does"
        )


def check_routing(plan: RunPlan) -> None:
    """Raises InputError where token routing leaves no tokens, or all of them, of some bucket's pictures, or names blocks there are not."""
    options = plan.config.train.token_routing
    for size in plan.data.buckets.shapes if options is not None else ():
        kept, tokens = plan.routed(size)[2], plan.model.image_tokens(size)
        if kept == 0 or (kept == tokens and options.keep < 1):
            raise InputError(
                f"train.token_routing.keep {options.keep} of a picture's {tokens} image tokens is {kept} of them; "
                f"choose a keep from 1/{tokens} to {tokens - 1}/{tokens}, a larger data.size, or leave token_routing out"
            )


def with_precision(config: RunConfig, bfloat16: bool) -> RunConfig:
    """`config` with a precision in the place of train.mixed_precision=auto: bf16 if the device has it."""
    return changed(config, "train.mixed_precision", "bf16" if bfloat16 else "no") if config.train.mixed_precision == "auto" else config


def changed(config: RunConfig, name: str, value: Any) -> RunConfig:
    """`config` with another value of the option "section.key"."""
    section, key = name.split(".")
    return config.model_copy(update={section: getattr(config, section).model_copy(update={key: value})})
