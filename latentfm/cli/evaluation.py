"""An evaluation as `latentfm evaluate` makes it: pictures drawn, or found where they were kept, measured, compared and written down."""

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from latentfm.bundled import bundled_model, detector_folder
from latentfm.cli.checks import check_size, chosen_device, chosen_dtype
from latentfm.cli.evaluate import FEWEST, Variant, Wanted
from latentfm.cli.terminal import quiet_libraries, result, say
from latentfm.data.sources.base import IMAGE_SUFFIXES
from latentfm.drawing import choose_attention, described, load, move, slug, versions
from latentfm.errors import InputError
from latentfm.evaluation.detection import ZeroShotDetector
from latentfm.evaluation.distances import NEAREST
from latentfm.evaluation.emoji import EmojiDetector
from latentfm.evaluation.features import Clip, Inception, VisionModel
from latentfm.evaluation.losses import losses_by_t
from latentfm.evaluation.measuring import Instruments, Known, Measured, compare, figures, unpacked
from latentfm.evaluation.report import FIGURES, chance, difference, page, said
from latentfm.files import whole_or_nothing
from latentfm.requests import Prompt, requests
from latentfm.series import Listener, Series
from latentfm.training.distributed.processes import launched
from latentfm.training.records.progress import Progress
from latentfm.words import count, shown


class Watching(Listener):
    """Shows how far the drawing is."""

    def __init__(self, progress: Progress, task: int):
        self.progress, self.task = progress, task

    def advance(self, pictures: int) -> None:
        self.progress.advance(self.task, pictures)


class Evaluation:
    """An evaluation, by one process or its share of it."""

    def __init__(self, given: SimpleNamespace, wanted: Wanted):
        self.given, self.wanted = given, wanted
        self.done: dict[tuple, Measured] = {}
        self.loaded: tuple[Path | None, Any] = (None, None)
        self.calls = 0

    def run(self) -> None:
        """Draws what is not there, measures, and writes the report. Raises InputError for what only a model can tell."""
        quiet_libraries()
        with launched() as self.processes, Progress(self.processes.rank == 0) as self.progress:
            self.device = chosen_device(self.given.device)
            if self.processes.world > 1 and self.given.device == "auto" and self.device.type == "cuda":
                self.device = chosen_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
            self.instruments = self.chosen_instruments()
            self.known = self.known_pictures()
            report = self.report()
            if self.processes.rank == 0:
                self.write(report)

    def chosen_instruments(self) -> Instruments:
        """Detector, CLIP and feature space, by their options. Raises InputError for what is none, or cannot find what is asked for."""
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

    def known_pictures(self) -> Known | None:
        """The real pictures with their features, each process having read its share. Raises InputError for too few."""
        if self.given.real is None:
            return None
        paths = sorted(str(path) for path in self.given.real.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
        if len(paths) <= NEAREST:
            few = count(len(paths), "picture")
            raise InputError(f"--real {shown(self.given.real)} has {few}; {NEAREST + 1} are the fewest to compare with")
        looking = Instruments(None, self.instruments.clip, self.instruments.space)
        rows = self.shared("looking at the real pictures", paths, lambda own, told: looking.rows([(Path(p), None) for p in own], (), told))
        return Known(paths, unpacked(rows, "features"), unpacked(rows, "clip_features"))

    def shared(self, what: str, items: list, rows: Callable[[list, Callable[[int], None]], list[dict]]) -> list[dict]:
        """rows(items, advance) of all items, this process doing its share, with progress."""

        def find(own: list) -> list[dict]:
            task = self.progress.add_task(what, total=max(1, len(own)))
            found = rows(own, lambda number: self.progress.advance(task, number))
            self.progress.remove_task(task)
            return found

        return self.by_all(find, items)

    def by_all(self, find: Callable[[list], list], items: list) -> list:
        """find(items), each process doing its share."""
        self.calls += 1
        return self.processes.share(find, items, f"evaluation {self.calls}")

    def measured(self, variant: Variant) -> Measured:
        """A variant's pictures, drawn where they are not there, and what is measured of them."""
        if (variant.folder, variant.settings) in self.done:
            return replace(self.done[variant.folder, variant.settings], name=variant.label)
        asked = self.wanted.asked
        told, paths = self.drawn(variant)
        numbers = list(range(len(paths)))

        def look(own: list[int], advance: Callable[[int], None]) -> list[dict]:
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
        kind = chosen_dtype(given.dtype, self.device)
        if self.loaded[0] != variant.folder:
            pipe = load(variant.folder, kind, option="MODEL")
            choose_attention(pipe, "auto", self.device)
            move(pipe, self.device)
            self.loaded = (variant.folder, pipe)
        pipe = self.loaded[1]
        own = {"width": pipe.default_width, "height": pipe.default_height}
        settings = replace(variant.settings, **{side: value for side, value in own.items() if getattr(variant.settings, side) is None})
        check_size(settings.width, settings.height, pipe.size_multiple, pipe.max_side)
        named = None if variant.folder == bundled_model() else variant.folder.resolve()
        common = described(named, variant.folder, (), (), self.device, kind, "auto")
        told = {**settings.recorded(), **common}
        mark = hashlib.sha256(json.dumps({key: value for key, value in told.items() if key not in ("device", "model")}).encode())
        place = Path("pictures") / f"{slug(Path(variant.label).name)[:40]}-{mark.hexdigest()[:12]}"
        prompts = [Prompt(each.prompt) for each in self.wanted.asked]
        everything = requests(prompts, given.seeds, given.seed, settings, {})

        def make(own: list[int]) -> list[str]:
            series = Series(pipe, {}, common, given.out / place)
            missing = [each for each in (everything[number] for number in own) if series.existing(each) is None]
            for each in missing:  # damaged, or it would be there
                (series.out / f"{series.stem(each)}.png").unlink(missing_ok=True)
            if missing:
                steps = settings.sampler.num_inference_steps
                task = self.progress.add_task(f"drawing by {variant.label}", total=len(missing) * steps)
                series.listener = Watching(self.progress, task)
                series.draw(missing, 1 if settings.sampler.solver == "dormand_prince" else given.batch, given.seeds)
                self.progress.remove_task(task)
            return [str(place / f"{series.stem(everything[number])}.png") for number in own]

        return told, self.by_all(make, list(range(len(everything))))

    def report(self) -> dict[str, Any]:
        """The record of the evaluation, as report.json has it."""
        given, wanted, known = self.given, self.wanted, self.known
        models = [self.measured(wanted.main)]
        if wanted.evaluated is not None:
            models.append(self.evaluated(wanted.evaluated, models[0]))
        sweeps = []
        for name, each in wanted.sweeps:
            variants = [Variant(f"{name} {value}", wanted.main.folder, wanted.main.settings.changed({name: value})) for value in each]
            sweeps.append({"option": name, "values": each, "figures": [self.measured(variant).figures for variant in variants]})
        if wanted.other is not None:
            models.append(self.measured(wanted.other))
        losses = []
        if given.held_out is not None:
            folders = [each.folder for each in (wanted.main, wanted.other) if each is not None]
            for model, folder in zip(models, folders, strict=False):
                found = losses_by_t(folder, given.held_out, given.seed, self.device, self.processes, self.progress)
                losses.append({"name": model.name, "figures": found})
                model.figures = model.figures | {"loss": found["loss"]}
        self.main = models[0]
        return {
            **versions(),
            "prompts_file": str(wanted.prompts_file),
            "prompts": [{"prompt": each.prompt, "task": each.task} for each in wanted.asked],
            "number": given.seeds,
            "seeds": [given.seed, given.seed + len(wanted.asked) * given.seeds - 1],
            **self.instruments.told(),
            "fingerprints": self.instruments.fingerprints(),
            "validation": getattr(self.instruments.detector, "validation", None),
            "real": {"folder": str(given.real), "pictures": len(known.paths)} if known else None,
            "models": [{"name": each.name, "told": each.told, "figures": each.figures, "pictures": each.rows} for each in models],
            "comparison": compare(models[0], models[1], wanted.asked, known) if len(models) > 1 else None,
            "sweeps": sweeps,
            "losses": losses,
        }

    def evaluated(self, folder: Path, own: Measured) -> Measured:
        """The model of an earlier evaluation. Raises InputError where it was measured by or on something else than this one."""
        found, report = Measured.load(folder)
        if found.prompts != own.prompts:
            raise InputError(f"--against {shown(folder)} is of other prompts; evaluate both models on one file")
        if self.known is not None and len(found.rows) < FEWEST:
            few = count(len(found.rows), "picture")
            raise InputError(f"--against {shown(folder)} has {few}, too few to compare with --real; {FEWEST} are the least")
        for name, value in self.instruments.told().items():
            if report.get(name) != value:
                raise InputError(f"--against {shown(folder)} was made with {name} {shown(report.get(name))}, this one with {shown(value)}")
        kept = report.get("fingerprints")
        for name, value in self.instruments.fingerprints().items():
            if not isinstance(kept, dict) or kept.get(name) != value:
                why = f"by a {name} of other weights or settings than the present one of that name"
                why = why if kept else f"by an earlier version of latentfm, and does not say by which {name}'s weights"
                raise InputError(
                    f"--against {shown(folder)} was measured {why}; evaluate that model again with the same --out, which keeps its pictures"
                )
        for row in found.rows:
            row["file"] = os.path.relpath(folder / row["file"], self.given.out)
        found.figures = figures(found, self.wanted.asked, self.known)
        return found

    def write(self, report: dict[str, Any]) -> None:
        """Writes report.json, features.safetensors and report.html, and prints the page's path and the figures."""
        out = self.given.out
        with whole_or_nothing(out / "report.json") as partial:
            partial.write_text(json.dumps(finite(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
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
                line += f"; {shown(report['models'][1]['name'], 60)} {apart} ({interval}), p {chance(compared[name]['p'])}: {word}"
            say(line)
        result(out / "report.html")


def finite(value: Any) -> Any:
    """The record with null for what is no number that JSON has: the ends of an interval of too few prompts."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
