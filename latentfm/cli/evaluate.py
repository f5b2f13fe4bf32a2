"""`latentfm evaluate`: what a model is worth. Everything that can be checked without a model is checked before one is loaded."""

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from latentfm.bounds import LAST_SEED, MOST_AT_ONCE, MOST_PICTURES
from latentfm.bundled import bundled_model, detector_folder
from latentfm.cli.checks import check_at_least_one, check_at_most, check_name, check_size, chosen_device, model_folder, parse_size
from latentfm.cli.drawing import Drawing
from latentfm.cli.generate import DEVICES, DTYPES
from latentfm.cli.terminal import quiet_libraries, result, say
from latentfm.drawing import choose_attention, fingerprint, load, move, slug, versions
from latentfm.errors import InputError, nearest
from latentfm.files import check_can_be_written, whole_or_nothing
from latentfm.requests import Prompt, Settings, requests, values
from latentfm.sampling import SOLVERS, Guidance, Sampler, Schedule, Solver
from latentfm.words import count, shown

if TYPE_CHECKING:
    from latentfm.evaluation.geneval import Asked
    from latentfm.evaluation.measuring import Instruments, Known, Measured
    from latentfm.training.records.progress import Progress

# what can be swept, and of what kind it is
SWEPT = {"steps": int, "guidance": float, "solver": str, "schedule": str, "guidance_rule": str}
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
    steps: Annotated[int, typer.Option(help="Steps of the sampler.")] = 28,
    guidance: Annotated[float, typer.Option(help="How strongly the prompt pulls; 1 is no guidance.")] = 3.0,
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
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16. auto: float32 on the CPU, bfloat16 on a GPU.")] = "auto",
) -> None:
    """Measure what a model is worth: does it show what was asked, and how near, how varied, how new are its pictures.

    Every figure has a 95 % interval; two models are told apart by a paired test. The pictures are kept in OUT/pictures with their
    settings: what is there is not drawn again, so that a stopped evaluation goes on. Under torchrun or `accelerate launch -m latentfm
    evaluate ...` each process has its share, and the report is the same.
    """
    given = SimpleNamespace(**locals())
    Evaluation(given, checked(given)).run()


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

    check_at_least_one({"--seeds": given.seeds, "--batch": given.batch, "--steps": given.steps})
    check_at_most({"--batch": (given.batch, MOST_AT_ONCE)})
    folder = model_folder(given.model, "MODEL")
    if given.prompts is None:
        if given.model is not None and given.detector != "emoji":
            raise InputError("--prompts FILE is needed; those of the bundled model's art are taken for it alone, or with --detector emoji")
        given.detector = given.detector or "emoji"
    file = given.prompts or detector_folder() / "prompts.jsonl"
    asked = read_asked(file)
    sampler = Sampler(given.steps, given.guidance, given.solver, given.schedule, given.shift, given.guidance_rule)
    if sampler.guidance == "autoguidance":
        raise InputError("--guidance-rule autoguidance needs a weaker model beside this one, which evaluate does not take")
    width, height = (None, None) if given.size is None else parse_size(given.size)
    base = Settings(sampler, None, width, height)
    sweeps = [swept(text) for text in given.sweep or []]
    for name, each in sweeps:
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
    check_name("--device", given.device.split(":")[0], DEVICES)
    check_name("--dtype", given.dtype, DTYPES)
    check_can_be_written(given.out, "--out")
    other = evaluated = None
    if given.against is not None and (given.against / "report.json").is_file():
        evaluated = given.against
    elif given.against is not None:
        other = Variant(str(given.against), model_folder(given.against, "--against"), base)
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


class Kept(Drawing):
    """Pictures drawn for an evaluation: they stay where they are and none is told."""

    progress: "Progress"

    def tell(self, result: Path | str) -> None:
        """Nothing."""

    def advance(self, pictures: int) -> None:
        self.progress.advance(self.task, pictures)


class Evaluation:
    """An evaluation, by one process or its share of it."""

    def __init__(self, given: SimpleNamespace, wanted: Wanted):
        self.given, self.wanted, self.done = given, wanted, {}

    def run(self) -> None:
        """Draws what is not there, measures, and writes the report. Raises InputError for what only a model can tell."""
        quiet_libraries()
        from latentfm.training.distributed.processes import launched
        from latentfm.training.records.progress import Progress

        with launched() as self.processes, Progress(self.processes.rank == 0) as self.progress:
            self.device = chosen_device(self.given.device)
            if self.processes.world > 1 and self.given.device == "auto" and self.device.type == "cuda":
                self.device = chosen_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
            self.instruments = self.chosen_instruments()
            self.known = self.known_pictures()
            report = self.report()
            if self.processes.rank == 0:
                self.write(report)

    def chosen_instruments(self) -> "Instruments":
        """Detector, CLIP and feature space, by their options. Raises InputError for what is none, or cannot find what is asked for."""
        from latentfm.evaluation.detection import ZeroShotDetector
        from latentfm.evaluation.emoji import EmojiDetector
        from latentfm.evaluation.features import Clip, Inception, VisionModel
        from latentfm.evaluation.measuring import Instruments

        given, detector = self.given, None
        clip = Clip(given.clip, self.device) if given.clip else None
        if given.detector == "emoji":
            detector = EmojiDetector.load(detector_folder(), self.device)
        elif given.detector is not None:
            detector = ZeroShotDetector(Path(given.detector), given.threshold, self.device, clip)
        if given.features is not None:
            space = (Inception if given.features.is_file() else VisionModel)(given.features, self.device)
        else:
            space = clip or (detector if given.detector == "emoji" else None)
        self.classes = sorted({thing.name for asked in self.wanted.asked for thing in (*asked.include, *asked.exclude)})
        if detector is not None:
            detector.check(self.classes)
            if not detector.tells_colours and any(thing.colour for asked in self.wanted.asked for thing in asked.include):
                raise InputError("some prompts ask for colours, which this detector does not tell: give a CLIP's folder with --clip")
        return Instruments(detector, clip, space)

    def known_pictures(self) -> "Known | None":
        """The real pictures with their features, each process having read its share. Raises InputError for too few."""
        from latentfm.data.sources.base import IMAGE_SUFFIXES
        from latentfm.evaluation.distances import NEAREST
        from latentfm.evaluation.measuring import Instruments, Known, unpacked

        if self.given.real is None:
            return None
        paths = sorted(str(path) for path in self.given.real.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
        if len(paths) <= NEAREST:
            few = count(len(paths), "picture")
            raise InputError(f"--real {shown(self.given.real)} has {few}; {NEAREST + 1} are the fewest to compare with")
        looking = Instruments(None, self.instruments.clip, self.instruments.space)
        rows = self.shared("looking at the real pictures", paths, lambda own, told: looking.rows([(Path(p), None) for p in own], (), told))
        return Known(paths, unpacked(rows, "features"), unpacked(rows, "clip_features"))

    def shared(self, what: str, items: list, rows: Any, total: int | None = None) -> list[dict]:
        """rows(items, advance) of all items, this process doing its share, with progress."""

        def find(own: list) -> list[dict]:
            task = self.progress.add_task(what, total=max(1, len(own)) if total is None else total)
            found = rows(own, lambda number: self.progress.advance(task, number))
            self.progress.remove_task(task)
            return found

        self.calls = getattr(self, "calls", 0) + 1
        return self.processes.share(find, items, f"{self.calls} {what}")

    def measured(self, variant: Variant) -> "Measured":
        """A variant's pictures, drawn where they are not there, and what is measured of them."""
        from latentfm.evaluation.measuring import Measured, figures, unpacked

        if (variant.folder, variant.settings) in self.done:
            return replace(self.done[variant.folder, variant.settings], name=variant.label)
        asked = self.wanted.asked
        told, paths = self.drawn(variant)
        numbers = list(range(len(paths)))

        def look(own: list[int], advance: Any) -> list[dict]:
            pairs = [(self.given.out / paths[number], asked[number // self.given.seeds]) for number in own]
            return self.instruments.rows(pairs, self.classes, advance)

        found = self.shared(f"measuring {variant.label}", numbers, look)
        placed = [{"prompt": n // self.given.seeds, "seed": self.given.seed + n, "file": paths[n], **row} for n, row in enumerate(found)]
        features, clip = unpacked(placed, "features"), unpacked(placed, "clip_features")
        measured = Measured(variant.label, told, [each.prompt for each in asked], placed, features, clip)
        measured.figures = figures(measured, asked, self.known)
        self.done[variant.folder, variant.settings] = measured
        return measured

    def drawn(self, variant: Variant) -> tuple[dict[str, Any], list[str]]:
        """(what there is to know of the variant, each picture's path below --out), all pictures drawn by now."""
        given = self.given
        kind = given.dtype if given.dtype != "auto" else "float32" if self.device.type == "cpu" else "bfloat16"
        print_of = fingerprint(variant.folder)
        if getattr(self, "loaded", (None,))[0] != variant.folder:
            pipe = load(variant.folder, kind, option="MODEL")
            choose_attention(pipe, "auto", self.device)
            move(pipe, self.device)
            self.loaded = (variant.folder, pipe)
        pipe = self.loaded[1]
        own = {"width": pipe.default_width, "height": pipe.default_height}
        settings = replace(variant.settings, **{side: value for side, value in own.items() if getattr(variant.settings, side) is None})
        check_size(settings.width, settings.height, pipe.size_multiple, pipe.max_side)
        name = "bundled" if variant.folder == bundled_model() else str(variant.folder.resolve())
        common = {"model": name, "model_fingerprint": print_of, "device": str(self.device), "dtype": kind, "attention": "auto", **versions()}
        told = {**settings.recorded(), **common}
        mark = hashlib.sha256(json.dumps({key: value for key, value in told.items() if key not in ("device", "model")}).encode())
        place = Path("pictures") / f"{slug(Path(variant.label).name)[:40]}-{mark.hexdigest()[:12]}"
        prompts = [Prompt(each.prompt) for each in self.wanted.asked]
        everything = requests(prompts, given.seeds, given.seed, settings, {})

        def make(own: "list[int]") -> list[str]:
            drawing = Kept(pipe, {}, common, given.out / place, False, False, self.progress.bar, 0, [])
            missing = [each for each in (everything[number] for number in own) if not drawing.is_there(each)]
            for each in missing:  # damaged, or it would be there
                (drawing.out / f"{drawing.stem(each)}.png").unlink(missing_ok=True)
            if missing:
                drawing.progress = self.progress
                steps = settings.sampler.num_inference_steps
                drawing.task = self.progress.add_task(f"drawing by {variant.label}", total=len(missing) * steps)
                drawing.all(missing, 1 if settings.sampler.solver == "dormand_prince" else given.batch, given.seeds)
                self.progress.remove_task(drawing.task)
            return [str(place / f"{drawing.stem(everything[number])}.png") for number in own]

        self.calls = getattr(self, "calls", 0) + 1
        return told, self.processes.share(make, list(range(len(everything))), f"{self.calls} drawing")

    def report(self) -> dict[str, Any]:
        """The record of the evaluation, as report.json has it."""
        from latentfm.evaluation.measuring import Measured, compare

        given, wanted, known = self.given, self.wanted, self.known
        models = [self.measured(wanted.main)]
        if wanted.evaluated is not None:
            from latentfm.evaluation.measuring import figures

            models.append(Measured.load(wanted.evaluated))
            if models[1].prompts != models[0].prompts:
                raise InputError(f"--against {shown(wanted.evaluated)} is of other prompts; evaluate both models on one file")
            models[1].figures = figures(models[1], wanted.asked, known)
        sweeps = []
        for name, each in wanted.sweeps:
            variants = [Variant(f"{name} {value}", wanted.main.folder, wanted.main.settings.changed({name: value})) for value in each]
            sweeps.append({"option": name, "values": each, "figures": [self.measured(variant).figures for variant in variants]})
        if wanted.other is not None:
            models.append(self.measured(wanted.other))
        losses = []
        if given.held_out is not None:
            from latentfm.evaluation.losses import losses_by_t

            folders = [each.folder for each in (wanted.main, wanted.other) if each is not None]
            for model, folder in zip(models, folders, strict=False):
                found = losses_by_t(folder, given.held_out, given.seed, self.device, self.processes, self.progress)
                losses.append({"name": model.name, "figures": found})
                model.figures["loss"] = found["loss"]
        instruments = self.instruments
        self.main = models[0]
        return {
            **versions(),
            "prompts_file": str(wanted.prompts_file),
            "prompts": [{"prompt": each.prompt, "task": each.task} for each in wanted.asked],
            "number": given.seeds,
            "seeds": [given.seed, given.seed + len(wanted.asked) * given.seeds - 1],
            "detector": instruments.detector and f"{instruments.detector.name}, scores from {given.threshold:g}",
            "space": instruments.space and instruments.space.name,
            "clip": instruments.clip and instruments.clip.name,
            "real": {"folder": str(given.real), "pictures": len(known.paths)} if known else None,
            "models": [
                {"name": each.name, "told": each.told, "figures": each.figures, "pictures": each.rows} for each in models
            ],
            "comparison": compare(models[0], models[1], wanted.asked, known) if len(models) > 1 else None,
            "sweeps": sweeps,
            "losses": losses,
        }

    def write(self, report: dict[str, Any]) -> None:
        """Writes report.json, features.safetensors and report.html, and prints the page's path and the figures."""
        from latentfm.evaluation.report import FIGURES, difference, page, said

        out = self.given.out
        with whole_or_nothing(out / "report.json") as partial:
            partial.write_text(json.dumps(report, indent=1, ensure_ascii=False, allow_nan=True) + "\n", "utf-8")
        self.main.save(out)
        with whole_or_nothing(out / "report.html") as partial:
            partial.write_bytes(page(report, out).encode("utf-8", "xmlcharrefreplace"))
        compared = report["comparison"] or {}
        for name in FIGURES:
            if name not in report["models"][0]["figures"]:
                continue
            value, interval = said(name, report["models"][0]["figures"][name])
            line = f"{FIGURES[name][0]}: {value} ({interval})"
            if name in compared:
                apart, interval, word = difference(name, compared[name])
                line += f"; {shown(report['models'][1]['name'], 60)} {apart} ({interval}), p {compared[name]['p']:.4f}: {word}"
            say(line)
        result(out / "report.html")
