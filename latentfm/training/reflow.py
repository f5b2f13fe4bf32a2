"""Rectified flow (Liu et al. 2022; InstaFlow, Liu et al. 2023): trainings on pairs, one after the other, each the next one's teacher.

A round trains on (noise, what the teacher draws from it): lines that do not cross, so that the learned paths are straighter and few steps
follow them. The last training, if asked for, is of one step alone: from the noise at once to the end of its pair.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState, PartialState

from latentfm.config import RunConfig
from latentfm.files import expanded
from latentfm.models.folder import check_folder
from latentfm.training.checkpoint import storage
from latentfm.training.pairs import pairs_of, teacher_folder
from latentfm.training.trainer import train

ONE_STEP = "one-step"


def stages(config: RunConfig, rounds: int, one_step: bool) -> Iterator[RunConfig]:
    """The options of each training: `config`'s, with the model before for teacher and start, and a folder within output.folder.

    Every stage has noise of its own.
    """
    out, options = expanded(config.output.folder), config
    names = [*(f"round-{number}" for number in range(1, rounds + 1)), *([ONE_STEP] if one_step else [])]
    for number, name in enumerate(names):
        pairs = options.data.pairs.model_copy(update={"seed": config.data.pairs.seed + number})
        yield options.model_copy(
            update={
                "data": options.data.model_copy(update={"pairs": pairs}),
                "train": options.train.model_copy(update={"one_step": name == ONE_STEP}),
                "output": options.output.model_copy(update={"folder": str(out / name)}),
            }
        )
        # the student is the next one's teacher, as it is: whatever guidance there was is in it
        model = options.model.model_copy(update={"pipeline": str(out / name / "model"), "preset": None})
        pairs = pairs.model_copy(update={"teacher": None, "guidance": 1.0})
        options = options.model_copy(update={"model": model, "data": options.data.model_copy(update={"pairs": pairs})})


def reflow(
    config: RunConfig, rounds: int, one_step: bool, on_stage: Callable[[RunConfig], None], on_model: Callable[[RunConfig, Path], None]
) -> Path:
    """Runs the stages, those that are finished apart and the one that was stopped from its checkpoint on; returns the last one's model.

    `on_stage` is told the options of each before it begins, `on_model` its model after it. Raises as `trainer.train` does.
    """
    model = Path()
    check_folder(teacher_folder(config))  # what is wrong with what is given, before a word is said
    pairs_of(config)
    for stage in stages(config, rounds, one_step):
        on_stage(stage)
        out = expanded(stage.output.folder)
        AcceleratorState._reset_state()  # it keeps one configuration a process; the processes stay together
        GradientState._reset_state()
        model = train(stage, (out / "model").exists() or bool(storage.checkpoints(out / "checkpoints")), last=False)
        on_model(stage, model)
    PartialState().destroy_process_group()
    return model
