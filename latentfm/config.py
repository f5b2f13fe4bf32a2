"""A run's options: typed, validated, unknown names refused with the nearest suggestion, dotted overrides to any depth."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from platformdirs import user_cache_dir
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo

from latentfm import option_text
from latentfm.adapters import ADAPTERS
from latentfm.bounds import LAST_SEED, MOST_AT_ONCE, MOST_BATCH, MOST_GUIDANCE, MOST_STEPS, MOST_TOKENS, MOST_TRAINING_STEPS
from latentfm.errors import InputError, nearest
from latentfm.files import Refused, SpecialFile, expanded, read_text
from latentfm.optimizers import OPTIMIZERS
from latentfm.sampling import Sampler, Schedule, Solver
from latentfm.words import shown


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def as_meant(cls, given: Any, info: ValidationInfo) -> Any:
        """Names in other letters (AdamW) and whole numbers in another spelling (1e3) as the options have them."""
        return option_text.meant(given, cls.model_fields[info.field_name].annotation)


Config = TypeVar("Config", bound=Section)
SourceKind = Literal["folder", "parquet", "webdataset", "datasets"]  # each with its reader in data.sources.several


class ModelOptions(Section):
    """Where the network and its frozen encoders come from."""

    pipeline: str | None = Field(None, description="pipeline folder with VAE and text encoders; the bundled model if not given")
    preset: str | None = Field(None, description="train a new network of this size from scratch, instead of the pipeline's")
    text_encoders: Literal["float32", "bfloat16"] = Field("float32", description="their precision; bfloat16 halves the 19 GiB of T5-XXL")


class SourceOptions(Section):
    """One of data.sources: exactly one of path, url and dataset."""

    path: str | None = Field(None, description="a folder of pictures, parquet files, WebDataset shards, or a dataset saved to disk")
    url: str | None = Field(None, description="the same anywhere fsspec reaches, as in s3://bucket/part-{000..012}.parquet")
    dataset: str | None = Field(None, description="what datasets.load_dataset takes, as a name on the hub, or a dataset saved to disk")
    subset: str | None = Field(None, description="of a dataset: its configuration")
    split: str | None = Field(None, description="of a dataset: train if not given")
    revision: str | None = Field(None, description="of a dataset on the hub")
    streaming: bool = Field(False, description="read a dataset in order instead of downloading it whole")
    kind: SourceKind | None = Field(None, description="told by what is there if not given")
    name: str | None = Field(None, description="stands before the ids of its samples; the last part of the path if not given")
    image_column: str | None = None
    caption_columns: str | dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = Field(
        None, description="a name, or {name: weight}: one caption is drawn each time, by weight"
    )
    caption: str | None = Field(None, description="one caption for all its pictures, whatever captions it holds")
    mask_column: str | None = Field(None, description="pictures whose white counts in the loss")
    repeats: int = Field(1, ge=1, le=1_000_000, description="draws of each sample an epoch, each with randomness of its own")
    weight: float = Field(1.0, gt=0, le=1_000_000, description="times repeats: draws of each sample an epoch, in the mean")
    regularisation: bool = Field(False, description="a prior-preservation set: its loss counts data.prior_weight")

    @model_validator(mode="after")
    def one_place(self) -> "SourceOptions":
        if sum(bool(place) for place in (self.path, self.url, self.dataset)) != 1:
            raise ValueError("give exactly one of path, url and dataset")
        if self.dataset and self.kind not in (None, "datasets"):
            raise ValueError(f"a dataset is of the kind datasets, not {self.kind}; leave kind out, or give its path or url instead")
        if self.caption is not None and self.caption_columns:
            raise ValueError("caption stands for every caption; leave it or caption_columns out")
        if self.caption_columns == {}:
            raise ValueError("caption_columns names no column; leave it out or name one")
        return self

    @property
    def place(self) -> str:
        """Where it is: a path, an fsspec URL or the name of a dataset."""
        return self.path or self.url or self.dataset

    @property
    def title(self) -> str:
        """What the ids of its samples begin with."""
        return self.name or re.split(r"[/\\]", self.place.rstrip("/\\"))[-1]


class PairOptions(Section):
    """Pairs of noise and the latents that a teacher draws from it, its guidance folded in (reflow, Liu et al. 2022)."""

    prompts: str = Field(description="a file of prompts, one a line, or .csv or .jsonl; the pairs take them in turn")
    count: int = Field(10_000, ge=1, le=10_000_000, description="pairs; more of them go on where fewer ended")
    teacher: str | None = Field(None, description="its pipeline folder; model.pipeline if not given")
    steps: int = Field(28, ge=1, le=MOST_STEPS, description="of the teacher; its solver's error is learned too")
    guidance: float | None = Field(
        None, ge=0, le=MOST_GUIDANCE, description="that the student will have in its weights; the teacher's own if not given, or 3"
    )
    solver: Solver | None = Field(None, description="of the teacher; its scheduler's if not given")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="what the teacher computes in")
    at_once: int = Field(16, ge=1, le=MOST_AT_ONCE, description="pairs drawn together: memory against speed")
    seed: int = Field(0, ge=0, le=LAST_SEED, description="each pair's noise is a function of it and of the pair's number alone")


class PictureOptions(Section):
    """Which pictures there are, and the shapes they are brought to."""

    folder: str | None = Field(None, description="images with same-stem .txt captions, or with metadata.jsonl / metadata.csv")
    sources: list[SourceOptions] | None = Field(
        None, min_length=1,
        description="instead of folder: a list of {path | url | dataset, kind, name, image_column, caption_columns, caption, mask_column, "
        "repeats, weight, regularisation, subset, split, revision, streaming}",
    )  # fmt: skip
    size: int | tuple[int, int] | None = Field(None, description="pixels, or [width, height]; the model's own size if not given")
    buckets: int = Field(
        1, ge=1, le=1000,
        description="shapes of about size's area that pictures are brought to, each to the one that crops least; 1 is size alone",
    )
    max_aspect: float = Field(
        2.0, ge=1, le=1000, description="of the buckets: width to height of the widest, height to width of the tallest one"
    )
    max_crop: float = Field(1.0, gt=0, le=1, description="leave out, by name, pictures that would lose more than this share to the crop")
    flip: bool = Field(False, description="mirror half of the draws left to right")
    cache: str = Field(
        default_factory=lambda: user_cache_dir("latentfm", appauthor=False),
        description="folder of VAE moments and prompt embeddings, shared by all runs; the system's own for caches if not given",
    )
    workers: int | None = Field(
        None, ge=0, le=1024,
        description="processes that read batches ahead, for each training process; if not given 1, on a CPU with a cache 0",
    )  # fmt: skip

    def check_given_once(self) -> None:
        """Raises ValueError unless either folder or sources is given."""
        if self.folder is None and self.sources is None:
            raise ValueError("missing data.folder; set it in the configuration or as data.folder=VALUE, or list data.sources")
        if self.folder is not None and self.sources is not None:
            raise ValueError("data.folder and data.sources are both given; make the folder one of the sources, as in - path: pictures")


class DataOptions(PictureOptions):
    """The pictures and captions."""

    pairs: PairOptions | None = Field(
        None,
        description="instead of pictures, of `latentfm reflow`: {prompts, count, teacher, steps, guidance, solver, dtype, at_once, seed}",
    )
    caption: str | None = Field(
        None, description="one caption for every picture, as \"a photo of sks dog\", whatever captions there are; a source's own goes first"
    )
    prior_weight: float = Field(1.0, ge=0, allow_inf_nan=False, description="times the loss of the samples of regularisation sources")
    t5_lengths: dict[int, float] | None = Field(
        None, description="T5 tokens, padding included: share of the steps; the model's own length if not given"
    )
    cache_dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="of the VAE's moments in the cache")
    verify: bool = Field(True, description="check every cached byte at the start; what is damaged later is found when it is read")
    online: bool = Field(False, description="no cache: encode pictures and captions at every step, VAE and encoders staying on the device")

    def check_pairs(self) -> None:
        """Raises ValueError where options are given that only pictures have, for which pairs stand."""
        given = {"folder": self.folder, "sources": self.sources, "caption": self.caption, "flip": self.flip, "online": self.online,
                 "buckets": self.buckets > 1}  # fmt: skip
        if wrong := [f"data.{name}" for name, value in given.items() if value]:
            raise ValueError(f"data.pairs stand for pictures: leave them or {', '.join(wrong)} out")

    @field_validator("t5_lengths", mode="wrap")
    @classmethod
    def shares_are_positive(cls, given: Any, validated: Callable[[Any], Any]) -> dict[int, float] | None:
        value = validated(given)
        if value is not None and len(value) < len(given):
            raise ValueError("gives a length twice, in two spellings; leave one of them out")
        lengths_fit = value is None or (value and min(value) >= 1 and max(value) <= MOST_TOKENS)
        if not lengths_fit or not all(0 < share <= 1_000_000 for share in (value or {}).values()):
            raise ValueError(f"lengths must be from 1 to {MOST_TOKENS:,} and their shares above 0, got {shown(value, 80)}")
        return value


class TokenRouting(Section):
    """Which blocks pass over some of the image tokens while a network is trained (TREAD, Krause et al. 2025)."""

    keep: float = Field(0.5, gt=0, le=1, description="share of a sample's image tokens that the routed blocks work on")
    first: int = Field(2, description="first routed block; negative numbers count from the end, -1 is the last")
    last: int = Field(-3, description="last routed block; after it all tokens are together again")

    def blocks(self, layers: int) -> tuple[int, int]:
        """(first, last) routed block, both counted from 0, of a network of `layers` blocks. Raises InputError when they do not fit."""
        first, last = (block + layers if block < 0 else block for block in (self.first, self.last))
        if not 0 <= first <= last < layers:
            raise InputError(
                f"train.token_routing from block {self.first} to {self.last} does not fit this network of {layers} blocks; "
                f"choose 0 <= first <= last <= {layers - 1}, or negative numbers counted from the end"
            )
        return first, last


class AdapterOptions(Section):
    """Train a small addition to frozen weights instead of the weights (peft)."""

    kind: Literal[tuple(ADAPTERS)] = Field("lora", description="LoRA (Hu et al. 2021), or with magnitudes apart, DoRA (Liu et al. 2024)")
    rank: int = Field(16, ge=1, le=16_384)
    alpha: float | None = Field(None, gt=0, allow_inf_nan=False, description="the addition counts alpha / rank; rank if not given")
    targets: str | list[str] = Field(
        "attention", description="attention, feed_forward, modulation, all_linear, or endings of modules' names: to_q, [to_q, ff.net.2]"
    )
    dropout: float = Field(0.0, ge=0, lt=1)
    base: Literal["as_weights", "nf4", "int8"] = Field(
        "as_weights", description="of the frozen weights: as train.weights says, or 4 or 8 bits by bitsandbytes"
    )


class OptimisationOptions(Section):
    """How any network here is trained: the steps, the optimizer, the precision, the averages."""

    steps: int = Field(1000, ge=1, le=MOST_TRAINING_STEPS, description="optimizer steps")
    batch_size: int = Field(16, ge=1, le=MOST_BATCH, description="pictures an optimizer step, over all processes and accumulation")
    gradient_accumulation: int = Field(1, ge=1, le=MOST_BATCH, description="forward passes an optimizer step is split into")
    learning_rate: float = Field(1e-4, gt=0, allow_inf_nan=False)
    warmup_steps: int = Field(100, ge=0, description="linear warm-up")
    decay: Literal["constant", "linear", "cosine", "wsd"] = Field(
        "cosine", description="after the warm-up, down to 0 at the last step; wsd: over the last fifth of the steps, constant before it"
    )
    optimizer: Literal[tuple(OPTIMIZERS)] = Field(
        "adamw", description="muon for an MM-DiT of many tokens from scratch; prodigy finds its own rate: give it learning_rate 1; "
        "lion likes a tenth"
    )
    weight_decay: float = Field(0.01, ge=0, allow_inf_nan=False, description="of matrices; biases and norms have none")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    max_grad_norm: float = Field(1.0, gt=0)
    mixed_precision: Literal["auto", "no", "bf16"] = Field(
        "auto",
        description="how float32 weights compute; auto: in bf16 where the device has it (GPUs since Ampere, CPUs with AVX-512 or AMX), "
        "else in float32. bfloat16 weights compute in bfloat16 throughout, whatever stands here",
    )
    deterministic: bool = Field(
        False, description="kernels that repeat themselves to the bit on a GPU too, slower in attention's backward pass: a resumed run is "
        "then the uninterrupted one there as on a CPU"
    )
    ema_decay: float = Field(0.999, ge=0, lt=1)
    ema_device: Literal["same", "cpu"] = Field("same", description="where the averages are kept; cpu spares the GPU four bytes a weight")
    seed: int = Field(0, ge=0, le=LAST_SEED)

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def no_is_a_word(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads a bare no as False

    def check_batch_divides(self) -> None:
        """Raises ValueError unless a batch splits evenly over its passes."""
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"train.batch_size {self.batch_size} is not divisible by train.gradient_accumulation {self.gradient_accumulation}"
            )


class TrainOptions(OptimisationOptions):
    """The optimisation."""

    adapter: AdapterOptions | None = Field(
        None, description="train a LoRA or DoRA: {kind: lora, rank: 16, alpha: 16, targets: attention, dropout: 0, base: as_weights}"
    )
    blocks: str | None = Field(None, description="train these blocks only, as in 0-5,20-, or -4-: the last four; the others stay frozen")
    weights: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the trained network; bfloat16 halves the memory of weights and gradients, rounded stochastically"
    )
    master_weights: bool = Field(False, description="a float32 copy of bfloat16 weights that the optimizer moves, instead of rounding")
    moments: Literal["float32", "bfloat16"] = Field("float32", description="of the optimizer; bfloat16 goes with bfloat16 weights")
    gradient_checkpointing: float = Field(
        0.0, ge=0, le=1, description="share of the blocks recomputed in the backward pass, true for all: less memory, slower"
    )
    attention: str = Field("auto", description="who computes it: auto, native, flash, efficient, math, cudnn, xformers, flex")
    token_routing: TokenRouting | None = Field(
        None, description="train a new network faster: {keep: 0.5, first: 2, last: -3} lets half of the image tokens bypass these blocks"
    )
    compile: bool = Field(False, description="torch.compile each block: minutes to start, seconds when it was done before; faster steps")
    loss_weighting: Literal["constant", "beta_squared", "inverse_beta_squared", "cosmap", "min_snr"] = Field(
        "constant", description="w(t) of the loss, see latentfm.flow.objective; constant is the loss as it is derived"
    )
    t_density: Literal["logit_normal", "uniform", "mode", "cosmap"] = "logit_normal"
    t_density_options: dict[str, float] = Field(
        default_factory=dict, description="of t_density: {mean: 0, std: 1} of logit_normal, {scale: 1.29} of mode"
    )
    t_shift: float = Field(1.0, gt=0, allow_inf_nan=False, description="above 1 trains more at the noisy end (SD3 paper: 3 at 1024 px)")
    one_step: bool = Field(
        False, description="train at t = 0 alone, on data.pairs: a single Euler step from the noise to its latents (distillation)"
    )
    dropout: float = Field(0.1, ge=0, le=1, description="probability of training a sample without any condition")
    dropout_each: float = Field(0.0, ge=0, le=1, description="probability for each text encoder by itself (SD3: 0.464)")

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def true_is_all(cls, value: Any) -> Any:
        return float(value) if isinstance(value, bool) else value


class ValidationOptions(Section):
    """The loss on pictures that are not trained on, from the averaged weights, at fixed times with fixed noise."""

    held_out: int = Field(0, ge=0, description="pictures kept out of the training for it; 0: no validation")
    every: int = Field(200, ge=1, description="steps between validations; also before the first step and after the last")
    times: int = Field(8, ge=1, le=1000, description="values of t, the middles of as many equal shares of train.t_density")


class SampleOptions(Section):
    """Pictures drawn while training, from the averaged weights."""

    prompts: list[str] = Field(default_factory=list, max_length=MOST_AT_ONCE, description="none: some captions of the dataset")
    every: int = Field(200, ge=1, description="steps between pictures; they are also made before the first step and after the last")
    steps: int = Field(28, ge=1, le=MOST_STEPS)
    guidance: float = Field(3.0, ge=-MOST_GUIDANCE, le=MOST_GUIDANCE)
    solver: Solver | None = Field(
        None, description="Euler's method if unset; midpoint and heun cost twice, rk4 four times a step; euler_maruyama is an SDE's"
    )
    schedule: Schedule = Field("model", description="the times visited: model, the scheduler's own, or one of latentfm.flow.grids")
    shift: float | None = Field(None, gt=0, le=1000, description="of a schedule other than model; the scheduler's if not given")
    guidance_rule: Literal["cfg", "cfg_zero_star", "apg"] = "cfg"
    guidance_rescale: float = Field(0.0, ge=0, le=1, description="share by which contrast is brought back to the unguided one's")
    guidance_interval: tuple[float, float] | None = Field(None, description="first and last t at which there is guidance, 0 noise, 1 data")
    zero_init: int = Field(0, ge=0, description="first steps that stand still (CFG-Zero*)")
    noise: float = Field(1.0, ge=0, le=2, description="strength of an SDE's noise; 0 is the ODE")
    seed: int = Field(0, ge=0, le=LAST_SEED - MOST_AT_ONCE)

    @model_validator(mode="after")
    def sampler_fits(self) -> "SampleOptions":
        Sampler.of(self)
        return self


class OutputOptions(Section):
    """Where the run is written."""

    folder: str = Field(description="the run's folder: checkpoints, samples, logs, and at the end model/")
    checkpoint_every: int = Field(200, ge=1)
    keep: int = Field(2, ge=1, description="checkpoints kept, the newest; with validation the best one too")
    trackers: list[Literal["tensorboard", "wandb"]] = Field(
        default_factory=lambda: ["tensorboard"], description="besides metrics.jsonl and the run page"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of the saved network")


DENSITY_OPTIONS = {"logit_normal": ("mean", "std"), "uniform": (), "mode": ("scale",), "cosmap": ()}


class RunConfig(Section):
    """A whole run. Built by `load_config`."""

    model: ModelOptions = Field(default_factory=ModelOptions)
    data: DataOptions
    train: TrainOptions = Field(default_factory=TrainOptions)
    validation: ValidationOptions = Field(default_factory=ValidationOptions)
    sample: SampleOptions = Field(default_factory=SampleOptions)
    output: OutputOptions

    @model_validator(mode="after")
    def data_is_given_once_and_divides(self) -> "RunConfig":
        if self.data.pairs is not None:
            self.data.check_pairs()
        elif self.train.one_step:
            raise ValueError("train.one_step distils pairs of noise and latents: give data.pairs, or leave it out")
        else:
            self.data.check_given_once()
        self.train.check_batch_divides()
        return self

    @model_validator(mode="after")
    def density_has_these_options(self) -> "RunConfig":
        given, taken = self.train.t_density_options, DENSITY_OPTIONS[self.train.t_density]
        unknown = [name for name in given if name not in taken]
        if unknown:
            raise ValueError(
                f"train.t_density_options: {self.train.t_density} has no option {', '.join(unknown)}; it has {', '.join(taken) or 'none'}"
            )
        return self

    @model_validator(mode="after")
    def adapter_goes_with(self) -> "RunConfig":
        train = self.train
        if train.adapter and self.model.preset:
            raise ValueError("train.adapter adds to trained weights, model.preset makes new ones: leave one of them out")
        if train.adapter and train.token_routing:
            raise ValueError("train.token_routing is for a new network, train.adapter for a trained one: leave one of them out")
        if train.optimizer != "adamw":
            narrow = train.weights == "bfloat16" and not train.adapter
            for option, asked in (("weights=bfloat16", narrow), ("master_weights=true", train.master_weights)):
                if asked:
                    raise ValueError(f"train.{option} needs train.optimizer=adamw, which rounds stochastically, not {train.optimizer}")
        return self

    @model_validator(mode="after")
    def bfloat16_goes_together(self) -> "RunConfig":
        train = self.train
        for option, asked in (("master_weights=true", train.master_weights), ("moments=bfloat16", train.moments == "bfloat16")):
            if asked and train.weights == "float32":
                raise ValueError(f"train.{option} goes with train.weights=bfloat16; set that too, or leave it out")
        return self


def options_of(kind: type[Section]) -> dict[str, FieldInfo]:
    """Every option of a kind of run by its name, "section.key"."""
    sections = kind.model_fields.items()
    return {f"{section}.{key}": option for section, field in sections for key, option in field.annotation.model_fields.items()}


OPTIONS = options_of(RunConfig)


def default_of(name: str, options: Mapping[str, FieldInfo] = OPTIONS) -> Any:
    """The default of an option, None for one that must be given."""
    return None if options[name].is_required() else options[name].get_default(call_default_factory=True)


BY_STEPS = "a run is counted in train.steps: an epoch is pictures / train.batch_size of them, as `latentfm train --dry-run` tells"
# what people who come from other trainers look for first
ANSWERS = {
    **dict.fromkeys(("epochs", "max_epochs", "num_epochs", "num_train_epochs", "max_train_epochs"), f"no option for epochs: {BY_STEPS}"),
    "repeats": "no option data.repeats: it is a source's own, as data.sources.0.path=pics data.sources.0.repeats=10",
    "num_repeats": "no option for repeats of all data: a source has its own, as data.sources.0.path=pics data.sources.0.repeats=10",
    "max_train_steps": "the option is called train.steps",
    **dict.fromkeys(("lr", "learning_rates", "unet_lr"), "the option is called train.learning_rate"),
    **dict.fromkeys(("resolution", "image_size"), "the option is called data.size"),
    **dict.fromkeys(("network_dim", "lora_rank"), "the option is called train.adapter.rank"),
    "network_alpha": "the option is called train.adapter.alpha",
    **dict.fromkeys(("lr_scheduler", "lr_schedule"), "the option is called train.decay, and the beginning of it train.warmup_steps"),
    "train_batch_size": "the option is called train.batch_size",
}


def load_config(path: str | Path | None, overrides: list[str] | None = None, kind: type[Config] = RunConfig) -> Config:
    """The options, of this kind of run, of the YAML or JSON file `path` with `overrides` ("section.key=value", at any depth) on top.

    A text option's value is the text after the "=", whole; nothing there leaves it unset. Other values are YAML.
    Raises InputError in one line for a missing file, an unknown name (suggesting the nearest) or a value out of range.
    """
    data, seen = {} if path is None else read_options(expanded(path), kind), set()
    for override in overrides or []:
        name, equals, text = override.partition("=")
        if not (equals and all(name.strip().split(".")) and "." in name):
            known = {name.split(".")[1]: name for name in options_of(kind)}
            meant = f"did you mean {known[name.strip()]}={text}?" if name.strip() in known and equals else "for example train.steps=500"
            raise InputError(f"override '{shown(override, 120)}' should look like section.key=value, {shown(meant, 120)}")
        option_text.put(data, kind, override, again=name in seen)
        seen.add(name)
    try:
        config = kind.model_validate(data)
    except ValidationError as error:
        raise InputError(in_words(error, kind)) from None
    option_text.check_texts(config.model_dump(), "")
    return config


def read_options(path: Path, kind: type[Section] = RunConfig) -> dict[str, Any]:
    """What a file of options holds. Raises InputError in one line."""
    try:
        text = read_text(path, option_text.MOST_BYTES)
        data = option_text.parse(text, kind) or {}
    except SpecialFile as error:
        raise InputError(f"cannot read the configuration {shown(path)}: {'Is a directory' if path.is_dir() else error}") from None
    except Refused as error:
        raise InputError(f"{shown(path)} {shown(error, 300)}") from None
    except InputError as error:
        if isinstance(error.__cause__, OSError):
            raise InputError(f"cannot read the configuration {shown(path)}: {error.__cause__.strerror}") from error.__cause__
        raise
    if not isinstance(data, dict):
        raise InputError(f"{shown(path)} should hold sections ({', '.join(kind.model_fields)}), it holds {type(data).__name__}")
    return data


def name_of(place: tuple[str | int, ...], kind: Any) -> str:
    """The name of the option at a place that pydantic tells, without the types of a union that it tried there."""
    parts, tried = [], False
    for part in place:
        tried = len(option_text.choices(kind)) > 1 and not tried
        if not tried:
            parts.append(str(part))
            kind = option_text.within(kind, part)
    return ".".join(parts)


def in_words(error: ValidationError, kind: type[Section]) -> str:
    """What pydantic found wrong, in one line."""
    lines, missing, errors = [], [], error.errors(include_url=False)
    if unknown := [found["loc"] for found in errors if found["type"] == "extra_forbidden"]:
        answer = ANSWERS.get(str(unknown[0][-1]), "") if kind is RunConfig else ""
        return answer or option_text.unknown(kind, unknown[0])
    for found in errors:
        name = name_of(found["loc"], kind)
        if found["type"] == "model_type" and len(found["loc"]) == 1:
            known = ", ".join(kind.model_fields[name].annotation.model_fields)
            return f"section '{name}' should hold options ({known}), it holds {shown(repr(found['input']), 60)}"
        if found["type"] == "literal_error":
            known = re.findall("'([^']*)'", found["ctx"]["expected"])
            found["msg"] += nearest(str(found["input"]), known)
        if found["type"] == "missing" and isinstance(found["loc"][-1], str):  # not one of a pair
            missing.append({"data": "data.folder", "output": "output.folder"}.get(name, name))  # what such a section needs
        said = found["msg"].removeprefix("Value error, ")
        lines.append(f"{name}: {said} (got {shown(repr(found['input']), 80)})" if name else said)
    if missing:
        return f"missing {', '.join(missing)}; set it in the configuration or as {missing[0]}=VALUE"
    return shown("; ".join(lines), 1000)
