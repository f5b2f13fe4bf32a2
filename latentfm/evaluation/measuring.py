"""What is measured of each picture, and the figures of a set of them."""

import base64
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from latentfm.data.images import open_rgb
from latentfm.errors import InputError
from latentfm.evaluation import distances, intervals
from latentfm.evaluation.features import stored
from latentfm.evaluation.geneval import TASKS, Asked, verdict
from latentfm.files import read_json, reading, whole_or_nothing

if TYPE_CHECKING:
    from latentfm.evaluation.detection import Detector
    from latentfm.evaluation.features import Clip

AT_ONCE = 16  # pictures that a network looks at
NEAR = 0.05  # a picture is a copy where it is nearer to a known one than this share of the known ones are to each other


@dataclass(frozen=True)
class Instruments:
    """What pictures are measured by, whatever of it there is. space: what has `features(pictures)` and a name."""

    detector: "Detector | None" = None
    clip: "Clip | None" = None
    space: Any = None

    @property
    def named(self) -> dict[str, Any]:
        return {"detector": self.detector, "clip": self.clip, "space": self.space}

    def told(self) -> dict[str, str | None]:
        """The names of the detector, CLIP and the space."""
        names = {part: getattr(each, "name", None) for part, each in self.named.items()}
        return names | ({"space": "the emoji detector's last layer"} if self.space is not None and self.space is self.detector else {})

    def fingerprints(self) -> dict[str, str]:
        """By the same parts, of those that there are, what tells their weights and settings from any others of that name."""
        return {part: each.fingerprint for part, each in self.named.items() if each is not None}

    def rows(self, pictures: Sequence[tuple[Path, Asked | None]], classes: Sequence[str], advance: Callable[[int], None]) -> list[dict]:
        """Of each picture, and what it was asked to show if anything, a row that JSON holds: {"found", "right", "wrong", "clip",
        "features", "clip_features"}, of which there is what there are instruments for. advance(n): n more are done.
        """
        rows: list[dict] = []
        for start in range(0, len(pictures), AT_ONCE):
            part = pictures[start : start + AT_ONCE]
            images, few = [open_rgb(path) for path, _ in part], [{} for _ in part]
            told = [asked for _, asked in part if asked is not None]
            if self.detector is not None and classes and told:
                for row, (_, asked), found in zip(few, part, self.detector.detect(images, classes), strict=True):
                    row["found"] = [asdict(thing) for thing in found]
                    if asked.include:
                        row["right"], row["wrong"] = verdict(asked, found)
            if self.clip is not None:
                seen = self.clip.images(images)
                for row, each in zip(few, seen, strict=True):
                    row["clip_features"] = packed(each)
                if told:
                    alike = (seen * self.clip.texts([asked.prompt for asked in told])).sum(dim=1)
                    for row, cosine in zip(few, alike.tolist(), strict=True):
                        row["clip"] = 100 * max(0.0, cosine)
            if self.space is not None and self.space is not self.clip:
                for row, each in zip(few, self.space.features(images), strict=True):
                    row["features"] = packed(each)
            rows += few
            advance(len(part))
        return rows


def packed(values: Tensor) -> str:
    """The numbers as text."""
    return base64.b64encode(values.numpy().astype("<f4").tobytes()).decode()


def unpacked(rows: Sequence[dict], name: str) -> Tensor | None:
    """[N, D] of what rows hold, taken out of them; None where they hold none."""
    if not rows or name not in rows[0]:
        return None
    return torch.from_numpy(np.stack([np.frombuffer(base64.b64decode(row.pop(name)), "<f4") for row in rows]).astype(np.float32))


@dataclass
class Measured:
    """The pictures of a model with some settings. rows: of each its prompt's index, seed, file, and what was found.

    features: of the space that is named, clip: CLIP's, [N, D] each.
    """

    name: str
    told: dict[str, Any]
    prompts: list[str]
    rows: list[dict]
    features: Tensor | None = None
    clip: Tensor | None = None
    figures: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def of(self) -> np.ndarray:
        """[N]: the prompt of each picture."""
        return np.array([row["prompt"] for row in self.rows])

    @property
    def space(self) -> Tensor | None:
        return self.clip if self.features is None else self.features

    def save(self, folder: Path) -> None:
        """Writes features.safetensors beside the report, for a later comparison."""
        from safetensors.torch import save_file

        tensors = {name: value.contiguous() for name, value in (("features", self.features), ("clip", self.clip)) if value is not None}
        with whole_or_nothing(folder / "features.safetensors") as partial:
            save_file(tensors or {"none": torch.zeros(0)}, partial)

    @classmethod
    def load(cls, folder: Path) -> tuple["Measured", dict[str, Any]]:
        """(the model that an evaluation in `folder` is of, its report). Raises InputError where it holds none."""
        report = read_json(folder / "report.json", most=2**30)
        with reading(folder, "evaluate the model again"):
            model, tensors = report["models"][0], stored(folder / "features.safetensors")
            names = [each["prompt"] for each in report["prompts"]]
            found = cls(model["name"], model["told"], names, model["pictures"], tensors.get("features"), tensors.get("clip"))
        return found, report


@dataclass(frozen=True)
class Known:
    """Real pictures that drawn ones are compared with, taken as they are: what the intervals vary is the drawn ones."""

    paths: list[str]
    features: Tensor | None
    clip: Tensor | None

    @property
    def space(self) -> Tensor | None:
        return self.clip if self.features is None else self.features

    @cached_property
    def gaussian(self) -> tuple[Tensor, Tensor]:
        return distances.gaussian(self.space)

    @cached_property
    def radius(self) -> Tensor:
        return distances.radius(self.space)

    @cached_property
    def near(self) -> float:
        """The distance below which a picture is a copy."""
        return float(distances.own_nearest(self.space).quantile(NEAR))

    def distances(self, drawn: Tensor, clip: Tensor | None) -> dict[str, float]:
        """FID, precision, recall, density, coverage and CMMD (MMD where the space is not CLIP's) of drawn pictures' features."""
        found = {"fid": distances.frechet(self.gaussian, distances.gaussian(drawn)), **distances.prdc(self.space, drawn, self.radius)}
        if clip is not None and self.clip is not None:
            return found | {"cmmd": distances.cmmd(self.clip, clip)}
        return found | {"mmd": distances.cmmd(self.space, drawn)}


def by_picture(measured: Measured, asked: Sequence[Asked], known: Known | None) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(figure's name, values, the prompt of each) of all figures that are means over pictures or prompts."""
    prompts = measured.of
    task = np.array([asked[prompt].task or "" for prompt in prompts])
    judged = np.array(["right" in row for row in measured.rows])
    right = np.array([float(row.get("right", 0)) for row in measured.rows])
    for name in TASKS:
        if (chosen := judged & (task == name)).any():
            yield name, right[chosen], prompts[chosen]
    if measured.rows and "clip" in measured.rows[0]:
        yield "clip_score", np.array([row["clip"] for row in measured.rows]), prompts
    if measured.space is not None:
        several = [prompt for prompt in np.unique(prompts) if (prompts == prompt).sum() > 1]
        if several:
            spread = [distances.spread(measured.space[torch.from_numpy(prompts == prompt)]) for prompt in several]
            yield "diversity", np.array(spread), np.array(several)
    if known is not None:
        apart, which = distances.nearest(measured.space, known.space)
        for row, distance, index in zip(measured.rows, apart.tolist(), which.tolist(), strict=True):
            row["nearest"] = [known.paths[index], distance]
        yield "nearest", apart.numpy(), prompts
        yield "copies", (apart < known.near).double().numpy(), prompts


def overall(found: dict[str, tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(right, prompts, tasks) of all pictures that were judged."""
    tasks = [name for name in TASKS if name in found]
    parts = [(*found[name], np.full(len(found[name][0]), name)) for name in tasks]
    return tuple(np.concatenate(each) for each in zip(*parts, strict=True))


def figures(measured: Measured, asked: Sequence[Asked], known: Known | None) -> dict[str, dict[str, float]]:
    """Every figure of the pictures, with its interval, by name."""
    found = {name: (values, prompts) for name, values, prompts in by_picture(measured, asked, known)}
    result = {}
    if found.keys() & TASKS.keys():
        result["overall"] = intervals.share(*overall(found))
    for name, (values, prompts) in found.items():
        result[name] = (intervals.share if name in TASKS or name == "copies" else intervals.mean)(values, prompts)
    if known is not None:
        result |= intervals.jackknife(lambda kept: known.distances(*chosen(measured, kept)), measured.of, len(measured.rows))
    return result


def chosen(measured: Measured, prompts: np.ndarray) -> tuple[Tensor, Tensor | None]:
    """(features, CLIP's features or None) of the pictures of some prompts."""
    kept = torch.from_numpy(np.isin(measured.of, prompts))
    return measured.space[kept], None if measured.clip is None else measured.clip[kept]


def compare(first: Measured, second: Measured, asked: Sequence[Asked], known: Known | None) -> dict[str, dict[str, float]]:
    """Every figure's difference, second - first, prompt by prompt, with its interval and p. Raises InputError for other prompts.

    Means over pictures by `intervals.paired`; distances between sets by the jackknife over the prompts of both at once.
    """
    if first.prompts != second.prompts:
        raise InputError(f"{second.name} was evaluated on other prompts than {first.name}; evaluate both on one file")
    sides = [{name: (values, of) for name, values, of in by_picture(each, asked, known)} for each in (first, second)]
    found = {}
    if all(side.keys() & TASKS.keys() for side in sides):
        weighted = []
        for right, of, task in map(overall, sides):
            prompts, places = np.unique(of, return_index=True)
            tasks, place, number = np.unique(task[places], return_inverse=True, return_counts=True)
            weighted.append(intervals.by_prompt(right, of) * len(prompts) / (len(tasks) * number[place]))
        found["overall"] = intervals.paired(*weighted)
    for name in sides[0]:
        if name in sides[1]:
            means = [intervals.by_prompt(*side[name]) for side in sides]
            if len(means[0]) == len(means[1]):
                found[name] = intervals.paired(*means)
    if known is not None:
        def apart(kept: np.ndarray) -> dict[str, float]:
            before, after = (known.distances(*chosen(each, kept)) for each in (first, second))
            return {name: after[name] - before[name] for name in before if name in after}

        found |= intervals.jackknife(apart, first.of, len(first.rows))
    return found
