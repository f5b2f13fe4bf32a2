"""What a run's options come to, and everything about them that can be seen to be wrong before a weight or a picture is read."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from latentfm.bundled import bundled_model
from latentfm.config import RunConfig
from latentfm.data.buckets import Buckets, base_shape
from latentfm.data.loader import Routing
from latentfm.errors import InputError, nearest
from latentfm.files import expanded
from latentfm.interchange.weights import empty, open_pipeline
from latentfm.models.backends import attention_backend
from latentfm.models.cost import LORA_TARGETS
from latentfm.models.described import Model, read_model
from latentfm.models.folder import PARTS, check_folder, read_config, read_info, t5_length
from latentfm.models.memory import Shard
from latentfm.models.mmdit import MMDiT
from latentfm.models.presets import PRESETS
from latentfm.optimizers import OPTIMIZERS
from latentfm.training.adapters import adapted_modules, ends_with, parse_blocks
from latentfm.training.checkpoint import storage
from latentfm.training.optimizers.factory import check_optimizer, missing
from latentfm.training.step import density, routed_blocks
from latentfm.words import count, shown


@dataclass(frozen=True)
class Launch:
    """How many processes a run has, on how many machines, and over how many of them a copy of the weights is split (1: each has one).

    offload: whether what is split lies on the CPU.
    """

    processes: int = 1
    machines: int = 1
    shard: int = 1
    offload: bool = False

    @property
    def sharding(self) -> Shard:
        """What is split over the processes, and where it lies."""
        return "offload" if self.offload else "full" if self.shard > 1 else "none"

    @classmethod
    def here(cls, environment: Mapping[str, str] | None = None) -> "Launch":
        """What the launcher, torchrun or accelerate, has told this process in its environment."""
        told = os.environ if environment is None else environment
        processes = int(told.get("WORLD_SIZE", 1))
        machines = max(1, processes // int(told.get("LOCAL_WORLD_SIZE", processes)))
        fsdp, offload = (told.get(name, "").lower() in ("1", "true") for name in ("ACCELERATE_USE_FSDP", "FSDP_OFFLOAD_PARAMS"))
        replicas = int(told.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", 1))
        return cls(processes, machines, max(1, processes // replicas) if fsdp else 1, fsdp and offload)


@dataclass(frozen=True)
class Setup:
    """What a run's options come to."""

    config: RunConfig
    launch: Launch
    folder: Path  # of the pipeline
    model: Model  # the network's cost, and the frozen models around it
    trained: tuple[int, ...]  # how many numbers train in each block, and last in what is around the blocks
    adapted: tuple[str, ...]  # the linears that an adapter is added to
    buckets: Buckets
    lengths: dict[int, float]  # T5 tokens -> share of the steps

    @property
    def encoders(self) -> int:
        """Text encoders there are, which label dropout drops."""
        return len(self.model.encoders)

    @property
    def micro_batch(self) -> int:
        """Pictures a process in one forward pass."""
        return self.config.train.batch_size // (self.launch.processes * self.config.train.gradient_accumulation)

    @property
    def beyond_attention(self) -> bool:
        """Whether an adapter lies on other linears than cost.LORA_TARGETS."""
        return any(not any(ends_with(name, target) for target in LORA_TARGETS) for name in self.adapted)

    def routed(self, width: int, height: int) -> tuple[int, int, int] | None:
        """First and last block that image tokens of a picture of width x height pixels bypass, and how many go in; None without routing."""
        options = self.config.train.token_routing
        if options is None:
            return None
        factor, patch = self.model.decoder.factor, self.model.network.patch
        kept, _ = Routing(options.keep, patch).counts(height // factor, width // factor)
        return (*routed_blocks(options, self.model.network.layers), kept)


@dataclass
class Found:
    """What is wrong, as it is found."""

    messages: list[str] = field(default_factory=list)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """A context whose InputError is noted instead of raised."""
        try:
            yield
        except InputError as error:
            if str(error) not in self.messages:
                self.messages.append(str(error))

    def raised(self) -> None:
        """Raises InputError with all there is, numbered where there are several."""
        if len(self.messages) == 1:
            raise InputError(self.messages[0])
        if self.messages:
            each = "; ".join(f"({number}) {message}" for number, message in enumerate(self.messages, start=1))
            raise InputError(f"{len(self.messages)} things are wrong: {each}")


def check(config: RunConfig, resume: bool = False, launch: Launch | None = None) -> Setup:
    """What a run's options come to. Reads configurations and the headers of weights; no weight, no picture, no network of a library.

    Raises one InputError with everything that is wrong: places that cannot be written, an output folder that holds a run already, a
    batch that does not split over the processes, packages that are not installed, a pipeline folder with parts missing or cut short,
    sizes that do not divide, blocks and adapter targets that do not exist.
    """
    found = Found()
    setup = examined(config, resume, launch or Launch.here(), found)
    for place in given_places(config):
        with found.noting():
            check_data(*place)
    found.raised()
    assert setup is not None
    return setup


def examined(config: RunConfig, resume: bool, launch: Launch, found: Found) -> Setup | None:
    """As `check`, but for the data, and what is wrong goes into `found`; None when there can be no setup."""
    with found.noting():
        check_output(config, resume)
    with found.noting():
        if not config.data.online:
            check_place(expanded(config.data.cache), "data.cache", may_be_complete=True)
    with found.noting():
        check_batch(config, launch.processes)
    with found.noting():
        check_launch(config, launch)
    with found.noting():
        check_optimizer(config.train)
    with found.noting():
        check_packages(config)
    with found.noting():
        attention_backend(config.train.attention)
    with found.noting():
        density(config.train)
    folder = expanded(config.model.pipeline) if config.model.pipeline else bundled_model()
    with found.noting():
        check_parts(folder, config.model.preset is None)
        return set_up(config, launch, folder, found)
    return None


def set_up(config: RunConfig, launch: Launch, folder: Path, found: Found) -> Setup | None:
    """The setup of a pipeline folder that is whole; None when something of it could not be made, which is in `found`."""
    settings = network_config(folder, config.model.preset)
    model = read_model(folder, settings)
    network, buckets, chosen = empty("transformer", settings), None, None
    with found.noting():
        buckets = make_buckets(config, model)
    with found.noting():
        chosen = trained_numbers(network, config)
    if buckets is None or chosen is None:
        return None
    lengths = config.data.t5_lengths or {t5_length(read_info(folder)): 1.0}
    setup = Setup(config, launch, folder, model, *chosen, buckets, lengths)
    with found.noting():
        check_routing(setup)
    return setup


def trained_numbers(network: MMDiT, config: RunConfig) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """(how many numbers train in each block, and last in what is around them; the linears that an adapter is added to).

    Raises InputError for blocks or modules that the network has not.
    """
    train, blocks = config.train, network.transformer_blocks
    chosen = range(len(blocks)) if train.blocks is None else parse_blocks(train.blocks, len(blocks))
    if train.adapter is None:
        each = [sum(p.numel() for p in block.parameters()) for block in blocks]
        around = sum(p.numel() for p in network.parameters()) - sum(each) if train.blocks is None else 0
        return (*(number if i in chosen else 0 for i, number in enumerate(each)), around), ()
    adapted = adapted_modules(network, train.adapter.targets, chosen)
    each = [0] * len(blocks)
    for name in adapted:
        linear = network.get_submodule(name)
        magnitudes = linear.out_features if train.adapter.kind == "dora" else 0
        each[int(name.split(".")[1])] += train.adapter.rank * (linear.in_features + linear.out_features) + magnitudes
    return (*each, 0), tuple(adapted)


def network_config(folder: Path, preset: str | None) -> dict[str, Any]:
    """The arguments of the network to train: the pipeline's own, or a preset's with the widths of the pipeline's VAE and encoders."""
    if preset is None:
        return read_config(folder / "transformer" / "config.json")
    if preset not in PRESETS:
        raise InputError(f"no preset '{preset}'{nearest(preset, PRESETS)}; there are {', '.join(PRESETS)}")
    encoders = [folder / f"text_encoder{suffix}" / "config.json" for suffix in ("", "_2", "_3")]
    clips = [read_config(path)["projection_dim"] for path in encoders[:2] if path.is_file()]
    channels = read_config(folder / "vae" / "config.json")["latent_channels"]
    changes = {"in_channels": channels, "out_channels": channels}
    changes |= {"pooled_projection_dim": sum(clips)} if clips else {}
    changes |= {"joint_attention_dim": read_config(encoders[2])["d_model"]} if encoders[2].is_file() else {}
    return PRESETS[preset] | changes


def make_buckets(config: RunConfig, model: Model) -> Buckets:
    """The shapes that pictures are brought to. Raises InputError for a size that does not divide or is too large for the network."""
    options, multiple = config.data, model.decoder.factor * model.network.patch
    largest = model.network.table * multiple
    width, height = base_shape(options.size, model.side, multiple, largest)
    return Buckets.make(width, height, multiple, options.buckets, options.max_aspect, largest)


def cautions(config: RunConfig) -> list[str]:
    """What is allowed and is hardly meant, a line each."""
    train, found = config.train, []
    if train.warmup_steps >= train.steps:
        share = train.steps / train.warmup_steps
        found.append(
            f"the warm-up, train.warmup_steps {train.warmup_steps:,}, is as long as the run of {count(train.steps, 'step')} or longer: the "
            f"rate climbs to {share:.0%} of train.learning_rate and the run ends; train.warmup_steps={train.steps // 10} is a tenth"
        )
    return found


# the checks, each raising InputError


def check_output(config: RunConfig, resume: bool) -> None:
    """The output folder can be written, and holds a run if and only if one is to be resumed."""
    out = expanded(config.output.folder)
    if out.exists() and not out.is_dir():
        raise InputError(f"output.folder {out} is a file; choose another")
    check_place(out, "output.folder")
    saved = storage.checkpoints(out / "checkpoints")
    if resume and not saved:
        way_out = "leave --resume out to start from the first step"
        if (out / "model").exists():
            way_out = f"to train its result on, start a new run with model.pipeline={shown(out / 'model')} and another output.folder"
        raise InputError(f"nothing to resume: {shown(out)} holds no checkpoint; {way_out}")
    if (saved or (out / "model").exists()) and not resume:
        raise InputError(f"{out} already holds a run; go on with --resume, or choose another output.folder")


def check_place(folder: Path, option: str, may_be_complete: bool = False) -> None:
    """A folder exists or can be made, and can be written; one that is there and `may_be_complete` need not be."""
    existing = existing_parent(folder)
    if not existing.is_dir():
        raise InputError(f"{option} {folder}: {existing} is a file, not a folder; choose another")
    if not os.access(existing, os.W_OK | os.X_OK) and not (may_be_complete and existing == folder.absolute()):
        raise InputError(f"{option} {folder}: no permission to write in {existing}; choose another")


def existing_parent(place: Path) -> Path:
    """The path itself, or the nearest one above it that is there."""
    return next(path for path in (place.absolute(), *place.absolute().parents) if path.exists() or path.parent == path)


def check_batch(config: RunConfig, processes: int) -> None:
    """The batch splits evenly over processes and accumulation."""
    train = config.train
    parts = processes * train.gradient_accumulation
    if train.batch_size % parts:
        near = [size for size in (train.batch_size // parts * parts, (train.batch_size // parts + 1) * parts) if size]
        raise InputError(
            f"train.batch_size {train.batch_size} does not divide by {processes} processes times gradient_accumulation "
            f"{train.gradient_accumulation}; {' or '.join(map(str, near))} does"
        )


def check_launch(config: RunConfig, launch: Launch) -> None:
    """The processes work together in a way that is supported."""
    if launch.sharding != "none" and not OPTIMIZERS[optimizer := config.train.optimizer].split:
        others = " or ".join(name for name, kind in OPTIMIZERS.items() if kind.split)
        raise InputError(f"train.optimizer={optimizer} looks at whole parameters, FSDP splits them; take {others}")
    if launch.sharding != "none" and config.train.adapter and config.train.adapter.base != "as_weights":
        raise InputError(f"train.adapter.base={config.train.adapter.base} is not split over processes by FSDP; take DDP, or leave it out")


def check_packages(config: RunConfig) -> None:
    """What quantises an adapter's base, and the trackers, are installed."""
    adapter = config.train.adapter
    if adapter is not None and adapter.base != "as_weights" and find_spec("bitsandbytes") is None:
        raise missing("bitsandbytes", f"train.adapter.base={adapter.base}")
    for tracker in config.output.trackers:
        if find_spec(tracker) is None:
            raise InputError(f"output.trackers={tracker} needs {tracker}, which is not installed: pip install {tracker}")


def given_places(config: RunConfig) -> list[tuple[str, str]]:
    """(option, place) of the local sources."""
    if config.data.folder is not None:
        return [("data.folder", config.data.folder)]
    paths = [(f"data.sources.{number}.path", source.path) for number, source in enumerate(config.data.sources)]
    return [(option, path) for option, path in paths if path and "://" not in path]


def check_data(option: str, place: str) -> None:
    """A local source is there; a pattern of several files is left to its reader."""
    path = expanded(place)
    if option == "data.folder" and path.is_file():
        raise InputError(f"{option}: {path} is a file, not a folder: give the folder that holds the pictures")
    if not path.exists() and not re.search(r"[*?{\[]", place):
        kind = "folder" if option == "data.folder" or not path.suffix else "file"
        raise InputError(f"{option}: there is no {kind} '{path}'; make it, or correct the option")


def check_parts(folder: Path, own_network: bool) -> None:
    """A pipeline folder has all that its model_index.json names, in safetensors that are whole and fit their configurations."""
    check_folder(folder, transformer=own_network)
    if not (folder / "vae" / "config.json").is_file():
        raise InputError(f"{folder} has no vae/config.json; it is not an SD3-style pipeline, or its copy is not complete")
    quantised = own_network and "quantization_config" in read_config(folder / "transformer" / "config.json")
    weights = open_pipeline(folder, PARTS[1:] if quantised or not own_network else PARTS)
    texts = [name for name in weights.parts if name.startswith("text_encoder")]
    if not texts:
        raise InputError(f"{folder} has no text encoder; a caption could not be read. Give a pipeline folder with at least one")
    lost = [name for name in texts if name.replace("text_encoder", "tokenizer") not in weights.tokenizers]
    if lost:
        raise InputError(f"{folder} has {', '.join(lost)} without a tokenizer beside it; its copy is not complete")


def check_routing(setup: Setup) -> None:
    """Token routing names blocks there are, and leaves some tokens, and not all, of every bucket's pictures."""
    options = setup.config.train.token_routing
    for width, height in setup.buckets.shapes:
        routed = setup.routed(width, height)
        if routed is None:
            return
        tokens = setup.model.image_tokens((width, height))
        if routed[2] == 0 or (routed[2] == tokens and options.keep < 1):
            raise InputError(
                f"train.token_routing.keep {options.keep} of a picture's {tokens} image tokens is {routed[2]} of them; "
                f"choose a keep from 1/{tokens} to {tokens - 1}/{tokens}, a larger data.size, or leave token_routing out"
            )
