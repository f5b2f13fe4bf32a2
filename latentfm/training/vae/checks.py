"""Everything about a VAE run's options that can be seen to be wrong before a weight or a picture is read."""

from dataclasses import replace
from pathlib import Path

from latentfm.data.buckets import Buckets, DataPlan, base_shape
from latentfm.data.cache.stat_cache import NOTHING_KEPT, StatCache
from latentfm.data.from_options import open_dataset
from latentfm.data.sources import Dataset
from latentfm.errors import InputError, Problems
from latentfm.files import check_can_be_written, expanded
from latentfm.interchange.weights import open_component
from latentfm.optimizers import OPTIMIZERS
from latentfm.planning.run import Parallelism, check_batch
from latentfm.training.checks import cautions as common_cautions
from latentfm.training.checks import check_output, check_packages, check_source, given_places
from latentfm.training.optimizers.factory import check_optimizer, without_blocks
from latentfm.training.vae.networks import LPIPS, SMALLEST
from latentfm.training.vae.options import VAEConfig, VAEDataOptions
from latentfm.training.vae.weights import settings_of, vae_folder

LARGEST_SIDE = 4096  # pixels


def check(config: VAEConfig, resume: bool = False, parallelism: Parallelism | None = None, sources: bool = True) -> None:
    """Raises one InputError with all that is wrong. sources: whether to see that the data's own places are there."""
    problems, processes = Problems(), (parallelism or Parallelism.here()).processes
    checks = [
        (check_output, config, resume, "model.vae"), (check_can_be_written, expanded(config.data.cache), "data.cache"),
        (check_batch, config.train, processes), (check_vae_optimizer, config), (check_packages, config), (data_plan, config),
    ]  # fmt: skip
    if config.model.vae:
        checks.append((lambda: open_component(vae_folder(config.model.vae), "vae"),))
    if config.loss.lpips:
        checks.append((LPIPS.check, expanded(config.loss.lpips)))
    for function, *arguments in checks:
        with problems.collected():
            function(*arguments)
    if config.validation.folder and config.data.folder:
        with problems.collected():
            check_apart(expanded(config.validation.folder).resolve(), expanded(config.data.folder).resolve())
    places = given_places(config) + ([("validation.folder", config.validation.folder)] if config.validation.folder else [])
    for option, place in places if sources else ():
        with problems.collected():
            check_source(option, place)
    problems.raise_all()


def check_vae_optimizer(config: VAEConfig) -> None:
    """As check_optimizer, for a network without blocks."""
    check_optimizer(config.train)
    if OPTIMIZERS[config.train.optimizer].matrices:
        raise without_blocks(config.train.optimizer)


def check_apart(judged: Path, trained: Path) -> None:
    """What is validated on is not trained on. Raises InputError for a folder that is, or lies in, the data's, read at any depth."""
    where = "is data.folder" if judged == trained else "lies within data.folder" if judged.is_relative_to(trained) else None
    if where:
        raise InputError(f"validation.folder {where}: it would be trained on too; move it out, or give validation.held_out instead")


def cautions(config: VAEConfig) -> list[str]:
    """What is allowed and is hardly meant, a line each."""
    found = common_cautions(config)
    if config.judged and config.adversarial.start >= config.train.steps:
        found.append(f"adversarial.start {config.adversarial.start:,} is beyond the last of {config.train.steps:,} steps: none has it")
    if not (config.validation.held_out or config.validation.folder):
        found.append("nothing is held out: the report has no figures and no pictures; give validation.held_out or validation.folder")
    return found


def data_plan(config: VAEConfig) -> tuple[tuple[int, int], DataPlan]:
    """(width and height of the base of the buckets, what becomes of the pictures). Raises InputError for sizes that do not fit."""
    settings = settings_of(config.model, None)
    if settings["sample_size"] is None and config.data.size is None:
        raise InputError("data.size is missing: a new autoencoder has no size of its own; set it, as in data.size=256")
    factor = 2 ** (len(settings["block_out_channels"]) - 1)
    size = base_shape(config.data.size, settings["sample_size"], factor, LARGEST_SIDE)
    buckets = Buckets.make(*size, factor, config.data.buckets, config.data.max_aspect, LARGEST_SIDE)
    least, layers = min(min(shape) for shape in buckets.shapes), config.adversarial.layers
    if config.judged and least < 3 * 2**layers:
        raise InputError(
            f"adversarial.layers {layers} leaves no patch of {least} pixels to judge: lower it, or take {3 * 2**layers} pixels or more"
        )
    if config.loss.lpips and least < SMALLEST:
        raise InputError(f"loss.lpips sees nothing of {least} pixels a side: leave it out, or take {SMALLEST} pixels or more")
    return size, DataPlan(buckets, factor, config.data.max_crop, config.train.batch_size, {})


def listed(options: VAEDataOptions, kept: StatCache = NOTHING_KEPT) -> Dataset:
    """The pictures of the options, whatever captions and masks there are beside them."""
    dataset = open_dataset(options, kept)
    return replace(dataset, samples=tuple(replace(sample, mask=None) for sample in dataset.samples))
