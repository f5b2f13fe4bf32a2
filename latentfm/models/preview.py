"""A look at latents without the VAE: a linear map of their channels to colours, fitted once to the VAE and kept with it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentfm.models import vae as vae_room

SIDE, PICTURES = 16, 8  # of the latents that the map is fitted to


def latent_rgb(vae: nn.Module) -> Tensor:
    """The map [C + 1, 3] from a latent's channels and 1 to its colour in [-1, 1]; it hangs on the VAE, as its attribute `latent_rgb`."""
    if getattr(vae, "latent_rgb", None) is None:
        vae.latent_rgb = fitted(vae)
    return vae.latent_rgb


@torch.no_grad()
def fitted(vae: nn.Module) -> Tensor:
    """The map by least squares: what the VAE makes of smooth and of rough random latents, averaged over each latent's pixels."""
    generator = torch.Generator().manual_seed(0)
    channels = vae.config.latent_channels
    sides = (1, 2, 4, 8)  # of the patches of one value
    rough = [torch.randn(PICTURES // len(sides), channels, SIDE // side, SIDE // side, generator=generator) for side in sides]
    latents = torch.cat([F.interpolate(each, size=(SIDE, SIDE), mode="bilinear") / each.std() for each in rough])
    place = next(vae.parameters()).device
    pixels = torch.cat([vae_room.decode(vae, each[None].to(place)) for each in latents]).float().cpu().clamp(-1, 1)
    colours = F.adaptive_avg_pool2d(pixels, SIDE).movedim(1, -1).flatten(0, 2)
    return torch.linalg.lstsq(with_ones(latents.movedim(1, -1).flatten(0, 2)), colours).solution


def with_ones(values: Tensor) -> Tensor:
    return torch.cat([values, torch.ones_like(values[:, :1])], dim=1)


def colours_of(latents: Tensor, rgb: Tensor) -> Tensor:
    """Pictures [B, 3, h, w] in [-1, 1] of latents [B, C, h, w]."""
    flat = with_ones(latents.float().cpu().movedim(1, -1).flatten(0, 2))
    return (flat @ rgb).unflatten(0, (len(latents), *latents.shape[-2:])).movedim(-1, 1).clamp(-1, 1)


def readable(value: Any, channels: int) -> Tensor | None:
    """A map as a folder's file has it, lists of numbers; None for what is none, or for latents of other channels."""
    try:
        found = torch.tensor(value, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        return None
    return found if found.shape == (channels + 1, 3) and bool(found.isfinite().all()) else None
