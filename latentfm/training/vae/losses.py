"""The terms of a VAE's loss (notes, section 6.2): each of a picture, divided by its numbers, [B] float32 for pictures [B, 3, H, W]."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from latentfm.training.vae.options import LossOptions

LARGEST_WEIGHT, SMALLEST_NORM = 1e4, 1e-4  # of the adaptive weight, as in VQGAN


def kl_by_channel(mean: Tensor, logvar: Tensor) -> Tensor:
    """Nats of KL(q(z|x) || N(0, I)) in each channel of the latents, [B, C], of moments [B, C, h, w] (notes, eq. 82)."""
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=(2, 3))


def reconstruction_terms(output: Tensor, target: Tensor, options: LossOptions) -> dict[str, Tensor]:
    """What of the pixels is not as in `target`, by name, weighted: "pixels" (l1 and l2, or the Gaussian's nats) and "edges"."""
    error = output - target
    if options.sigma:  # notes, eq. 73 with a fixed deviation, and its constant
        pixels = error.square() / (2 * options.sigma**2) + 0.5 * math.log(2 * math.pi * options.sigma**2)
    else:
        pixels = options.l1 * error.abs() + options.l2 * error.square()
    found = {"pixels": of_pictures(pixels)}
    if options.edges:
        found["edges"] = options.edges * sum(of_pictures(error.diff(dim=dim).abs()) for dim in (-1, -2))
    return found


def of_pictures(values: Tensor) -> Tensor:
    """The mean of each picture, [B]."""
    return values.flatten(1).mean(dim=1)


def kl_weight(step: int, options: LossOptions) -> float:
    """beta at optimizer step `step`, counted from 0: it grows linearly over kl_warmup steps."""
    return options.kl * min(1.0, (step + 1) / options.kl_warmup) if options.kl_warmup else options.kl


# The adversarial term


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss of its scores [B, 1, h, w] of pictures and of reconstructions, a scalar (Lim and Ye 2017)."""
    return 0.5 * (functional.relu(1.0 - real).mean() + functional.relu(1.0 + fake).mean())


def adaptive_weight(
    reconstruction: Tensor, adversarial: Tensor, last: nn.Parameter, mean_over_ranks: Callable[[Tensor], Tensor]
) -> Tensor:
    """How much the adversarial term counts to pull as strongly at the decoder's last layer as the reconstruction does, a scalar.

    |grad of the reconstruction| / (|grad of the term| + 1e-4) with respect to `last`, at most 1e4 (Esser et al. 2021, eq. 7).
    """
    gradients = [torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in (reconstruction, adversarial)]
    wanted, got = mean_over_ranks(torch.stack(gradients)).flatten(1).norm(dim=1)
    return (wanted / (got + SMALLEST_NORM)).clamp(max=LARGEST_WEIGHT)
