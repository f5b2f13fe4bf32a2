"""Train an AutoencoderKL on a folder of pictures (notes, section 6.2, Algorithm 6, without the adversarial term).

The loss is L1 + L2 + the L1 distance of image gradients (which keeps edges crisp) + kl_weight * the mean KL per
latent element, warmed up linearly. Pictures with transparency are laid on white or, for a share of the draws, on a random
colour; a picture larger than `size` is cropped, and flips and colour permutations widen what the VAE can represent.
The learning rate stays where it is until the last part of the run, so a run can be made longer or brought to its end early:
only `steps` may change between two sittings. Every draw is a function of (seed, step) alone, so an interrupted run resumes exactly.
"""

import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from goes_on import Run
from PIL import Image
from torch import Tensor

from latentfm.data.mixture import Mixture
from latentfm.data.stream import Stream


@dataclass(frozen=True)
class VAETraining:
    """Options of a VAE run. `steps` are optimizer steps of `batch_size` crops of `size` pixels."""

    size: int = 64
    steps: int = 40_000
    decay: float = 0.2  # the share of the steps, at the end, in which the learning rate falls to 0
    batch_size: int = 16
    learning_rate: float = 8e-4
    warmup: int = 1000  # of the KL term; a tenth of it, of the learning rate
    kl_weight: float = 3e-4
    gradient_weight: float = 0.5
    l2_weight: float = 10.0
    random_background: float = 0.3
    permute_colours: float = 0.05
    ema_decay: float = 0.999
    seed: int = 0
    mixed_precision: str = "bf16"
    compile: bool = False
    checkpoint_seconds: float = 180


def load_pictures(folder: Path) -> list[np.ndarray]:
    """The PNG pictures of `folder` as uint8 RGBA arrays, in name order."""
    return [np.asarray(Image.open(path).convert("RGBA")) for path in sorted(folder.glob("*.png"))]


def draw(picture: np.ndarray, options: VAETraining, rng: random.Random) -> np.ndarray:
    """One augmented [size, size, 3] float32 crop in [-1, 1]."""
    size = options.size
    top, left = rng.randint(0, picture.shape[0] - size), rng.randint(0, picture.shape[1] - size)
    crop = picture[top : top + size, left : left + size].astype(np.float32) / 255
    background = np.ones(3, np.float32)
    if rng.random() < options.random_background:
        background = np.array([rng.random() for _ in range(3)], np.float32)
    alpha = crop[..., 3:]
    crop = crop[..., :3] * alpha + background * (1 - alpha)
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    if rng.random() < options.permute_colours:
        crop = crop[..., rng.sample(range(3), 3)]
    return crop * 2 - 1


def batch_at(step: int, pictures: list[np.ndarray], options: VAETraining) -> Tensor:
    """The crops of optimizer step `step` (from 0), [batch, 3, size, size]."""
    crops = [
        draw(pictures[index], options, random.Random(f"{options.seed}/{epoch}/{index}"))
        for epoch, index, _ in Stream(Mixture.plain(len(pictures)), options.batch_size, options.seed).members(step)
    ]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()


def reconstruction_loss(output: Tensor, target: Tensor, options: VAETraining) -> Tensor:
    """L1 + L2 + L1 of horizontal and vertical differences; [B, 3, H, W] in [-1, 1] -> scalar."""
    error = output - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + options.l2_weight * error.square().mean() + options.gradient_weight * edges


def scheduled(step: int, options: VAETraining) -> float:
    """The learning rate's factor at `step`: linear warm-up, 1, and a linear fall to 0 in the last `decay` of the steps."""
    return min(1.0, 10 * (step + 1) / options.warmup, (options.steps - step) / (options.decay * options.steps))


@torch.no_grad()
def psnr(vae: torch.nn.Module, pictures: Tensor, batch_size: int = 64) -> Tensor:
    """Peak signal-to-noise ratio in dB of each reconstruction (posterior mean, 8-bit rounding), [N] for [N, 3, H, W] in [-1, 1]."""
    ratios = []
    for part in pictures.to(next(vae.parameters()).device).split(batch_size):
        output = vae.decode(vae.encode(part).latent_dist.mode()).sample.clamp(-1, 1)
        error = ((output - part) * 127.5).round().square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
        ratios.append(10 * torch.log10(255.0**2 / error))
    return torch.cat(ratios).cpu()


def ssim(output: Tensor, target: Tensor) -> Tensor:
    """Structural similarity of each picture, [N] for [N, 3, H, W] in [-1, 1] (Wang et al. 2004: Gaussian windows of 11 pixels)."""
    offsets = torch.arange(11, dtype=torch.float64) - 5
    window = torch.exp(-offsets.square() / (2 * 1.5**2))
    kernel = torch.outer(window, window).div(window.sum() ** 2).expand(3, 1, 11, 11)

    def local(values: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(values, kernel, groups=3)

    x, y = (output.double() + 1) / 2, (target.double() + 1) / 2  # variances are small differences
    mean_x, mean_y = local(x), local(y)
    var_x, var_y, both = local(x * x) - mean_x**2, local(y * y) - mean_y**2, local(x * y) - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + 0.01**2) * (2 * both + 0.03**2)
    return (likeness / ((mean_x**2 + mean_y**2 + 0.01**2) * (var_x + var_y + 0.03**2))).mean(dim=(1, 2, 3))


def edge_strength(pictures: Tensor) -> Tensor:
    """Root mean square of neighbouring pixels' differences, [N]: what a blurred picture has less of."""
    across, down = pictures.diff(dim=-1).square().mean(dim=(1, 2, 3)), pictures.diff(dim=-2).square().mean(dim=(1, 2, 3))
    return (across + down).sqrt()


@torch.no_grad()
def quality(vae: torch.nn.Module, pictures: Tensor) -> dict[str, float]:
    """Mean and worst PSNR in dB, mean SSIM, and the reconstructions' edge strength as a share of the pictures' own."""
    output = torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample.clamp(-1, 1) for part in pictures.split(64)])
    ratios, edges = psnr(vae, pictures), edge_strength(output) / edge_strength(pictures)
    said = {"psnr": ratios.mean(), "worst_psnr": ratios.min(), "ssim": ssim(output, pictures).mean(), "edges": edges.mean()}
    return {name: value.item() for name, value in said.items()} | {"of": len(pictures)}


@torch.no_grad()
def latent_statistics(vae: torch.nn.Module, pictures: Tensor) -> tuple[float, float]:
    """(shift, scale) such that (latents - shift) * scale has mean 0 and standard deviation 1 over `pictures`."""
    latents = torch.cat([vae.encode(part.to(next(vae.parameters()).device)).latent_dist.mode() for part in pictures.split(64)])
    return latents.mean().item(), 1.0 / latents.std().item()


def train_vae(vae: torch.nn.Module, folder: Path, out: Path, options: VAETraining, held_out: Tensor | None = None) -> torch.nn.Module:
    """Train `vae`, where it is, on the pictures of `folder`, resuming from `out`; returns it with the averaged weights.

    Writes `out`/checkpoints and `out`/metrics.jsonl (loss, KL, held-out PSNR in dB, pictures a second).
    """
    pictures = load_pictures(folder)
    out.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=options.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    run = Run(
        vae, optimizer, out / "checkpoints", asdict(options), ("steps", "compile", "checkpoint_seconds"),
        options.ema_decay, options.checkpoint_seconds,
    )  # fmt: skip

    def reconstruct(target: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        posterior = vae.encode(target).latent_dist
        return vae.decode(posterior.mean + posterior.std * noise).sample, posterior.mean, posterior.logvar

    if options.compile:
        reconstruct = torch.compile(reconstruct)
    device = next(vae.parameters()).device
    latent = vae.config.latent_channels, *(options.size // 2 ** (len(vae.config.block_out_channels) - 1),) * 2
    began = time.monotonic()
    for step in range(run.start, options.steps):
        target = batch_at(step, pictures, options).to(device)
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * scheduled(step, options)
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
        noise = torch.randn(options.batch_size, *latent, generator=generator).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=options.mixed_precision == "bf16"):
            output, mean, logvar = reconstruct(target, noise)
        mean, logvar = mean.float(), logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
        warm = min(1.0, (step + 1) / options.warmup)
        loss = reconstruction_loss(output.float(), target, options) + warm * options.kl_weight * kl
        if not torch.isfinite(loss):
            raise RuntimeError(f"the VAE's loss is {loss.item()} at step {step}; the last checkpoint in {out} is untouched")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        run.ema.update(run.shards.parameters, step + 1)
        done = step + 1
        if run.due() or done == options.steps:
            row = {"step": done, "loss": loss.item(), "kl": kl.item()}
            row["images_per_second"] = (done - run.start) * options.batch_size / (time.monotonic() - began)
            if held_out is not None:
                with run.ema.applied_to(run.shards.parameters):
                    row["held_out_psnr"] = psnr(vae, held_out).mean().item()
            run.save(done)
            with (out / "metrics.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    run.take_averages()
    return vae
