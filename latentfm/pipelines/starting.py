"""What a call begins with: noise from generators or seeds, a picture's latents with noise on them, and a mask that keeps a part of them."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from latentfm.bounds import LAST_SEED
from latentfm.errors import InputError
from latentfm.models import vae as vae_room
from latentfm.pipelines.arguments import check_finite, generators, real_number, told, whole_number
from latentfm.pipelines.components import Components
from latentfm.words import shown

Generators = torch.Generator | list[torch.Generator] | None


@dataclass(frozen=True)
class Noise:
    """Where a call's noise comes from: `generator` for it and all later draws, and how far it is turned towards a second one's."""

    generator: Generators = None
    other: Generators = None
    turn: float = 0.0

    @classmethod
    def of(cls, generator: Any, seed: Any, variation_seed: Any, variation_strength: Any, pictures: int) -> "Noise":
        """The noise of a call for so many pictures. Raises InputError for what is none, and for a seed beside a generator."""
        if generator is not None and seed is not None:
            raise InputError("give generator or seed, one of the two")
        found = generators(generator) if seed is None else seeded("seed", seed, pictures)
        if isinstance(found, list) and len(found) != pictures:
            raise InputError(f"{len(found)} generators for {pictures} pictures; give one for each, or a single one")
        turn = real_number("variation_strength", variation_strength, "from 0, the noise itself, to 1, the variation's")
        if not 0 <= turn <= 1:
            raise InputError(f"variation_strength {turn:g} is not from 0, the noise itself, to 1, the variation's")
        if bool(turn) != (variation_seed is not None):
            raise InputError("variation_seed and a variation_strength above 0 need each other")
        return cls(found, None if variation_seed is None else seeded("variation_seed", variation_seed, pictures), turn)

    def draw(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        """Standard normal noise of `shape` [B, ...], in `dtype`."""
        noise = randn_tensor(shape, generator=self.generator, device=device, dtype=dtype)
        if self.other is None:
            return noise
        return turned(noise, randn_tensor(shape, generator=self.other, device=device, dtype=dtype), self.turn)


def seeded(name: str, seed: Any, pictures: int) -> list[torch.Generator]:
    """A generator for each picture: of each its own seed from a list, or of picture k the number `seed` + k. Raises InputError."""
    if isinstance(seed, list | tuple):
        if len(seed) != pictures:
            raise InputError(f"{len(seed)} numbers in {name} for {pictures} pictures; give one for each, or a single one")
        numbers = [whole_number(name, each, least=0, most=LAST_SEED) for each in seed]
    else:
        first = whole_number(name, seed, least=0, most=LAST_SEED - (pictures - 1))
        numbers = range(first, first + pictures)
    return [torch.Generator().manual_seed(number) for number in numbers]


def turned(noise: Tensor, other: Tensor, share: float) -> Tensor:
    """Noise [B, ...] turned towards `other` by a share of the angle between them, picture by picture, so that it stays noise (slerp)."""
    a, b = noise.float().flatten(1), other.float().flatten(1)
    angle = torch.acos((F.normalize(a) * F.normalize(b)).sum(1, keepdim=True).clamp(-1, 1))
    parts = (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)
    return torch.where(angle > 1e-4, parts, a).view_as(noise).to(noise.dtype)


@dataclass(frozen=True)
class Kept:
    """What inpainting keeps: clean latents [B, C, h, w] under `mask` 0, the drawn ones under 1; `noise` is what was drawn for the start."""

    clean: Tensor
    mask: Tensor
    noise: Tensor

    def put_into(self, x: Tensor, sigma: float) -> Tensor:
        """x with what is kept in its place, at the noise level sigma; at 0 it is the clean latents to the bit."""
        under = self.clean if sigma == 0 else at_level(self.clean, self.noise, sigma)
        return (1.0 - self.mask) * under + self.mask * x


def at_level(clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """sigma noise + (1 - sigma) clean, the state of the flow's path at t = 1 - sigma."""
    return sigma * noise + (1.0 - sigma) * clean


@dataclass(frozen=True)
class Beginning:
    """The state x [B, C, h, w] that a call begins with, what it keeps of a picture, and what an inpainting network reads beside x."""

    x: Tensor
    kept: Kept | None = None
    channels: Tensor | None = None


@dataclass(frozen=True)
class Canvas:
    """The picture that a call begins from, the mask of what is drawn anew of it, both of any kind that VaeImageProcessor takes.

    masked_latents: what an inpainting network reads of the picture, where not its unmasked part. padding: pixels around the mask's box, to
    which the call is cropped.
    """

    image: Any = None
    mask: Any = None
    masked_latents: Any = None
    padding: int | None = None

    def __post_init__(self) -> None:
        """Raises InputError for a mask without the picture, and for a crop without the mask."""
        if self.mask is not None and self.image is None:
            raise InputError("mask_image needs image, the picture that it is laid on")
        if self.padding is None:
            return
        if not (isinstance(self.mask, Image.Image) and isinstance(self.image, Image.Image)):
            raise InputError("padding_mask_crop needs image and mask_image as pictures of PIL's")
        if self.mask.size != self.image.size:
            raise InputError(f"mask_image of {self.mask.size} pixels does not fit image of {self.image.size}, which padding_mask_crop cuts")
        if not self.mask.convert("L").getbbox():
            raise InputError("mask_image is black everywhere, so that padding_mask_crop finds nothing to draw anew")

    def crop(self, pipe: Components, height: int, width: int) -> dict[str, Any]:
        """How the image processors cut the part around the mask out."""
        if self.padding is None:
            return {}
        padding = whole_number("padding_mask_crop", self.padding, least=0)
        return {"crops_coords": pipe.image_processor.get_crop_region(self.mask, width, height, padding), "resize_mode": "fill"}

    def begin(
        self, pipe: Components, shape: tuple[int, ...], noise: Noise, latents: Any, sigma: float, whole: bool, dtype: torch.dtype
    ) -> Beginning:
        """What a call for latents of `shape` begins with at noise level sigma.

        latents: given ones stand for the noise. whole: no step is left out. As in diffusers' pipelines given latents without a mask are the
        state itself, and with one all steps begin with noise alone.
        """
        device, pictures = pipe._execution_device, shape[0]
        given = None if latents is None else given_latents(latents, shape, device)
        if self.image is None:
            return Beginning(noise.draw(shape, device, dtype) if given is None else given)
        height, width = (side * pipe.vae_scale_factor for side in shape[-2:])
        crop = self.crop(pipe, height, width)
        image = prepared_picture(pipe, self.image, height, width, **crop)
        clean = clean_latents(pipe, image, noise.generator, pictures, dtype)
        drawn = noise.draw(shape, device, dtype) if given is None else given
        if self.mask is None:
            return Beginning(at_level(clean, drawn, sigma) if given is None else given)
        mask = prepared_mask(pipe, self.mask, height, width, **crop)
        small, channels = mask_for_latents(mask, shape[-2:], pictures).to(device, dtype), None
        if pipe.transformer.config.in_channels != pipe.latent_channels:
            seen = image * (mask < 0.5) if self.masked_latents is None else self.masked_latents
            channels = torch.cat([small, clean_latents(pipe, seen, noise.generator, pictures, dtype)], dim=1)
        start = drawn if whole or given is not None else at_level(clean, drawn, sigma)
        return Beginning(start, Kept(clean, small, drawn) if channels is None else None, channels)

    def overlaid(self, pipe: Components, pictures: list[Image.Image], height: int, width: int) -> list[Image.Image]:
        """The drawn crops put back into the whole picture; without a crop the pictures as they are."""
        if self.padding is None:
            return pictures
        box = self.crop(pipe, height, width)["crops_coords"]
        return [pipe.image_processor.apply_overlay(self.mask, self.image, picture, box) for picture in pictures]


def prepared_picture(pipe: Components, image: Any, height: int, width: int, **crop: Any) -> Tensor:
    """A picture or several as [N, 3, height, width] in [-1, 1]; latents [N, C, h, w] as they are. Raises InputError for anything else."""
    try:
        found = pipe.image_processor.preprocess(image, height=height, width=width, **crop)
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise InputError(f"image {told(image)} is no picture, list of pictures, array or tensor: {shown(error, 160)}") from error
    small = (height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
    if found.shape[1:] not in ((3, height, width), (pipe.latent_channels, *small)):
        raise InputError(
            f"image of shape {tuple(found.shape)}; these arguments need pictures of {width} x {height} in three colours, or latents of "
            f"{pipe.latent_channels} x {small[0]} x {small[1]}"
        )
    check_finite("image", found)
    return found.float()


def prepared_mask(pipe: Components, mask: Any, height: int, width: int, **crop: Any) -> Tensor:
    """A mask or several as [N, 1, height, width] of 0, which is kept, and 1, which is drawn. Raises InputError for what is none."""
    processor = VaeImageProcessor(
        vae_scale_factor=pipe.vae_scale_factor, vae_latent_channels=pipe.latent_channels, do_normalize=False, do_binarize=True,
        do_convert_grayscale=True,
    )  # fmt: skip
    try:
        found = processor.preprocess(mask, height=height, width=width, **crop).float()
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise InputError(f"mask_image {told(mask)} is no picture, array or tensor: {shown(error, 160)}") from error
    check_finite("mask_image", found)
    return found


def mask_for_latents(mask: Tensor, size: tuple[int, int], count: int) -> Tensor:
    """A mask [N, 1, H, W] in the latents' size, its rows repeated in turn. Raises InputError when these do not divide the pictures."""
    if count % len(mask):
        raise InputError(f"{len(mask)} masks for {count} pictures; give one for each, or a number that divides them")
    return F.interpolate(mask, size=size).repeat(count // len(mask), 1, 1, 1)


def clean_latents(pipe: Components, image: Tensor, generator: Generators, count: int, dtype: torch.dtype, sample: bool = True) -> Tensor:
    """Latents [count, C, h, w], in `dtype`, of what `prepared_picture` gave, its rows repeated in turn; `sample` draws of the posterior.

    Raises InputError when the rows do not divide the pictures.
    """
    if count % len(image):
        raise InputError(f"{len(image)} images for {count} pictures; give one for each, or a number that divides them")
    if image.shape[1] == pipe.latent_channels:
        return image.to(pipe._execution_device, dtype).repeat(count // len(image), 1, 1, 1)
    pipe.need("vae", to="encode the image", without="give its latents")
    device = pipe._execution_device
    if isinstance(generator, list):
        rows = [vae_room.encode(pipe.vae, image[i % len(image)][None].to(device), generator[i], sample) for i in range(count)]
        return torch.cat(rows).to(dtype)
    return vae_room.encode(pipe.vae, image.to(device), generator, sample).to(dtype).repeat(count // len(image), 1, 1, 1)


def given_latents(latents: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """`latents` on `device`. Raises InputError for what is not of `shape`."""
    if not isinstance(latents, Tensor) or not latents.is_floating_point() or tuple(latents.shape) != shape:
        what = f"of shape {tuple(latents.shape)}" if isinstance(latents, Tensor) else told(latents)
        raise InputError(f"latents {what}, these arguments need floating-point ones of shape {shape}")
    check_finite("latents", latents)
    return latents.to(device)
