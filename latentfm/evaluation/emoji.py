"""A detector of the things in the project's own art, emoji and scenes of them: a small CenterNet (Zhou et al. 2019, "Objects as Points").

scripts/emoji/detector.py trains it, validates it and writes its weights. What it knows is in config.json beside them: each of its labels
is a class and, where the art has the thing in several, a colour.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from latentfm.errors import InputError, nearest
from latentfm.evaluation.detection import Detection
from latentfm.evaluation.features import fingerprint, stored
from latentfm.files import read_json, reading

if TYPE_CHECKING:
    from collections.abc import Sequence

SIZE, CELLS = 128, 8  # pixels a side that it looks at, and cells a side of its answer
THRESHOLD = 0.2  # chosen on other compositions than the detector is validated on


class Block(nn.Module):
    """A residual block of one dilated convolution."""

    def __init__(self, width: int, dilation: int):
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.silu(self.norm(x)))


class CenterNet(nn.Module):
    """Maps pictures [B, 3, 128, 128] in [-1, 1] to (logits of each label [B, labels, 8, 8], boxes [B, 4, 8, 8]).

    A thing is where the cell that its middle is in says so; the cell's box is (x, y) of the middle within the cell, and width and
    height, both in shares of the picture.
    """

    def __init__(self, labels: int, widths: "Sequence[int]" = (48, 96, 128)):
        super().__init__()
        first, second, width = widths
        self.trunk = nn.Sequential(
            nn.Conv2d(3, first, 7, stride=4, padding=3), nn.GroupNorm(8, first), nn.SiLU(),
            nn.Conv2d(first, second, 3, stride=2, padding=1), Block(second, 1), nn.GroupNorm(8, second), nn.SiLU(),
            nn.Conv2d(second, width, 3, stride=2, padding=1), Block(width, 1), Block(width, 2), nn.GroupNorm(8, width), nn.SiLU(),
        )  # fmt: skip
        self.classes, self.boxes = nn.Conv2d(width, labels, 1), nn.Conv2d(width, 4, 1)
        nn.init.constant_(self.classes.bias, -4.0)  # nearly every cell is empty: else the first steps are spent on learning that

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(pictures)
        return self.classes(features), self.boxes(features).sigmoid()


def tensors(pictures: "Sequence[Image.Image]") -> Tensor:
    """[B, 3, 128, 128] in [-1, 1]: RGB pictures of any size as the network looks at them."""
    sized = [np.asarray(picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for picture in pictures]
    return torch.from_numpy(np.stack(sized)).permute(0, 3, 1, 2).float() / 127.5 - 1


def found_in(logits: Tensor, boxes: Tensor, threshold: float = THRESHOLD) -> list[list[tuple[int, float, tuple[float, ...]]]]:
    """Of each picture its things, the surest first: (label, score, (left, top, right, bottom) in shares of the picture).

    A thing is a cell whose best label is surer than those of the cells around it, and than the threshold.
    """
    scores, labels = logits.float().sigmoid().max(dim=1)  # [B, 8, 8]
    peaks = (scores == F.max_pool2d(scores[:, None], 3, stride=1, padding=1)[:, 0]) & (scores >= threshold)
    found: list[list[tuple[int, float, tuple[float, ...]]]] = [[] for _ in logits]
    for picture, row, column in peaks.nonzero().tolist():
        x, y, width, height = boxes[picture, :, row, column].tolist()
        x, y = (column + x) / CELLS, (row + y) / CELLS
        box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        found[picture].append((int(labels[picture, row, column]), scores[picture, row, column].item(), box))
    return [sorted(each, key=lambda one: -one[1]) for each in found]


class EmojiDetector:
    """Finds the things of the project's art. labels: (class, colour or None) of each of the network's outputs.

    validation: how often it was right about composed pictures, as scripts/emoji/detector.py wrote it; None if it was not asked.
    fingerprint: of its files, empty where it was not loaded from any.
    """

    name = f"emoji, scores from {THRESHOLD:g}"
    tells_colours = True

    def __init__(self, network: CenterNet, labels: "Sequence[tuple[str, str | None]]"):
        self.network, self.labels = network.eval(), list(labels)
        self.classes = list(dict.fromkeys(name for name, _ in labels))
        self.validation: dict | None = None
        self.fingerprint = ""

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> "EmojiDetector":
        """The detector of a folder with config.json and model.safetensors, on a device. Raises InputError when it cannot be read."""
        config = read_json(folder / "config.json")
        with reading(folder, "reinstall latentfm, or run scripts/emoji/detector.py"):
            labels = [(name, colour) for name, colour in config["labels"]]
            network = CenterNet(len(labels), config["widths"])
            network.load_state_dict({name: value.float() for name, value in stored(folder / "model.safetensors").items()})
        found = cls(network.to(device), labels)
        found.fingerprint = fingerprint(folder, ("config.json", "model.safetensors"))
        if (folder / "validation.json").is_file():
            found.validation = read_json(folder / "validation.json")
        return found

    def check(self, classes: "Sequence[str]") -> None:
        """Raises InputError for a class that it does not know."""
        for name in classes:
            if name not in self.classes:
                raise InputError(f"the emoji detector knows no '{name}'{nearest(name, self.classes)}; name another by --detector")

    @torch.no_grad()
    def detect(self, pictures: "Sequence[Image.Image]", classes: "Sequence[str]") -> list[list[Detection]]:
        """The things of `classes` in each picture, the surest first, boxes in the picture's pixels, with colours where they have one."""
        results = []
        device = next(self.network.parameters()).device
        for picture, things in zip(pictures, found_in(*self.network(tensors(pictures).to(device))), strict=True):
            sides = (picture.width, picture.height) * 2
            own = [(self.labels[label], score, tuple(edge * side for edge, side in zip(box, sides))) for label, score, box in things]
            results.append([Detection(name, box, score, colour) for (name, colour), score, box in own if name in classes])
        return results

    @torch.no_grad()
    def features(self, pictures: "Sequence[Image.Image]") -> Tensor:
        """[B, 128] float32 on the CPU: the mean of the trunk's output, which pictures of this art may be compared by."""
        device = next(self.network.parameters()).device
        return self.network.trunk(tensors(pictures).to(device)).mean(dim=(2, 3)).cpu()
