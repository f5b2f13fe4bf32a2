"""The lecture notes' class-conditional networks at work: a U-Net and a DiT that draw digits.

    python scripts/classes.py                          # two minutes on two CPU cores; OUT/classes.png and a table
    python scripts/classes.py --steps 4000 --networks unet

Both are diffusers' own (UNet2DModel, DiTTransformer2DModel), trained on scikit-learn's 1,797 real digits of 8 x 8 pixels, once by

    CFM     the velocity, on the linear path                          (notes, Alg. 3; with labels Alg. 5, eq. 63, 64)
    DDPM    the noise, on the variance preserving path                (Alg. 4)

with a tenth of the labels dropped; the DiT in twice the steps, which take about as long. Each network's weights are then sampled by the
ODE (Alg. 1) and by the SDE of the same marginals (Theorem 17), at guidance 1, 2 and 4: classifier-free (eq. 65, figure 12), and, for the
first network, by a classifier of noisy digits (eq. 62).

The table: the share of samples that a classifier of real digits, trained apart, takes for the digit they were asked to be; and the
Fréchet distance of its features between them and the digits trained on (as FID, in 32 features of its own). The first row is real
digits that nothing was trained on: what a perfect sampler would have.
"""

import argparse
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from latentfm import flow
from latentfm.evaluation.distances import frechet, gaussian

CLASSES, NULL = 10, 10  # the label after the last stands for none (notes, section 5.2)
LABEL_DROPOUT = 0.1
BATCH = 64
GUIDANCE = (1.0, 2.0, 4.0)


class Digits(NamedTuple):
    """Pictures [N, 1, 8, 8] in [-1, 1] and their labels [N]."""

    images: Tensor
    labels: Tensor


class Objective(NamedTuple):
    """What the network predicts, and on which path."""

    quantity: flow.Quantity
    schedule: flow.Schedule


OBJECTIVES = {"CFM": Objective("velocity", flow.CondOT()), "DDPM": Objective("noise", flow.VariancePreserving())}


def load_digits(seed: int = 0) -> tuple[Digits, Digits]:
    """The digits to train on, 1,500, and the 297 others."""
    from sklearn import datasets

    bunch = datasets.load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(seed))
    images = torch.as_tensor(bunch.images, dtype=torch.float32)[order, None] / 8 - 1
    labels = torch.as_tensor(bunch.target)[order].long()
    return Digits(images[:1500], labels[:1500]), Digits(images[1500:], labels[1500:])


def unet(width: int = 16) -> nn.Module:
    """A U-Net of two resolutions, with attention at the lower (notes, section 6.1)."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(width, 2 * width), norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), num_class_embeds=CLASSES + 1,
    )  # fmt: skip


def dit(width: int = 64) -> nn.Module:
    """A diffusion transformer of three blocks on sixteen patches of 2 x 2 pixels (notes, Remark 28)."""
    from diffusers import DiTTransformer2DModel

    network = DiTTransformer2DModel(
        num_attention_heads=width // 32, attention_head_dim=32, in_channels=1, num_layers=3, sample_size=8, patch_size=2,
        num_embeds_ada_norm=CLASSES,
    )  # fmt: skip
    for block in network.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0  # each block would drop labels of its own beside ours
    return network


NETWORKS = {"unet": unet, "dit": dit}
LENGTH = {"unet": 1, "dit": 2}  # of a training: one of the DiT's steps takes about half as long


class Adapter(nn.Module):
    """One of diffusers' networks as f(x [B, 1, 8, 8], t [B] or a scalar, y [B]) -> [B, 1, 8, 8]; its times are thousandths."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.network(x, 1000 * t.expand(len(x)), class_labels=y).sample


class Classifier(nn.Module):
    """log p_t(y|x) [B, 10] of noisy digits x [B, 1, 8, 8] at t; `features` [B, 32] come before its last layer."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(2, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.SiLU(), nn.Flatten(),
            nn.Linear(64 * 16, 32), nn.SiLU(),
        )  # fmt: skip
        self.head = nn.Linear(32, CLASSES)

    def embed(self, x: Tensor, t: Tensor) -> Tensor:
        """The features of t x, and of t as a second channel: so the gradient in x vanishes at t = 0, where eq. 62 weighs it infinitely."""
        t = t.expand(len(x))[:, None, None, None].expand_as(x)
        return self.features(torch.cat([t * x, t], dim=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.head(self.embed(x, t)).log_softmax(1)


Losses = Callable[[Tensor, Tensor, torch.Generator], Tensor]  # of a batch of images and its labels, given the source of all chance


def fit(network: nn.Module, losses: Losses, digits: Digits, steps: int, seed: int) -> nn.Module:
    """The network, trained to make the losses small."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        batch = torch.randint(len(digits.labels), (BATCH,), generator=generator)
        losses(digits.images[batch], digits.labels[batch], generator).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return network.eval().requires_grad_(False)


def train(name: str, objective: Objective, digits: Digits, steps: int, seed: int = 0) -> Adapter:
    """A network of `NETWORKS`, trained by Algorithm 5; with the noise for its quantity, by Algorithm 4 with labels."""
    torch.manual_seed(seed)
    network = Adapter(NETWORKS[name]())

    def losses(z: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        t, eps = torch.rand(len(z), generator=generator), torch.randn(z.shape, generator=generator)
        y = torch.where(torch.rand(len(y), generator=generator) < LABEL_DROPOUT, NULL, y)
        x_t = flow.sample_path(z, eps, t, objective.schedule).x_t
        target = flow.regression_target(z, eps, t, objective.quantity, objective.schedule)
        return flow.cfm_loss(network(x_t, t, y), target)

    return fit(network, losses, digits, steps, seed)


def train_classifier(digits: Digits, steps: int, noisy: bool, seed: int = 0) -> Classifier:
    """A classifier of digits, or, where `noisy`, of digits at every t of the linear path."""
    torch.manual_seed(seed)
    network = Classifier()

    def losses(z: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        t = torch.rand(len(z), generator=generator) if noisy else torch.ones(len(z))
        x_t = flow.sample_path(z, torch.randn(z.shape, generator=generator), t).x_t
        return nn.functional.nll_loss(network(x_t, t), y, reduction="none")

    return fit(network, losses, digits, steps, seed)


def guided_field(network: Adapter, objective: Objective, y: Tensor, scale: float) -> flow.Field:
    """The velocity of classifier-free guidance (notes, eq. 65): of what is predicted, then converted, since both are affine."""

    def prediction(x: Tensor, t: Tensor) -> Tensor:
        if scale == 1:
            return network(x, t, y)
        both = network(torch.cat([x, x]), t, torch.cat([y, torch.full_like(y, NULL)]))
        return flow.classifier_free(*both.chunk(2), scale)

    return flow.velocity_field(prediction, objective.quantity, objective.schedule)


def classifier_guided_field(network: Adapter, classifier: Classifier, y: Tensor, scale: float) -> flow.Field:
    """The velocity of classifier guidance (notes, eq. 62): the network is asked without a label."""
    unguided = guided_field(network, OBJECTIVES["CFM"], torch.full_like(y, NULL), 1.0)
    return flow.classifier_field(unguided, lambda x, t: classifier(x, t).gather(1, y[:, None])[:, 0], scale)


def within_range(field: flow.Field, schedule: flow.Schedule) -> flow.Field:
    """The field whose data are in [-1, 1], as DDPM's sampler has it (Ho et al. 2020): near t = 0 an error of the noise is divided by
    a small alpha."""

    def clipped(x: Tensor, t: Tensor) -> Tensor:
        z = flow.convert(field(x, t), x, t, "velocity", "denoiser", schedule).clamp(-1, 1)
        return flow.convert(z, x, t, "denoiser", "velocity", schedule)

    return clipped


@torch.no_grad()
def sample(field: flow.Field, schedule: flow.Schedule, count: int, steps: int, stochastic: bool, seed: int = 1) -> Tensor:
    """Samples [count, 1, 8, 8] by the field's ODE, or by the SDE with DDPM's diffusion; every sampler starts from the same noise."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 1, 8, 8, generator=generator)
    grid = flow.uniform_grid(steps)
    if not stochastic:
        return flow.integrate(field, noise, grid)
    return flow.integrate_sde(field, noise, grid, flow.Memoryless(), generator, schedule=schedule)


@torch.no_grad()
def judge(classifier: Classifier, samples: Tensor, y: Tensor, real: Tensor) -> tuple[float, float]:
    """(The share of samples taken for the digit they should be, the Fréchet distance of their features to real digits'.)"""
    clean = torch.ones(())
    right = (classifier(samples, clean).argmax(1) == y).double().mean().item()
    return right, frechet(*(gaussian(classifier.embed(each, clean)) for each in (samples, real)))


def draw(sheets: dict[str, dict[str, Tensor]], path: Path) -> None:
    """Write one picture: a panel for each sheet, a row of ten digits for each of its samplers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(sheets), figsize=(4.6 * len(sheets), 5), layout="constrained", squeeze=False)
    for axis, (title, rows) in zip(axes[0], sheets.items(), strict=True):
        picture = torch.cat([torch.cat(list(nn.functional.pad(row[:, 0], (1, 1, 1, 1), value=-1.0)), dim=1) for row in rows.values()])
        axis.imshow(picture.clamp(-1, 1).numpy(), cmap="gray")
        axis.set(title=title, xticks=[], yticks=[10 * i + 4.5 for i in range(len(rows))])
        axis.set_yticklabels(list(rows), fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def trained_and_sampled(job: tuple[str, str, argparse.Namespace]) -> list[tuple[str, str, Tensor]]:
    """(sampler, guidance, samples [digits, ...]) of a network trained by an objective, both by name: the work of one process."""
    name, title, options = job
    objective, known = OBJECTIVES[title], load_digits()[0]
    y = torch.arange(CLASSES).repeat(options.per_digit)
    network = train(name, objective, known, LENGTH[name] * options.steps, options.seed)
    fields: list[tuple[str, flow.Field, tuple[bool, ...]]] = [
        (f"{scale:g}", guided_field(network, objective, y, scale), (False, True)) for scale in GUIDANCE
    ]
    if name == options.networks[0] and title == "CFM":
        noisy = train_classifier(known, steps=600, noisy=True, seed=options.seed)
        by_classifier = partial(classifier_guided_field, network, noisy, y)
        fields += [(f"{scale:g}, by classifier", by_classifier(scale), (False,)) for scale in GUIDANCE]
    found = []
    for guidance, field, kinds in fields:
        if title == "DDPM":
            field = within_range(field, objective.schedule)
        for stochastic in kinds:
            samples = sample(field, objective.schedule, len(y), options.sampling_steps, stochastic)
            found.append(("SDE" if stochastic else "ODE", guidance, samples))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--steps", type=int, default=800, help="of each training of the U-Net; the DiT takes twice as many")
    parser.add_argument("--sampling-steps", type=int, default=30)
    parser.add_argument("--per-digit", type=int, default=20, help="samples of each digit that the table judges")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/classes"), help="folder of the picture")
    options = parser.parse_args()
    for name, least in (("steps", 2), ("sampling_steps", 6), ("per_digit", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(options, name)}")
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    known, unseen = load_digits()
    reader = train_classifier(known, steps=600, noisy=False, seed=options.seed)
    y = torch.arange(CLASSES).repeat(options.per_digit)
    print(f"{'network':8}{'objective':11}{'sampler':9}{'guidance':18}{'accuracy':>9}{'Fréchet':>9}")

    def tell(name: str, objective: str, sampler: str, guidance: str, samples: Tensor, labels: Tensor = y) -> None:
        right, distance = judge(reader, samples, labels, known.images)
        print(f"{name:8}{objective:11}{sampler:9}{guidance:18}{right:>9.1%}{distance:>9.3f}", flush=True)

    tell("-", "-", "-", "real, unseen", unseen.images, unseen.labels)
    sheets: dict[str, dict[str, Tensor]] = {}
    jobs = [(name, title, options) for name in options.networks for title in OBJECTIVES]
    workers = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, len(jobs))
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for (name, title, _), found in zip(jobs, pool.map(trained_and_sampled, jobs), strict=True):
            rows = sheets[f"{name}, {title}"] = {"real": torch.stack([known.images[known.labels == digit][0] for digit in range(CLASSES)])}
            for sampler, guidance, samples in found:
                rows[f"{sampler} {guidance}"] = samples[:CLASSES]
                tell(name, title, sampler, guidance, samples)
    path = options.out / "classes.png"
    draw(sheets, path)
    print(f"{path}, in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
