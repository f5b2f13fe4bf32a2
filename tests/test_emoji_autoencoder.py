"""The VAE trainer: it learns, resumes exactly, and its measures are what they say."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts" / "emoji"))
from autoencoder import VAETraining, batch_at, edge_strength, latent_statistics, load_pictures, psnr, scheduled, ssim, train_vae

OPTIONS = VAETraining(
    size=16, steps=12, batch_size=4, warmup=2, mixed_precision="no", checkpoint_seconds=0, ema_decay=0.5, learning_rate=3e-3
)


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, layers_per_block=1, sample_size=16,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(6):
        pixels = np.random.default_rng(index).integers(0, 256, (5, 5, 4), np.uint8)
        Image.fromarray(pixels).resize((20, 18), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return folder


def test_it_learns_and_resumes_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    whole = train_vae(tiny_vae(), folder, tmp_path / "whole", OPTIONS)
    losses = [float(line.split('"loss": ')[1].split(",")[0]) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]

    class Stopped(Exception):
        pass

    def stopping_after(steps: int):
        seen = 0

        def batch(step: int, *arguments):
            nonlocal seen
            seen += 1
            if seen > steps:
                raise Stopped
            return batch_at(step, *arguments)

        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autoencoder.batch_at", stopping_after(6))
        with pytest.raises(Stopped):
            train_vae(tiny_vae(), folder, tmp_path / "broken", OPTIONS)
    resumed = train_vae(tiny_vae(), folder, tmp_path / "broken", OPTIONS)
    for (name, ours), theirs in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_other_options_do_not_resume(folder: Path, tmp_path: Path) -> None:
    train_vae(tiny_vae(), folder, tmp_path / "run", replace(OPTIONS, steps=4))
    with pytest.raises(ValueError, match="other options"):
        train_vae(tiny_vae(), folder, tmp_path / "run", replace(OPTIONS, batch_size=2))


def test_the_rate_falls_at_the_end_wherever_that_is_moved(folder: Path, tmp_path: Path) -> None:
    rates = [scheduled(step, replace(OPTIONS, steps=100, warmup=10, decay=0.2)) for step in range(100)]
    assert rates[0] == 1.0 and rates[79] == 1.0 and rates[90] == pytest.approx(0.5) and 0 < rates[99] < 0.1
    train_vae(tiny_vae(), folder, tmp_path / "run", replace(OPTIONS, steps=2))
    train_vae(tiny_vae(), folder, tmp_path / "run", replace(OPTIONS, steps=4))
    assert '"step": 4' in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]


def test_batches_depend_on_seed_and_step_alone(folder: Path) -> None:
    pictures = load_pictures(folder)
    batch = batch_at(3, pictures, OPTIONS)
    assert batch.shape == (4, 3, 16, 16) and batch.abs().max() <= 1
    assert torch.equal(batch, batch_at(3, pictures, OPTIONS))
    assert not torch.equal(batch, batch_at(4, pictures, OPTIONS))
    assert not torch.equal(batch, batch_at(3, pictures, replace(OPTIONS, seed=1)))


def test_psnr_of_a_known_error() -> None:
    """A reconstruction off by 16 of 255 levels everywhere has 20 log10(255 / 16) dB."""

    class Off(torch.nn.Linear):
        def encode(self, x):
            return type("Out", (), {"latent_dist": type("Dist", (), {"mode": staticmethod(lambda: x)})})

        def decode(self, z):
            return type("Out", (), {"sample": z + 16 / 127.5})

    pictures = torch.zeros(3, 3, 8, 8)
    torch.testing.assert_close(psnr(Off(1, 1), pictures), torch.full((3,), 20 * np.log10(255 / 16), dtype=torch.float32))


def test_ssim_and_edges() -> None:
    """Of constant pictures a and b, SSIM is (2ab + c) / (a^2 + b^2 + c); the same picture has 1; a blurred one has fewer edges."""
    dark, light = torch.full((1, 3, 16, 16), -0.2), torch.full((1, 3, 16, 16), 0.4)  # 0.4 and 0.7 of [0, 1]
    expected = (2 * 0.4 * 0.7 + 1e-4) / (0.4**2 + 0.7**2 + 1e-4)
    assert ssim(dark, light).item() == pytest.approx(expected, abs=1e-4)
    noise = torch.rand(2, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(ssim(noise, noise), torch.ones(2, dtype=torch.float64))
    blurred = torch.nn.functional.avg_pool2d(noise, 3, 1, 1)
    assert (ssim(blurred, noise) < 0.9).all() and (edge_strength(blurred) < 0.5 * edge_strength(noise)).all()


def test_latent_statistics_normalise(folder: Path) -> None:
    vae = tiny_vae().eval()
    pictures = torch.rand(10, 3, 16, 16) * 2 - 1
    shift, scale = latent_statistics(vae, pictures)
    with torch.no_grad():
        latents = (vae.encode(pictures).latent_dist.mode() - shift) * scale
    assert abs(latents.mean().item()) < 1e-4 and abs(latents.std().item() - 1) < 1e-3
