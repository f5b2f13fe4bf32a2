"""Pictures alone, as an autoencoder trains on them: cropped, coloured and mirrored by draws that depend on seed, epoch and id alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from latentfm.data.images import WHITE, Transform, apply, opened_rgb
from latentfm.data.inventory import Inventory, unchanged
from latentfm.data.loader import Draws, Dropout, Reader, Request, places_of
from latentfm.data.table import SampleTable

COLOUR_ORDERS = list(permutations(range(3)))


@dataclass
class PixelBatch:
    """Pictures uint8 [B, 3, H, W], the noise of their posterior's draw [B, C, h, w] float32, their ids."""

    pixels: Tensor
    noise: Tensor
    ids: list[str]

    def map(self, function: Callable[[Tensor], Tensor]) -> "PixelBatch":
        return replace(self, pixels=function(self.pixels), noise=function(self.noise))

    def to(self, device: torch.device) -> "PixelBatch":
        """The batch on `device`; copies from pinned memory do not wait."""
        return self.map(lambda value: value.to(device, non_blocking=True))

    def pin_memory(self) -> "PixelBatch":
        return self.map(Tensor.pin_memory)


@dataclass(frozen=True)
class Variety:
    """What is drawn for a picture. Off, it is the picture as a training of the network sees it: scaled to cover its shape, the middle."""

    flip: bool = False
    random_crop: bool = False  # of the picture's own pixels, scaled only where it is too small
    random_background: float = 0.0  # the share of draws that have transparency on a random colour instead of white
    permute_colours: float = 0.0  # the share of draws that have red, green and blue in another order


class PixelReader(Reader):
    """reader[(members, 0)] is a PixelBatch of an inventory's samples, for latents of `channels`."""

    def __init__(self, inventory: Inventory, seed: int, channels: int, variety: Variety):
        self.table, self.inventory, self.channels, self.variety = SampleTable.of(inventory.samples), inventory, channels, variety
        self.draws = Draws(seed, Dropout(0.0, 0.0))

    def __getitem__(self, request: Request) -> PixelBatch:
        (members, _), inventory, variety = request, self.inventory, self.variety
        samples = [inventory.samples[index] for _, index, _ in members]
        shape = inventory.transform(samples[0], False)
        ids, places = places_of(self.table, members)
        names = ("flip", "crop/across", "crop/down", "background", "red", "green", "blue", "permute", "permutation")
        drawn = {name: self.draws.uniform(name, places).tolist() for name in names}
        pictures = []
        for row, sample in enumerate(samples):
            u = {name: values[row] for name, values in drawn.items()}
            colour = WHITE
            if u["background"] < variety.random_background:
                colour = tuple(int(256 * u[name]) for name in ("red", "green", "blue"))
            with opened_rgb(sample.path, unchanged(sample.path, inventory.digests[sample.id]), colour) as image:
                pixels = crop(image, shape, u["crop/across"], u["crop/down"]) if variety.random_crop else apply(image, shape)
            if variety.flip and u["flip"] < 0.5:
                pixels = pixels[:, ::-1]
            if u["permute"] < variety.permute_colours:
                pixels = pixels[..., COLOUR_ORDERS[int(len(COLOUR_ORDERS) * u["permutation"])]]
            pictures.append(torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))))
        latents = self.channels, shape.height // inventory.factor, shape.width // inventory.factor
        return PixelBatch(torch.stack(pictures), self.draws.normal("vae_noise", places, latents), ids)

    def plain(self) -> "PixelReader":
        """The reader without any variety: what a training of the network sees."""
        return PixelReader(self.inventory, self.draws.seed, self.channels, Variety())


def crop(image: Image.Image, shape: Transform, across: float, down: float) -> np.ndarray:
    """A crop of an RGB picture, uint8 [height, width, 3], at a place in [0, 1) of what there is room for; scaled to cover if too small."""
    if image.width < shape.width or image.height < shape.height:
        image = ImageOps.cover(image, (shape.width, shape.height), Image.Resampling.LANCZOS)
    left, top = int((image.width - shape.width + 1) * across), int((image.height - shape.height + 1) * down)
    return np.array(image.crop((left, top, left + shape.width, top + shape.height)))


def batches_of(indices: Sequence[int], bucket_of: np.ndarray, size: int) -> list[list[int]]:
    """The indices in lists of one bucket and at most `size`."""
    by_bucket: dict[int, list[int]] = {}
    for index in indices:
        by_bucket.setdefault(int(bucket_of[index]), []).append(index)
    return [found[first : first + size] for _, found in sorted(by_bucket.items()) for first in range(0, len(found), size)]
