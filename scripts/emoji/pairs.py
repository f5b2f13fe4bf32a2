"""What the text encoders learn from: pictures with captions, and words that mean the same. Used by encoders.py."""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from render import SIZE
from torch import Tensor, nn

from latentfm.data.cache.fill import map_ahead
from latentfm.data.images import open_rgb

PARTS = {"plain": 0.4, "styled": 0.3, "scenes": 0.3}  # how often the pictures of each are drawn
MEANINGS = 64  # meanings of words in a batch
VISION_SIZE = 64


class Pairs:
    """The training pictures and their captions: uint8 [N, 3, 64, 64], N lists of strings, and what words mean."""

    def __init__(self, pictures: Path, meanings: list[list[str]]):
        self.captions: list[list[str]] = []
        self.paths: list[Path] = []
        self.parts: list[range] = []
        for part in PARTS:
            rows = [json.loads(line) for line in (pictures / part / "metadata.jsonl").read_text("utf-8").splitlines()]
            self.parts.append(range(len(self.paths), len(self.paths) + len(rows)))
            self.captions += [row["text"] for row in rows]
            self.paths += [pictures / part / row["file_name"] for row in rows]
        self.meanings = meanings
        self.pictures = torch.from_numpy(np.stack(list(opened(self.paths, SIZE // VISION_SIZE)))).permute(0, 3, 1, 2).contiguous()

    def texts(self) -> list[str]:
        """Everything that is said, for the tokenizers: captions three times, what words mean once."""
        said = sorted({caption for captions in self.captions for caption in captions})
        return said * 3 + [text for meaning in self.meanings for text in meaning]

    def batch(self, size: int, step: int, seed: int) -> tuple[list[int], list[str], random.Random]:
        """(indices, one drawn caption each, the step's generator): a function of (seed, step) alone."""
        rng = random.Random(f"{seed}/{step}")
        indices = [rng.choice(part) for part in rng.choices(self.parts, weights=list(PARTS.values()), k=size)]
        return indices, [rng.choice(self.captions[i]) for i in indices], rng

    def images(self, indices: list[int], rng: random.Random) -> Tensor:
        """Float pictures in [-1, 1], [B, 3, 64, 64], each shifted by up to 4 pixels on white."""
        padded = nn.functional.pad(self.pictures[indices], (4, 4, 4, 4), value=255)
        top, left = rng.randint(0, 8), rng.randint(0, 8)
        return padded[..., top : top + VISION_SIZE, left : left + VISION_SIZE].float() / 127.5 - 1

    def same_meaning(self, rng: random.Random) -> list[str]:
        """2 x MEANINGS texts: text i and text i + MEANINGS mean the same, and no others do."""
        twos = [rng.sample(meaning, 2) for meaning in rng.sample(self.meanings, MEANINGS)]
        return [one for one, _ in twos] + [other for _, other in twos]


def opened(paths: list[Path], factor: int = 1) -> Iterator[np.ndarray]:
    """Pictures, uint8 [H, W, 3], a `factor` smaller, in order."""
    return map_ahead(lambda path: np.asarray(open_rgb(path).reduce(factor)), paths, os.cpu_count() or 1, 256)


def contrast(features: Tensor, temperature: float = 0.07) -> Tensor:
    """InfoNCE between the two halves of features [2 N, D]: row i of the first should find row i of the second, and back."""
    one, other = nn.functional.normalize(features.float(), dim=-1).chunk(2)
    scores, own = one @ other.T / temperature, torch.arange(len(one), device=one.device)
    return (nn.functional.cross_entropy(scores, own) + nn.functional.cross_entropy(scores.T, own)) / 2
