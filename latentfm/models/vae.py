"""Images to latents and back through a frozen AutoencoderKL, with SD3's shift and scale."""

import torch
from torch import Tensor

from latentfm.errors import InputError


def shift_and_scale(vae: torch.nn.Module) -> tuple[float, float]:
    """(shift, scale) of a VAE's configuration; a VAE without shift_factor has shift 0."""
    return getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor


def downsampling(vae: torch.nn.Module) -> int:
    """How many pixels a side one latent covers."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


@torch.no_grad()
def encode_moments(vae: torch.nn.Module, images: Tensor) -> Tensor:
    """Posterior mean and log-variance, [B, 2 C, h, w] float32, of images [B, 3, H, W] in [-1, 1]."""
    posterior = vae.encode(images.to(vae.device, vae.dtype)).latent_dist
    return torch.cat([posterior.mean, posterior.logvar], dim=1).float()


@torch.no_grad()
def encode(vae: torch.nn.Module, images: Tensor, generator: torch.Generator | None = None, sample: bool = True) -> Tensor:
    """The MM-DiT's latents [B, C, h, w] of images [B, 3, H, W] in [-1, 1]: one draw of the posterior, or with sample=False its mode."""
    shift, scale = shift_and_scale(vae)
    found = vae.encode(images.to(vae.dtype))
    posterior = getattr(found, "latent_dist", None)  # a tiny autoencoder's latents are plain
    latents = found.latents if posterior is None else posterior.sample(generator) if sample else posterior.mode()
    return (latents - shift) * scale


def sample_latents(moments: Tensor, noise: Tensor, shift: float, scale: float) -> Tensor:
    """The MM-DiT's latents (z - shift) * scale for one posterior draw z = mean + std * noise; noise [B, C, h, w]."""
    mean, logvar = moments.chunk(2, dim=1)
    return (mean + (0.5 * logvar).exp() * noise - shift) * scale


@torch.no_grad()
def decode(vae: torch.nn.Module, latents: Tensor) -> Tensor:
    """Images [B, 3, H, W], about [-1, 1], of the MM-DiT's latents [B, C, h, w].

    Raises InputError for latents or images that are not finite, which would be black pictures.
    """
    if not torch.isfinite(latents).all():
        raise InputError(
            "the latents are not finite numbers: the network's numbers ran over, or its weights or the text encoders' are damaged; "
            "try a lower guidance, or float32"
        )
    shift, scale = shift_and_scale(vae)
    images = vae.decode((latents / scale + shift).to(vae.dtype), return_dict=False)[0]
    if not torch.isfinite(images).all():
        kind = str(vae.dtype).removeprefix("torch.")
        way_out = "its weights are damaged, copy it again" if vae.dtype is torch.float32 else "load the model in float32"
        raise InputError(f"the VAE decodes to numbers that are not finite in {kind}: {way_out}")
    return images
