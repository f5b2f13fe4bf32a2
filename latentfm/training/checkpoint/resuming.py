"""Whether a run that was stopped, or is finished, goes on with these options: what may change, what may not, and the way out."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from latentfm.config import OPTIONS, Section, SourceOptions, default_of, options_of
from latentfm.errors import InputError
from latentfm.files import expanded, read_json
from latentfm.models.folder import read_info
from latentfm.training.checkpoint import storage
from latentfm.training.optimizers.factory import learning_rate
from latentfm.training.records.json_lines import number
from latentfm.words import shown

# options that may change when a run is resumed: they do not touch the course of the training. Where the pictures and the models lie is
# among them: these are known by their content, and another content is refused
FREE_ON_RESUME = {
    "output", "sample", "validation.every", "validation.times", "data.folder", "data.workers", "data.cache", "data.verify",
    "model.pipeline", "model.vae", "loss.lpips", "validation.folder", "validation.pictures", "train.compile",
    "train.gradient_checkpointing", "train.gradient_accumulation", "train.attention", "train.ema_device",
    "train.deterministic",
}  # fmt: skip
COURSE = ("train.steps was ", "train.decay was ")
PLACES = ("path", "url", "dataset")  # of a source
LONGEST = 120  # characters of a value


def differences(before: Mapping[str, Any], now: Mapping[str, Any], options: Mapping[str, FieldInfo] = OPTIONS) -> list[str]:
    """What of the `options` that matter differs, as "section.key was X, is Y"; an option that did not exist had its default."""
    found = []
    for section, values in now.items():
        given = before.get(section)
        for key, value in values.items():
            name = f"{section}.{key}"
            was = (given if isinstance(given, dict) else {}).get(key, in_json(default_of(name, options)))
            same = was == value or (name == "data.sources" and without_places(was) == without_places(value))
            if not ({section, name} & FREE_ON_RESUME or same):
                found.append(f"{name} was {shown(repr(was), LONGEST)}, is {shown(repr(value), LONGEST)}")
    return found


def in_json(default: Any) -> Any:
    """A default as it stands in a configuration that was written down."""
    return list(default) if isinstance(default, tuple) else default


def without_places(sources: Any) -> Any:
    """Sources without where they are, with the defaults of what was no option yet when they were written down."""
    if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources):
        return sources
    defaults = {name: in_json(field.default) for name, field in SourceOptions.model_fields.items()}
    return [{name: value for name, value in (defaults | source).items() if name not in PLACES} for source in sources]


def check_options(path: Path, info: Mapping[str, Any], config: Section) -> None:
    """Raises InputError when the run of a checkpoint cannot go on with these options.

    Its number of steps and its decay may change where that leaves the learning rates of the steps that are done as they were.
    """
    now, done = config.model_dump(mode="json"), number(info.get("step")) or 0
    before = info.get("config") or {}
    changed = differences(before, now, options_of(type(config)))
    course = [line for line in changed if line.startswith(COURSE)]
    if course and config.train.steps >= done and same_rates(before, config, done):
        changed, course = [line for line in changed if line not in course], []
    if not changed:
        return
    why = ""
    if course and config.train.steps < done:
        why = f" (step {done} is done)"
    elif course:
        why = " (steps and decay set the learning rates of the steps that are done)"
    raise InputError(f"{shown(path)} was made with other options: {'; '.join(changed)}{why}. Restore them, or {way_on(config)}")


def same_rates(before: Mapping[str, Any], config: Section, done: int) -> bool:
    """Whether steps and decay of a run with the options `before` gave its first `done` steps the learning rates that `config` gives."""
    now, given = config.train, before.get("train")
    try:
        own = {"warmup_steps": now.warmup_steps, "learning_rate": now.learning_rate}
        was = type(now)(steps=given["steps"], decay=given["decay"], **own)
    except (ValueError, LookupError, TypeError):  # of something else than a run's options
        return False
    return all(learning_rate(step, was) == learning_rate(step, now) for step in range(done))


def check_same_run(path: Path, info: Mapping[str, Any], config: Section, inputs: Mapping[str, str]) -> None:
    """Raises InputError when a checkpoint was made with other options, or of other pictures, captions or models than `inputs` tell."""
    check_options(path, info, config)
    before = {"T5 lengths": inputs.get("T5 lengths"), **info["inputs"]}  # earlier versions did not tell them
    changed = ", ".join(what for what, value in inputs.items() if before.get(what) != value)
    if changed:
        named = " (pictures go by their source's name: give it where its folder has another)" if config.data.sources else ""
        raise InputError(
            f"{changed} of this run are not those {shown(path)} was trained on; restore them{named}, or choose another output.folder"
        )


def check_goes_on(config: Section) -> None:
    """As `check_options` of the newest checkpoint there is, for a look before a run; one that cannot be read is left to the run."""
    saved = storage.checkpoints(expanded(config.output.folder) / "checkpoints")
    if saved:
        with suppress(storage.DamagedCheckpoint):
            check_options(saved[-1], storage.state_of(saved[-1]), config)


def options_of_run(out: Path, kind: type[Section]) -> dict[str, Any] | None:
    """The options that a run's newest checkpoint was made with, or its config.json; None where neither can be read."""
    saved = storage.checkpoints(out / "checkpoints")
    for read in (lambda: storage.state_of(saved[-1])["config"], lambda: read_json(out / "config.json")):
        with suppress(InputError, LookupError, OSError):
            found = read()
            if isinstance(found, dict) and all(isinstance(found.get(section), dict) for section in kind.model_fields):
                return found
    return None


def way_on(config: Section) -> str:
    """How to train the result of a run further."""
    model = expanded(config.output.folder) / "model"
    if (model / "model_index.json").is_file():
        return f"train its result on in a new run: model.pipeline={shown(model)} and another output.folder"
    return "choose another output.folder"


def finished(config: Section) -> Path | None:
    """The model of a run that has been trained as far as these options ask; None where there is none, or it is not so far.

    Raises InputError where it was finished with other options: nothing of what is asked would be done.
    """
    out = expanded(config.output.folder)
    model = out / "model"
    if not any((model / name).is_file() for name in ("model_index.json", "config.json")):
        return None
    done = None
    with suppress(ValueError, OSError, AttributeError):  # what cannot be read of a finished run does not make it less so
        trained = read_info(model).get("trained")
        done = number(trained.get("steps")) if isinstance(trained, dict) else None
    if done is not None and config.train.steps > done:
        return None
    before = options_of_run(out, type(config))
    if before is None:
        return model
    now = config.model_dump(mode="json")
    changed = [line for line in differences(before, now, options_of(type(config))) if not line.startswith("train.steps was ")]
    was = before["output"].get("dtype", config.output.dtype)
    if was != config.output.dtype:
        raise InputError(
            f"{shown(out)} is finished, its model saved in {shown(was, LONGEST)}; for another dtype: "
            f"latentfm convert {shown(model)} OUT --dtype {config.output.dtype}"
        )
    if changed:
        raise InputError(f"{shown(out)} is finished, with other options: {'; '.join(changed)}. Restore them, or {way_on(config)}")
    if done is not None and config.train.steps < done:
        asked = f"train.steps={config.train.steps} asks for fewer"
        print(f"warning: {shown(out)} has {done} steps already, {asked}: it stays as it is", flush=True)
    too_late = [f"{section}.{key}" for section in {"validation", "sample"} & now.keys() for key, value in now[section].items()
            if before[section].get(key, value) != value]  # fmt: skip
    if too_late:
        print(f"warning: {', '.join(too_late)} came too late: nothing more is drawn or validated in {shown(out)}", flush=True)
    return model
