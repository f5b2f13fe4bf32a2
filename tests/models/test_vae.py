"""Latents in and out of an AutoencoderKL, against diffusers' own arithmetic."""

import pytest
import torch
from diffusers import AutoencoderKL
from tiny import VAE_LEVELS

from latentfm.models.vae import decode, downsampling, encode_moments, sample_latents, shift_and_scale


@pytest.fixture(scope="module")
def vae(tiny_folder) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(tiny_folder / "vae").eval()


def make_vae(**config) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8),
        latent_channels=4, norm_num_groups=4, **config,
    ).eval()  # fmt: skip


def pictures(batch: int = 2, size: int = 32) -> torch.Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_moments_are_the_posterior(vae):
    images = pictures()
    moments = encode_moments(vae, images)
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
    assert moments.shape == (2, 8, 8, 8) and not moments.requires_grad
    mean, logvar = moments.chunk(2, dim=1)
    assert torch.equal(mean, posterior.mean) and torch.equal(logvar, posterior.logvar)
    assert mean.std() > 0 and logvar.std() > 0


def test_sampled_latents_are_diffusers(vae):
    images = pictures()
    with torch.no_grad():
        drawn = vae.encode(images).latent_dist.sample(torch.Generator().manual_seed(3))
    noise = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(3))
    latents = sample_latents(encode_moments(vae, images), noise, *shift_and_scale(vae))
    torch.testing.assert_close(latents, (drawn - 0.0609) * 1.5305, rtol=1e-5, atol=1e-6)
    other = sample_latents(encode_moments(vae, images), noise + 1, *shift_and_scale(vae))
    assert (other - latents).abs().min() > 0


def test_decode_undoes_shift_and_scale(vae):
    images = pictures()
    with torch.no_grad():
        z = vae.encode(images).latent_dist.mean
        straight = vae.decode(z).sample
    latents = sample_latents(encode_moments(vae, images), torch.zeros_like(z), 0.0609, 1.5305)
    assert (latents - z).abs().max() > 1e-2
    torch.testing.assert_close(decode(vae, latents), straight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(latents / 1.5305 + 0.0609, z, rtol=1e-5, atol=1e-6)


def test_a_vae_without_shift_factor():
    vae = make_vae(scaling_factor=0.5)
    assert vae.config.shift_factor is None
    assert shift_and_scale(vae) == (0.0, 0.5)
    images = pictures()
    moments = encode_moments(vae, images)
    mean = moments[:, :4]
    latents = sample_latents(moments, torch.zeros_like(mean), *shift_and_scale(vae))
    assert torch.equal(latents, mean * 0.5)
    with torch.no_grad():
        torch.testing.assert_close(decode(vae, latents), vae.decode(mean).sample, rtol=1e-5, atol=1e-6)


def test_shift_and_scale_and_factor_come_from_the_configuration(vae):
    assert shift_and_scale(vae) == (0.0609, 1.5305)
    assert downsampling(vae) == 2 ** (len(VAE_LEVELS) - 1) == 4
    assert downsampling(make_vae()) == 2
    images = pictures(size=16)
    assert encode_moments(vae, images).shape[-1] * downsampling(vae) == 16


def test_a_bf16_vae_gives_float32_moments_and_takes_float32_latents():
    vae = make_vae(scaling_factor=1.0).bfloat16()
    moments = encode_moments(vae, pictures())
    assert moments.dtype == torch.float32
    assert decode(vae, torch.randn(1, 4, 8, 8)).dtype == torch.bfloat16
