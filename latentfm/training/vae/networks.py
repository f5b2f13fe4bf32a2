"""The networks around a VAE's training: the autoencoder as a loss sees it, the discriminator, and LPIPS' VGG."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional

from latentfm.errors import InputError
from latentfm.interchange.tensors import Tensors, read_file
from latentfm.models.folder import refuse_pickle
from latentfm.words import listed, shown


class Reconstruction(nn.Module):
    """reconstruction(pixels [B, 3, H, W], noise [B, C, h, w]) -> (decoded pixels, posterior mean, log-variance), one draw decoded."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.vae.encoder.conv_in.weight.requires_grad):
            posterior = self.vae.encode(pixels).latent_dist
        return self.vae.decode(posterior.mean + posterior.std * noise).sample, posterior.mean, posterior.logvar


class Discriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): discriminator(pixels [B, 3, H, W]) -> a score for each patch [B, 1, h, w].

    Groups are normalised, not the batch: a score depends on its picture alone, whatever the batch and the number of processes.
    """

    def __init__(self, width: int = 64, layers: int = 3):
        super().__init__()
        widths = [min(width * 2**level, 8 * width) for level in range(layers + 1)]
        stages = [nn.Sequential(nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2))]
        for level in range(1, layers + 1):
            stride = 2 if level < layers else 1
            convolution = nn.Conv2d(widths[level - 1], widths[level], 4, stride, 1, bias=False)
            norm = nn.GroupNorm(groups_of(widths[level]), widths[level])
            stages.append(nn.Sequential(convolution, norm, nn.LeakyReLU(0.2)))
        self.stages, self.score = nn.ModuleList(stages), nn.Conv2d(widths[-1], 1, 4, 1, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.score(self.features(pixels)[-1])

    def features(self, pixels: Tensor) -> list[Tensor]:
        """What each stage makes of pictures, the finest first."""
        found = []
        for stage in self.stages:
            pixels = stage(pixels)
            found.append(pixels)
        return found

    def distance(self, output: Tensor, target: Tensor) -> Tensor:
        """How far apart pictures are in the features, [B]: the mean over stages of their mean absolute difference."""
        with torch.no_grad():
            wanted = self.features(target)
        each = [(a - b).abs().flatten(1).mean(dim=1) for a, b in zip(self.features(output), wanted, strict=True)]
        return torch.stack(each).float().mean(dim=0)


def groups_of(width: int) -> int:
    """The groups of a normalisation of so many channels: of 16 each, or the next larger ones that divide them."""
    return next(number for number in range(max(1, width // 16), 0, -1) if width % number == 0)


# LPIPS (Zhang et al. 2018) on VGG16: where its slices end, and its convolutions' widths by slice
VGG_SLICES: tuple[tuple[int, ...], ...] = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
SMALLEST = 2 ** (len(VGG_SLICES) - 1)  # pixels a side: each slice but the first halves them


class LPIPS(nn.Module):
    """lpips(output, target [B, 3, H, W] in [-1, 1]) -> [B], the perceptual distance of the package lpips with net="vgg"."""

    def __init__(self):
        super().__init__()
        inputs, self.slices = 3, nn.ModuleList()
        for widths in VGG_SLICES:
            self.slices.append(nn.ModuleList())
            for width in widths:
                self.slices[-1].append(nn.Conv2d(inputs, width, 3, padding=1))
                inputs = width
        self.linears = nn.ModuleList(nn.Conv2d(widths[-1], 1, 1, bias=False) for widths in VGG_SLICES)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    @classmethod
    def check(cls, path: Path) -> Tensors:
        """The tensors of a safetensors file that holds its weights, on disk. Raises InputError for another file."""
        if not path.is_file():
            raise InputError(f"loss.lpips: there is no file '{shown(path)}'; save lpips.LPIPS(net='vgg').state_dict() as safetensors there")
        refuse_pickle(path)
        tensors, _ = read_file(path)
        with torch.device("meta"):
            wanted = dict(zip(names_in_package(), cls().parameters(), strict=True))
        lost = [name for name, own in wanted.items() if name not in tensors or tensors[name].shape != tuple(own.shape)]
        if lost:
            raise InputError(f"loss.lpips: {shown(path)} is not the state of lpips.LPIPS(net='vgg'): it lacks {listed(lost)}")
        return tensors

    @classmethod
    def load(cls, path: Path) -> "LPIPS":
        """The distance with the weights of a safetensors file. Raises InputError as `check`."""
        tensors, made = cls.check(path), cls()
        with torch.no_grad():
            for name, own in zip(names_in_package(), made.parameters(), strict=True):
                own.copy_(tensors[name].load(torch.float32))
        return made.requires_grad_(False).eval()

    def features(self, pixels: Tensor) -> list[Tensor]:
        found, pixels = [], (pixels - self.shift) / self.scale
        for number, convolutions in enumerate(self.slices):
            pixels = functional.max_pool2d(pixels, 2) if number else pixels
            for convolution in convolutions:
                pixels = functional.relu(convolution(pixels))
            found.append(pixels / (torch.linalg.vector_norm(pixels, dim=1, keepdim=True) + 1e-10))
        return found

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        pairs = zip(self.linears, self.features(output), self.features(target), strict=True)
        return sum(linear((a - b).square()).mean(dim=(1, 2, 3)) for linear, a, b in pairs)


def names_in_package() -> Sequence[str]:
    """The names that the package lpips has for the parameters of `LPIPS`, in their order."""
    names, place = [], 0
    for number, widths in enumerate(VGG_SLICES, start=1):
        place += number > 1  # a pooling
        for _ in widths:
            names += [f"net.slice{number}.{place}.{kind}" for kind in ("weight", "bias")]
            place += 2  # the convolution and what follows it
    return names + [f"lin{number}.model.1.weight" for number in range(len(VGG_SLICES))]
