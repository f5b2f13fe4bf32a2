"""Everything about a run's options that can be seen to be wrong before a weight or a picture is read."""

import re
import shutil
from importlib.util import find_spec

from latentfm.config import ModelOptions, RunConfig
from latentfm.errors import InputError, Problems
from latentfm.files import check_can_be_written, existing_parent, expanded
from latentfm.interchange.weights import open_pipeline
from latentfm.models.backends import attention_backend
from latentfm.models.folder import PARTS, read_config
from latentfm.optimizers import OPTIMIZERS
from latentfm.planning.run import Parallelism, RunPlan, check_batch, plan_run
from latentfm.planning.training import checkpoint_bytes
from latentfm.training.checkpoint import storage
from latentfm.training.models import checked_folder
from latentfm.training.optimizers.factory import check_optimizer, missing
from latentfm.training.step import density
from latentfm.words import count, in_units, shown


def check(config: RunConfig, resume: bool = False, parallelism: Parallelism | None = None, sources: bool = True) -> RunPlan:
    """The plan of a run that can start. Reads configurations and the headers of weights; no weight, no picture, no network of a library.

    sources: whether to see that the data's own places are there, and the disk has room for a checkpoint, which a dry run looks at more
    closely. Raises one InputError with everything that is wrong: places that cannot be written, an output folder that holds a run already,
    packages that are not installed, a pipeline folder with parts missing or cut short, and what `plan_run` finds.
    """
    parallelism, problems, plan = parallelism or Parallelism.here(), Problems(), None
    checks = [
        (check_output, config, resume), (check_cache, config), (check_batch, config.train, parallelism.processes),
        (check_parallelism, config, parallelism), (check_optimizer, config.train), (check_packages, config),
        (attention_backend, config.train.attention), (density, config.train),
    ]  # fmt: skip
    for function, *arguments in checks:
        with problems.collected():
            function(*arguments)
    with problems.collected():
        check_parts(config.model)
        plan = plan_run(config, parallelism)
    for option, place in given_places(config) if sources else ():
        with problems.collected():
            check_source(option, place)
    if plan and sources:
        with problems.collected():
            check_room(plan)
    problems.raise_all()
    return plan


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


def check_output(config: RunConfig, resume: bool, start: str = "model.pipeline") -> None:
    """The output folder can be written, and holds a run if and only if one is to be resumed. start: the option that trains a result on."""
    out = expanded(config.output.folder)
    if out.exists() and not out.is_dir():
        raise InputError(f"output.folder {out} is a file; choose another")
    check_can_be_written(out, "output.folder")
    saved = storage.checkpoints(out / "checkpoints")
    if resume and not saved:
        way_out = "leave --resume out to start from the first step"
        if (out / "model").exists():
            way_out = f"to train its result on, start a new run with {start}={shown(out / 'model')} and another output.folder"
        raise InputError(f"nothing to resume: {shown(out)} holds no checkpoint; {way_out}")
    if (saved or (out / "model").exists()) and not resume:
        raise InputError(f"{out} already holds a run; go on with --resume, or choose another output.folder")


def check_room(plan: RunPlan) -> None:
    """A checkpoint fits the disk: without that the run would be lost at its first one."""
    out, needed = expanded(plan.config.output.folder), checkpoint_bytes(plan)
    if (free := shutil.disk_usage(existing_parent(out)).free) < needed:
        raise InputError(
            f"a checkpoint takes {in_units(needed)}, and {in_units(free)} are free at output.folder {shown(out)}; free some space, or "
            "choose another disk"
        )


def check_cache(config: RunConfig) -> None:
    """The cache can be written, or is there; a run without one needs none."""
    folder = expanded(config.data.cache)
    if not config.data.online and not folder.is_dir():
        check_can_be_written(folder, "data.cache")


def check_parallelism(config: RunConfig, parallelism: Parallelism) -> None:
    """The processes work together in a way that is supported."""
    if parallelism.splits and not OPTIMIZERS[optimizer := config.train.optimizer].split:
        others = " or ".join(name for name, kind in OPTIMIZERS.items() if kind.split)
        raise InputError(f"train.optimizer={optimizer} looks at whole parameters, FSDP splits them; take {others}")
    if parallelism.splits and config.train.adapter and config.train.adapter.base != "as_weights":
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
    if config.data.pairs is not None:
        return [("data.pairs.prompts", config.data.pairs.prompts)]
    paths = [(f"data.sources.{number}.path", source.path) for number, source in enumerate(config.data.sources)]
    return [(option, path) for option, path in paths if path and "://" not in path]


def check_source(option: str, place: str) -> None:
    """A local source is there; a pattern of several files is left to its reader."""
    path = expanded(place)
    if option in ("data.folder", "validation.folder") and path.is_file():
        raise InputError(f"{option}: {path} is a file, not a folder: give the folder that holds the pictures")
    if not path.exists() and not re.search(r"[*?{\[]", place):
        kind = "folder" if option in ("data.folder", "validation.folder") or not path.suffix else "file"
        raise InputError(f"{option}: there is no {kind} '{path}'; make it, or correct the option")


def check_parts(options: ModelOptions) -> None:
    """A pipeline folder has all that its model_index.json names, in safetensors that are whole and fit their configurations."""
    folder, own_network = checked_folder(options), options.preset is None
    quantised = own_network and "quantization_config" in read_config(folder / "transformer" / "config.json")
    weights = open_pipeline(folder, PARTS[1:] if quantised or not own_network else PARTS)
    texts = [name for name in weights.parts if name.startswith("text_encoder")]
    if not texts:
        raise InputError(f"{folder} has no text encoder; a caption could not be read. Give a pipeline folder with at least one")
    lost = [name for name in texts if name.replace("text_encoder", "tokenizer") not in weights.tokenizers]
    if lost:
        raise InputError(f"{folder} has {', '.join(lost)} without a tokenizer beside it; its copy is not complete")
