"""`latentfm reflow`: a model that needs few steps, trained on what a slower one draws."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentfm.cli.completion import Overrides

if TYPE_CHECKING:
    from latentfm.config import RunConfig

MEASURED, INTERVALS = 32, 16  # paths that are measured before and after, and the steps along each
DEFAULTS = ("train.dropout=0", "sample.guidance=1", "sample.steps=4")  # the student is not guided, and so needs no null condition


def reflow(
    overrides: Overrides = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="Prompts to draw pairs for, in turn: text, one a line; .csv or .jsonl.", show_default=False)
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="The teacher, a pipeline folder; the student begins as it. Default: the bundled one.", show_default=False),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs: round-1, round-2, ..., one-step.", show_default=False)] = None,
    pairs: Annotated[
        int | None, typer.Option(help="How many in each round; the prompts are taken in turn. Default: 10,000.", show_default=False)
    ] = None,
    rounds: Annotated[
        int, typer.Option(help="Trainings on pairs, each on those of the model before; 0 with --one-step distils the teacher.")
    ] = 1,
    one_step: Annotated[
        bool, typer.Option("--one-step", help="After the rounds, train a model that draws in one step: MSE on the last model's pairs.")
    ] = False,
    steps: Annotated[
        int | None, typer.Option(help="Of the teacher's sampler, whose error is learned too. Default: 28.", show_default=False)
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Of the teacher, folded into the student. Default: its own, or 3; 1 if its weights have it.", show_default=False
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of the pairs' noise, which depends on it and on a pair's number alone. Default: 0.", show_default=False),
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="A YAML file of options of `latentfm train`.")] = None,
) -> None:
    """Train a model to draw in few steps, by reflow, on pairs of noise and what a slower one draws from it.

    Each round draws pairs with the model before, guidance and all, and trains on the straight lines between their ends, by the trainer of
    `latentfm train`: its options, run page, checkpoints and launchers. What comes out has the guidance in its weights and is drawn at
    guidance 1, half the work a step; its folder says so, and `latentfm generate` and LatentFMPipeline know it. --one-step goes on to a
    single step, for a loss in quality. Printed: how straight the paths are, before and after.

    Pairs lie in data.cache; any number of processes share them. The same command goes on where it was stopped.
    """
    from latentfm.cli.terminal import quiet_libraries, tell_result
    from latentfm.config import load_config
    from latentfm.errors import InputError

    asked = {
        "data.pairs.prompts": prompts_file, "data.pairs.count": pairs, "data.pairs.steps": steps, "data.pairs.guidance": guidance,
        "data.pairs.seed": seed, "model.pipeline": model, "output.folder": out,
    }  # fmt: skip
    overrides = overrides or []
    given = {override.partition("=")[0].strip() for override in overrides}
    if config is None and prompts_file is None and "data.pairs.prompts" not in given:
        raise InputError("--prompts-file is needed: a text file with the prompts that the model should draw in few steps, one a line")
    if config is None and out is None and "output.folder" not in given:
        raise InputError("--out is needed: a folder for the runs, as --out runs/fast")
    if rounds < 0 or rounds + one_step < 1:
        raise InputError(f"--rounds {rounds} is no number of trainings; 1 is usual, and 0 goes with --one-step")
    ours = [*DEFAULTS, *(f"{name}={value}" for name, value in asked.items() if value is not None)]
    run = load_config(config, [*(text for text in ours if text.partition("=")[0] not in given), *overrides])

    quiet_libraries()
    from latentfm.training.reflow import reflow as run_stages

    tell_result(lambda: run_stages(run, rounds, one_step, tell_stage, tell_paths), goes_on_by="the same command")


def tell_stage(stage: "RunConfig") -> None:
    """Says what begins."""

    from latentfm.cli.terminal import rank, say
    from latentfm.training.pairs import folded_guidance, teacher_folder

    if rank() == 0:
        scale, _ = folded_guidance(stage)
        say(f"{Path(stage.output.folder).name}: pairs of {teacher_folder(stage)} in {stage.data.pairs.steps} steps at guidance {scale:g}")


def tell_paths(stage: "RunConfig", model: Path) -> None:
    """Says how straight the paths of a stage's teacher and of its model are."""

    from latentfm.cli.terminal import rank, say
    from latentfm.drawing import load
    from latentfm.evaluation.paths import pipeline_paths
    from latentfm.training.pairs import folded_guidance, pairs_of, teacher_folder
    from latentfm.training.precision import computing_device

    if rank():
        return
    prompts = [sample.captions[0] for sample in pairs_of(stage).samples[:MEASURED]]
    for what, folder, guidance in (("before", teacher_folder(stage), folded_guidance(stage)[0]), ("after", model, 1.0)):
        pipe = load(folder, "float32").to(computing_device())
        found = pipeline_paths(pipe, prompts, stage.data.pairs.seed, INTERVALS, guidance)
        energy, bending = found.energy.mean().item(), found.straightness.mean().item()
        say(f"{what}: path energy {energy:.3f} a number, of it bending {bending:.4f} ({bending / energy:.1%}; 0 is straight)")
