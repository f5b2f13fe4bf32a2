"""A small network, held-out pictures that are functions of their number, and the validation of the one on the others."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from latentfm import flow
from latentfm.config import TrainOptions
from latentfm.data.loader import Batch
from latentfm.data.sources import Sample
from latentfm.models.mmdit import MMDiT
from latentfm.models.text import PromptParts
from latentfm.training.step import Objective, density
from latentfm.training.validation import Validation

SHIFT, SCALE = 0.0609, 1.5305
SHAPES = [(8, 8), (12, 6)]  # of latents, by bucket
BUCKET_OF = [0, 0, 1, 0, 1, 0, 0, 1, 0]


def make_network():
    """A random MMDiT in training mode, the same each time."""
    torch.manual_seed(0)
    network = MMDiT(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=24, caption_projection_dim=16, pooled_projection_dim=16, pos_embed_max_size=12,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.train()


@dataclass
class Pictures:
    """A reader: everything about a picture is a function of its number and of the epoch."""

    broken: tuple[int, ...] = ()

    def __getitem__(self, request):
        members, length = request
        assert len({BUCKET_OF[index] for _, index, _ in members}) == 1
        rows = [self.row(*member, length) for member in members]
        stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        parts = PromptParts(**{name: stacked.pop(name) for name in ("clip_1", "pooled_1", "clip_2", "pooled_2", "t5")})
        count = len(members)
        return Batch(
            parts=parts, dropped={name: torch.ones(count, dtype=torch.bool) for name in ("clip_1", "clip_2", "t5")},
            t5_length=length, ids=[f"{index}.png" for _, index, _ in members], kept=torch.zeros(count, 1, dtype=torch.long), **stacked,
        )  # fmt: skip

    def row(self, epoch, index, turn, length):
        draw = torch.Generator().manual_seed(10_000 * (epoch + 7) + 100 * turn + index)
        height, width = SHAPES[BUCKET_OF[index]]
        sizes = {
            "moments": (8, height, width), "vae_noise": (4, height, width), "eps": (4, height, width), "u": (), "mask": (1, height, width),
            "clip_1": (5, 8), "pooled_1": (8,), "clip_2": (5, 8), "pooled_2": (8,), "t5": (length, 24),
        }  # fmt: skip
        row = {name: torch.randn(size, generator=draw) for name, size in sizes.items()}
        row["mask"] = row["mask"].abs()
        if index in self.broken:
            row["moments"][0, 0, 0] = math.nan
        return row


def objective(**options):
    options = TrainOptions(**options)
    return Objective(density(options), options.t_shift, flow.WEIGHTINGS[options.loss_weighting], SHIFT, SCALE)


def validation(indices=tuple(range(9)), times=3, batch_size=2, reader=None, **options):
    """The validation of those pictures; `options` are the training's."""
    samples = [Sample(Path(f"{index}.png"), ("a",), f"{index}.png") for index in range(len(BUCKET_OF))]
    return Validation(times, objective(**options), reader or Pictures(), samples, BUCKET_OF, indices, 6, batch_size, lambda batch: batch)
