"""How good reconstructions are, and what latents are like: measures of pictures [N, 3, H, W] in [-1, 1]."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from latentfm.training.vae.losses import kl_by_channel


def psnr(output: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, [N], of pictures as they are saved, in 255 levels; equal ones have 148."""
    error = ((output.clamp(-1, 1) - target) * 127.5).round().square().flatten(1).mean(dim=1)
    return 10 * torch.log10(255.0**2 / error.double().clamp(min=1e-10))


def ssim(output: Tensor, target: Tensor) -> Tensor:
    """Structural similarity, [N] (Wang et al. 2004: Gaussian windows of 11 pixels, deviation 1.5, that lie within the picture)."""
    offsets = torch.arange(11, dtype=torch.float64, device=output.device) - 5
    window = torch.exp(-offsets.square() / (2 * 1.5**2))
    kernel = torch.outer(window, window).div(window.sum() ** 2).expand(3, 1, 11, 11)

    def local(values: Tensor) -> Tensor:
        return nn.functional.conv2d(values, kernel, groups=3)

    x, y = (output.double().clamp(-1, 1) + 1) / 2, (target.double() + 1) / 2  # variances are small differences
    mean_x, mean_y = local(x), local(y)
    var_x, var_y, both = local(x * x) - mean_x**2, local(y * y) - mean_y**2, local(x * y) - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + 0.01**2) * (2 * both + 0.03**2)
    return (likeness / ((mean_x**2 + mean_y**2 + 0.01**2) * (var_x + var_y + 0.03**2))).mean(dim=(1, 2, 3))


def edge_strength(pictures: Tensor) -> Tensor:
    """Root mean square of neighbouring pixels' differences, [N]: what a blurred picture has less of."""
    across, down = pictures.diff(dim=-1).square().mean(dim=(1, 2, 3)), pictures.diff(dim=-2).square().mean(dim=(1, 2, 3))
    return (across + down).sqrt()


@torch.no_grad()
def reconstructed(vae: nn.Module, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(the posterior mean decoded, the mean, the log-variance), float32 whatever autocast says."""
    with torch.autocast(pictures.device.type, enabled=False):
        posterior = vae.encode(pictures).latent_dist
        return vae.decode(posterior.mean).sample, posterior.mean, posterior.logvar


@torch.no_grad()
def measures(output: Tensor, target: Tensor, mean: Tensor, logvar: Tensor, lpips: nn.Module | None = None) -> dict[str, Tensor]:
    """Of each picture, [N] float64: psnr, ssim, edges (as a share of the picture's own), lpips where it is there; kl [N, C] in nats."""
    own, got = edge_strength(target), edge_strength(output.clamp(-1, 1))
    found = {"psnr": psnr(output, target), "edges": torch.where(own > 0, got / own.clamp(min=1e-12), 1.0)}  # a picture may have none
    if min(target.shape[-2:]) >= 11:
        found["ssim"] = ssim(output, target)
    if lpips is not None:
        found["lpips"] = lpips(output.clamp(-1, 1), target)
    return {name: value.double() for name, value in (found | {"kl": kl_by_channel(mean, logvar)}).items()}


@dataclass
class LatentStatistics:
    """Sums over the latents of pictures, draws of their posteriors: the mean and the standard deviation of all of them, exactly.

    A draw's variance is that of the means and the mean of the variances together.
    """

    sums: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))  # numbers, values, squares

    def add(self, mean: Tensor, logvar: Tensor) -> None:
        mean, variance = mean.double(), logvar.double().exp()
        self.sums += torch.stack([torch.tensor(float(mean.numel())), mean.sum().cpu(), (mean.square() + variance).sum().cpu()])

    def shift_and_scale(self) -> tuple[float, float]:
        """(shift, scale) such that (z - shift) * scale has mean 0 and standard deviation 1."""
        number, values, squares = self.sums.tolist()
        mean = values / number
        return mean, (squares / number - mean**2) ** -0.5
