"""Measures of reconstructions against independent formulas, and latents brought to mean 0 and deviation 1."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from latentfm.training.vae.quality import LatentStatistics, edge_strength, measures, psnr, ssim


def test_psnr_of_a_known_error():
    """A reconstruction off by 16 of 255 levels everywhere has 20 log10(255 / 16) dB."""
    pictures = torch.zeros(3, 3, 8, 8)
    torch.testing.assert_close(psnr(pictures + 16 / 127.5, pictures), torch.full((3,), 20 * np.log10(255 / 16), dtype=torch.float64))
    assert psnr(torch.full((1, 3, 4, 4), 7.0), torch.ones(1, 3, 4, 4)).item() > 100  # what is saved is clipped
    half = torch.cat([pictures[:1, :, :4] + 16 / 127.5, pictures[:1, :, 4:]], dim=2)
    assert psnr(half, pictures[:1]).item() == pytest.approx(20 * np.log10(255 / 16) + 10 * np.log10(2))


def test_ssim_is_that_of_scipys_gaussian_filter():
    """Wang et al. 2004 by another hand: whole Gaussian filters, of which what the windows that fit see is kept."""
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(2, 3, 24, 30, generator=generator) * 2 - 1
    output = (target + 0.3 * torch.randn(target.shape, generator=generator)).clamp(-1, 1)

    def by_scipy(a, b):
        values = []
        for x, y in zip((a.double().numpy() + 1) / 2, (b.double().numpy() + 1) / 2, strict=True):  # channels
            def local(plane):
                return gaussian_filter(plane, 1.5, truncate=5 / 1.5)[5:-5, 5:-5]

            ux, uy = local(x), local(y)
            vx, vy, vxy = local(x * x) - ux * ux, local(y * y) - uy * uy, local(x * y) - ux * uy
            values.append(((2 * ux * uy + 1e-4) * (2 * vxy + 9e-4) / ((ux**2 + uy**2 + 1e-4) * (vx + vy + 9e-4))).mean())
        return np.mean(values)

    wanted = [by_scipy(a, b) for a, b in zip(output, target, strict=True)]
    np.testing.assert_allclose(ssim(output, target).numpy(), wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(ssim(target, target), torch.ones(2, dtype=torch.float64))


def test_a_blurred_picture_has_fewer_edges():
    noise = torch.rand(2, 3, 32, 32) * 2 - 1
    blurred = torch.nn.functional.avg_pool2d(noise, 3, 1, 1)
    assert (edge_strength(blurred) < 0.5 * edge_strength(noise)).all()
    found = measures(noise, noise, torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 8, 8))
    assert found["edges"].tolist() == [1.0, 1.0] and found["kl"].abs().max() == 0 and found["kl"].shape == (2, 4)
    flat = measures(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16), torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 4, 4))
    assert flat["edges"].tolist() == [1.0]  # none of none
    assert "ssim" not in measures(noise[..., :8, :8], noise[..., :8, :8], torch.zeros(2, 4, 2, 2), torch.zeros(2, 4, 2, 2))


def test_statistics_are_those_of_draws():
    """Over many draws of the posteriors, scaled latents have mean 0 and deviation 1, in whatever batches they were counted."""
    generator = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(6, 4, 3, 3, generator=generator) * 2 + 5, torch.randn(6, 4, 3, 3, generator=generator)
    whole, parts = LatentStatistics(), LatentStatistics()
    whole.add(mean, logvar)
    for row in range(6):
        parts.add(mean[row : row + 1], logvar[row : row + 1])
    assert parts.shift_and_scale() == pytest.approx(whole.shift_and_scale(), rel=1e-12)
    shift, scale = whole.shift_and_scale()
    draws = mean + (0.5 * logvar).exp() * torch.randn(4000, *mean.shape, generator=generator)
    latents = (draws.double() - shift) * scale
    assert abs(latents.mean().item()) < 2e-3 and latents.std().item() == pytest.approx(1, abs=2e-3)
