"""The optimizers that a run may take, a row each: options, checks, planning and training read it here. Needs no torch.

To add one: a row, if its class takes (groups, lr, betas), or (groups, lr) without betas, and the keywords here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MOMENTS = 8.0  # bytes a number of two moments in float32
MOMENTS_8BIT = 2 * (1 + 4 / 256)  # and in 8 bits, with a float32 scale for each block of 256


@dataclass(frozen=True)
class Optimizer:
    """target: "module:class". package: what is installed for it, None with PyTorch. state: bytes it keeps for a trained number.

    split: whether it looks at single numbers alone, and not at a parameter's rows, norm or blocks: then a process may have a part of each.
    least_rate: below it somebody gave another optimizer's rate. keywords: what its class is made with besides. matrices: whether the
    blocks' matrices are a group of their own that says "muon": True.
    """

    target: str
    package: str | None = None
    state: float = MOMENTS
    split: bool = True
    betas: bool = True
    least_rate: float = 0.0
    matrices: bool = False
    keywords: Mapping[str, Any] = field(default_factory=dict)


OPTIMIZERS = {
    "adamw": Optimizer("torch.optim:AdamW", keywords={"fused": True}),
    # moments in 8 bits a number, for parameters of 4,096 numbers or more (Dettmers et al. 2022)
    "adamw8bit": Optimizer("bitsandbytes.optim:AdamW8bit", "bitsandbytes", MOMENTS_8BIT, split=False),
    # their state moves out of a GPU whose memory is full; without a GPU they are bitsandbytes' AdamW and adamw8bit
    "paged_adamw": Optimizer("bitsandbytes.optim:PagedAdamW", "bitsandbytes"),
    "paged_adamw8bit": Optimizer("bitsandbytes.optim:PagedAdamW8bit", "bitsandbytes", MOMENTS_8BIT, split=False),
    # second moments of rows and columns alone (Shazeer and Stern 2018). eps: the smallest variance, whose square float32 still holds (a
    # LoRA's first gradients are 0), and the smallest scale of a weight: with 1 an update is the rate itself, as AdamW's, and not a share of
    # the weight's size, which at the start of a LoRA is nothing
    "adafactor": Optimizer("torch.optim:Adafactor", state=0.01, split=False, betas=False, keywords={"eps": (1e-18, 1.0)}),
    # learning_rate times a rate that it finds (Mishchenko and Defazio 2023); as its authors advise for a rate that warms up
    "prodigy": Optimizer(
        "prodigyopt:Prodigy", "prodigyopt", 16.0, split=False, least_rate=0.1,
        keywords={"use_bias_correction": True, "safeguard_warmup": True},
    ),
    # the blocks' matrices move orthogonally (Jordan et al. 2024), all else as by adamw; of a matrix it keeps half of what `state` counts
    "muon": Optimizer("latentfm.training.optimizers.muon:MuonAdamW", split=False, matrices=True),
    # steps of equal size in every weight (Chen et al. 2023)
    "lion": Optimizer("lion_pytorch:Lion", "lion_pytorch", 4.0),
}  # fmt: skip
