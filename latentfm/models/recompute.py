"""Gradient checkpointing of a share of the blocks (Chen et al. 2016): their activations are computed again in the backward pass.

What it replaces: keeping them. What it gains: their memory, for a third more time of the blocks that it is done to.
"""


class PartlyRecomputed:
    """A diffusers network of which some blocks are recomputed; it has `gradient_checkpointing`, whether any are."""

    gradient_checkpointing: bool
    checkpointed_fraction = 1.0

    def set_gradient_checkpointing(self, fraction: float) -> None:
        """Recomputes this share of the blocks in the backward pass, evenly spread: 0 none, 1 all. Raises ValueError outside [0, 1]."""
        if not 0 <= fraction <= 1:
            raise ValueError(f"the fraction of blocks to checkpoint must be from 0 to 1, got {fraction}")
        self.checkpointed_fraction = float(fraction)
        if fraction:
            self.enable_gradient_checkpointing()
        else:
            self.disable_gradient_checkpointing()

    def checkpointed(self, index: int) -> bool:
        """Whether block `index` is recomputed in the backward pass."""
        share = self.checkpointed_fraction
        return self.gradient_checkpointing and int((index + 1) * share) > int(index * share)
