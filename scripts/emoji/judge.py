"""Whether a picture shows what was asked for: by the nearest render, and of composed scenes by the nearest drawing. Used by measure.py.

Distances are Euclidean on pixels in [-1, 1] averaged down to 24 x 24, as in latentfm.evaluation.retrieval.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from render import SIZE
from scenes import COLOURS, PLACES, Scene, draw
from sets import PLAIN
from torch import Tensor

from latentfm.data.images import to_tensor
from latentfm.evaluation.retrieval import COMPARED_AT, shrink

PLACES_OF = {1: "one", 2: "across", 3: "three", 4: "four"}


def features(images: Iterable[Image.Image]) -> Tensor:
    """[N, 3 x 24 x 24]: what pictures are compared by; RGB of any one size."""
    return torch.cat([shrink(to_tensor(np.asarray(image))[None]) for image in images]).double()


class Judge:
    """Knows how each thing looks in the plain style: code -> RGBA picture, any size."""

    def __init__(self, things: dict[str, Image.Image]):
        self.things = things
        self.codes = list(things)
        self.looks = lru_cache(maxsize=None)(self.looks_of)

    def looks_of(self, side: int, colour: str | None) -> Tensor:
        """[things, 3 x 24 x 24]: each thing `side` pixels large on a colour, or on white."""
        flat = [self.things[code].convert("RGBa").resize((side, side), Image.Resampling.LANCZOS) for code in self.codes]
        pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in flat]) / 255
        ground = torch.tensor(COLOURS[colour] if colour else (255, 255, 255)).reshape(3, 1, 1) / 255
        return shrink((pixels[:, :3] + (1 - pixels[:, 3:]) * ground) * 2 - 1, COMPARED_AT).double()

    def things_right(self, picture: Image.Image, scene: Scene) -> bool:
        """Whether at each of the scene's places the asked thing is the nearest of all."""
        for thing, (x, y, side) in zip(scene.things, PLACES[scene.places], strict=True):
            x, y, side = (round(value * SIZE / 128) for value in (x, y, side))
            box = (x - side // 2, y - side // 2, x - side // 2 + side, y - side // 2 + side)
            distances = torch.cdist(features([picture.crop(box)]), self.looks(side, scene.colour))
            if self.codes[int(distances.argmin())] != thing.code:
                return False
        return True

    def arranged_right(self, picture: Image.Image, scene: Scene) -> bool:
        """Whether, of the same things in other numbers or places, the scene as asked is the nearest drawing."""
        if scene.kind == "count":
            others = [replace(scene, things=scene.things[:1] * n, places=PLACES_OF[n]) for n in PLACES_OF]
        elif scene.kind in ("left", "above"):
            turned = replace(scene, things=scene.things[::-1])
            others = [replace(each, places=places) for each in (scene, turned) for places in ("across", "down")]
        else:
            return True
        drawn = features(draw(other, lambda style, code: self.things[code]) for other in others)
        return others[int(torch.cdist(features([picture]), drawn).argmin())] == scene

    def ground_right(self, picture: Image.Image, scene: Scene) -> bool:
        """Whether the corners are nearest to the scene's colour, of all colours and white."""
        pixels = np.asarray(picture.convert("RGB"), np.float64)
        corner = np.median([pixels[y : y + 6, x : x + 6].mean(axis=(0, 1)) for y in (0, SIZE - 6) for x in (0, SIZE - 6)], axis=0)
        grounds = {None: (255, 255, 255), **COLOURS}
        return min(grounds, key=lambda name: np.abs(corner - grounds[name]).sum()) == scene.colour

    def verdict(self, picture: Image.Image, scene: Scene) -> dict[str, bool]:
        """What is right about a picture of `scene`, and whether all of it is. Raises ValueError for another style or size."""
        if scene.style != PLAIN or picture.size != (SIZE, SIZE):
            raise ValueError(f"scenes are judged in the {PLAIN} style at {SIZE} pixels, not {scene.style} at {picture.size}")
        said = {"things": self.things_right(picture, scene), "arranged": self.arranged_right(picture, scene)}
        said["ground"] = self.ground_right(picture, scene)
        return said | {"all": all(said.values())}
