"""`latentfm evaluate`: what a model is worth. Everything that can be checked without a model is checked before one is loaded."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from latentfm.bounds import LAST_SEED, MOST_AT_ONCE, MOST_PICTURES
from latentfm.bundled import detector_folder
from latentfm.cli.checks import check_at_least_one, check_at_most, check_name, model_folder, parse_size
from latentfm.cli.generate import DEVICES, DTYPES
from latentfm.errors import InputError, nearest
from latentfm.files import check_can_be_written
from latentfm.models.folder import usual_sampling
from latentfm.requests import Settings, values
from latentfm.sampling import SOLVERS, Guidance, Sampler, Schedule, Solver
from latentfm.words import shown

if TYPE_CHECKING:
    from latentfm.evaluation.geneval import Asked

# what can be swept, and of what kind it is
SWEPT = {"steps": int, "guidance": float, "solver": str, "schedule": str, "guidance_rule": str}
FEWEST = 12  # pictures that are compared with real ones
NAMES = {"solver": tuple(SOLVERS), "schedule": get_args(Schedule), "guidance_rule": get_args(Guidance)}


def evaluate(
    model: Annotated[
        Path | None,
        typer.Argument(help="Pipeline folder, ours or a stock SD3 / SD3.5 one. Default: the bundled model.", show_default=False),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for report.html, report.json and the pictures; an earlier report there is replaced.")
    ] = Path("evaluation"),
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines as GenEval's metadata.jsonl: prompt, tag, include, exclude; a prompt alone counts for the other figures. "
            "Default: the prompts of the bundled model's own art.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", "-n", help="Pictures of each prompt.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the first picture; each next picture has the next one.")] = 0,
    steps: Annotated[
        int | None, typer.Option(help="Steps of the sampler. Default: as the model's folder says, else 28.", show_default=False)
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="How strongly the prompt pulls; 1 is no guidance. Default: as the model's folder says, else 3, and 1 of a model with "
            "guidance in its weights.",
            show_default=False,
        ),
    ] = None,
    solver: Annotated[
        Solver | None, typer.Option(metavar="NAME", show_default=False, help=f"{', '.join(SOLVERS)}. Default: the model's own scheduler.")
    ] = None,
    schedule: Annotated[Schedule, typer.Option(metavar="NAME", help=f"{', '.join(get_args(Schedule))}.")] = "model",
    shift: Annotated[float | None, typer.Option(help="Of a --schedule other than model.", show_default=False)] = None,
    guidance_rule: Annotated[Guidance, typer.Option(metavar="NAME", help="cfg, cfg_zero_star, apg.")] = "cfg",
    size: Annotated[str | None, typer.Option(help="Pixels: WIDTHxHEIGHT. Default: the model's.", show_default=False)] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            help=f"NAME=VALUES, as steps=4,8,28 or guidance=1..5: every figure for each, plotted. {', '.join(SWEPT)}.", show_default=False
        ),
    ] = None,
    detector: Annotated[
        str | None,
        typer.Option(
            help="Folder of a transformers zero-shot object detector (OWLv2, Grounding DINO, ...), or emoji: the project's own for the "
            "bundled model's art. Default: emoji for the default prompts, else none.",
            show_default=False,
        ),
    ] = None,
    threshold: Annotated[float, typer.Option(help="Least score of what a detector in a folder finds.")] = 0.3,
    clip: Annotated[
        Path | None, typer.Option(help="Folder of a CLIP or SigLIP: CLIP score, CMMD, colours of a detector's finds.", show_default=False)
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(
            help="Space of FID and the like: folder of a transformers vision model, or Inception v3's weights as .safetensors. Default: "
            "--clip's, else the emoji detector's.",
            show_default=False,
        ),
    ] = None,
    real: Annotated[
        Path | None,
        typer.Option(help="Folder of real pictures: FID, CMMD, precision, recall, density, coverage, copies of them.", show_default=False),
    ] = None,
    held_out: Annotated[
        Path | None, typer.Option(help="Folder of pictures with captions, not trained on: the loss on them by t.", show_default=False)
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="Another model's folder, or the --out of its evaluation on the same prompts: a paired test.", show_default=False),
    ] = None,
    batch: Annotated[int, typer.Option(help="Pictures made at a time.")] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, xpu.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16, float16. auto: bfloat16 on a GPU or a CPU that multiplies it, else float32.")
    ] = "auto",
) -> None:
    """Measure what a model is worth: does it show what was asked, and how near, how varied, how new are its pictures.

    Every figure has a 95 % interval; two models are told apart by a paired test. The pictures are kept in OUT/pictures with their
    settings: what is there is not drawn again, so that a stopped evaluation goes on. Under torchrun or `accelerate launch -m latentfm
    evaluate ...` each process has its share, and the report is the same.
    """
    given = SimpleNamespace(**locals())
    wanted = checked(given)
    from latentfm.cli.evaluation import Evaluation

    Evaluation(given, wanted).run()


@dataclass(frozen=True)
class Variant:
    """A model with some settings, whose pictures are measured. label: its name in the report."""

    label: str
    folder: Path
    settings: Settings


@dataclass(frozen=True)
class Wanted:
    """What the options come to. sweeps: (option, values). other: a model to compare with; evaluated: or where its evaluation is."""

    asked: "list[Asked]"
    prompts_file: Path
    main: Variant
    sweeps: list[tuple[str, list[Any]]]
    other: Variant | None
    evaluated: Path | None


def checked(given: SimpleNamespace) -> Wanted:
    """What the options come to. Raises InputError for whatever can be told to be wrong before a model is loaded."""
    from latentfm.evaluation.geneval import read_asked

    check_at_least_one({"--seeds": given.seeds, "--batch": given.batch, "--steps": 1 if given.steps is None else given.steps})
    check_at_most({"--batch": (given.batch, MOST_AT_ONCE)})
    folder = model_folder(given.model, "MODEL")
    if given.prompts is None:
        if given.model is not None and given.detector != "emoji":
            raise InputError("--prompts FILE is needed; those of the bundled model's art are taken for it alone, or with --detector emoji")
        given.detector = given.detector or "emoji"
    file = given.prompts or detector_folder() / "prompts.jsonl"
    asked = read_asked(file)
    usual = usual_sampling(folder).unless(vars(given))
    sampler = Sampler(usual["steps"], usual["guidance"], given.solver, given.schedule, given.shift, given.guidance_rule)
    if sampler.guidance == "autoguidance":
        raise InputError("--guidance-rule autoguidance needs a weaker model beside this one, which evaluate does not take")
    width, height = (None, None) if given.size is None else parse_size(given.size)
    base = Settings(sampler, None, width, height)
    sweeps = [swept(text) for text in given.sweep or []]
    for name, each in sweeps:
        if name == "steps":
            check_at_least_one({"--sweep steps": min(each)})
        for value in each:
            base.changed({name: value})
    pictures = len(asked) * given.seeds
    check_at_most({"the number of pictures,": (pictures * (1 + sum(len(each) for _, each in sweeps)), MOST_PICTURES)})
    if not 0 <= given.seed <= LAST_SEED - pictures:
        raise InputError(f"--seed {given.seed} is out of range: {pictures} pictures need a seed from 0 to {LAST_SEED - pictures}")
    for option, path in (("--real", given.real), ("--held-out", given.held_out), ("--clip", given.clip)):
        if path is not None and not path.is_dir():
            raise InputError(f"{option} {shown(path)} {'is a file; give its folder' if path.exists() else 'does not exist'}")
    if given.features is not None and not given.features.exists():
        raise InputError(f"--features {shown(given.features)} does not exist; give a vision model's folder, or a .safetensors file")
    if given.detector not in (None, "emoji") and not Path(given.detector).is_dir():
        raise InputError(f"--detector {shown(given.detector)} is no folder; give that of a transformers zero-shot detector, or emoji")
    if not 0 < given.threshold < 1:
        raise InputError(f"--threshold {given.threshold:g} is no score between 0 and 1; 0.3 is GenEval's")
    if given.real is not None and given.features is None and given.clip is None and given.detector != "emoji":
        raise InputError("--real needs a space to compare pictures in: --features or --clip, a local folder")
    if given.real is not None and pictures < FEWEST:
        raise InputError(f"{pictures} pictures are too few to compare with --real; {FEWEST} are the least, thousands are usual")
    check_name("--device", given.device.split(":")[0], DEVICES)
    check_name("--dtype", given.dtype, DTYPES)
    check_can_be_written(given.out, "--out")
    other = evaluated = None
    if given.against is not None and (given.against / "report.json").is_file():
        evaluated = given.against
    elif given.against is not None:
        folder_of_other = model_folder(given.against, "--against")
        own = base.changed(usual_sampling(folder_of_other).unless(vars(given)))
        other = Variant(str(given.against), folder_of_other, own)
    return Wanted(asked, file, Variant(str(given.model or "bundled"), folder, base), sweeps, other, evaluated)


def swept(text: str) -> tuple[str, list[Any]]:
    """(option, values) of a --sweep. Raises InputError for an option or a value that does not exist."""
    name, found, listed = text.partition("=")
    name = name.strip().replace("-", "_")
    if not found or name not in SWEPT:
        way_out = f"write NAME=VALUES, as steps=4,8,28; there are {', '.join(SWEPT)}"
        raise InputError(f"--sweep {shown(text, 60)}{nearest(name, SWEPT)}: {way_out}")
    if SWEPT[name] is not str:
        return name, values(f"--sweep {name}", listed, SWEPT[name])
    words = list(dict.fromkeys(word.strip() for word in listed.split(",")))
    for word in words:
        check_name(f"--sweep {name}", word, NAMES[name])
    return name, words
