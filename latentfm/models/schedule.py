"""What the network computes from prompts and times alone, once for a whole schedule of times: projected text and modulations.

What it replaces: the modulations' products, a third of SD3 medium's weights read at every step. What it gains: they are read once for as
many steps as make ROWS rows, and the text is projected once.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from latentfm.models.block import BlockModulation

if TYPE_CHECKING:
    from latentfm.models.mmdit import MMDiT

ROWS = 128  # prompts times steps in one product: 28 steps of two guided pictures


class Precomputed:
    """What an MMDiT computed for the timesteps [S] of a schedule and the prompts it is first run with.

    Make one, and pass it to each forward call beside the step's timestep, which says what of it is meant. A timestep that the host would
    have to wait for (on a GPU), or that is not of the schedule, is computed as without it. Memory: at most 16 dim numbers a block and row
    (150 MB for SD3 medium in bf16).
    """

    def __init__(self, timesteps: Tensor):
        self.timesteps = timesteps.cpu()
        self.places = {time: place for place, time in enumerate(self.timesteps.tolist())}
        self.first = 0
        self.text: Tensor | None = None  # [B, L, dim]
        self.blocks: list[list[BlockModulation]] = []  # [block][place - first]
        self.out: list[tuple[Tensor, ...]] = []  # [place - first]

    def place(self, network: "MMDiT", timestep: Tensor, batch: int, device: torch.device) -> int | None:
        """Which of the timesteps `timestep` [B] is; None where it, the network's weights or the batch do not allow to take it from here.

        Gradients ask for the real computation; weights that are offloaded or sharded are elsewhere; FasterCache leaves half of a guided
        batch out.
        """
        if torch.is_grad_enabled() or timestep.device.type != "cpu" or (self.text is not None and self.text.shape[0] != batch):
            return None
        weights = (block.norm1.linear.weight for block in network.transformer_blocks)
        if any(weight.device != device or hasattr(weight, "device_mesh") for weight in weights):
            return None
        times = set(timestep.tolist())
        return self.places.get(times.pop()) if len(times) == 1 else None

    def at(self, place: int, network: "MMDiT", text: Tensor, pooled: Tensor) -> tuple[Tensor, list[BlockModulation], tuple[Tensor, ...]]:
        """(projected text, each block's modulation, the output's) at a place, for the prompts' `text` [B, L, width] and `pooled` [B, P]."""
        if self.text is None:
            self.text = network.context_embedder(text)
        if not 0 <= place - self.first < len(self.out):
            self.compute(place, network, pooled)
        index = place - self.first
        return self.text, [block[index] for block in self.blocks], self.out[index]

    def compute(self, place: int, network: "MMDiT", pooled: Tensor) -> None:
        """Computes the modulations of the steps from `place` on that make ROWS rows, in one product for each block."""
        self.first = place
        times = self.timesteps[place:][: max(1, ROWS // pooled.shape[0])].to(pooled.device)
        conditioning = F.silu(network.time_text_embed.schedule(times, pooled))
        # compiled blocks would have a graph of their own for the step whose vectors begin where their memory does: here none's do
        ahead = int(network.blocks_are_compiled)
        conditioning = torch.cat([conditioning[:ahead], conditioning])

        def by_step(parts: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
            return list(zip(*(part.unbind(0)[ahead:] for part in parts), strict=True))

        both = (block.modulation(conditioning) for block in network.transformer_blocks)
        self.blocks = [[BlockModulation(*step) for step in zip(by_step(image), by_step(text), strict=True)] for image, text in both]
        self.out = by_step(network.norm_out(conditioning))
