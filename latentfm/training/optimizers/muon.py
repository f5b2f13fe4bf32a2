"""Muon for the blocks' matrices beside AdamW for everything else, as one optimizer."""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class MuonAdamW(torch.optim.Optimizer):
    """torch.optim.Muon (Jordan et al. 2024) on the groups that say "muon": True, torch's fused AdamW on the others.

    A matrix moves along the orthogonal matrix nearest to its momentum, scaled to the root mean square of AdamW's steps (Liu et al.
    2025, "Muon is Scalable for LLM Training"), so that one learning rate and one weight decay serve both. Raises ValueError, as torch
    does, for what is no matrix in a group that says so.
    """

    def __init__(self, params: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float]):
        groups = [dict(group) for group in params]
        matrices = [group for group in groups if group.pop("muon", False)]
        others = [group for group in groups if all(group is not other for other in matrices)]
        self.parts = [torch.optim.Muon(matrices, lr=lr, adjust_lr_fn="match_rms_adamw")] if matrices else []
        self.parts += [torch.optim.AdamW(others, lr=lr, betas=betas, fused=True)] if others else []
        super().__init__([group for part in self.parts for group in part.param_groups], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Moves every parameter that has a gradient; returns what `closure` did, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        first = 0
        for part in self.parts:  # groups and state are kept here alone, where a checkpoint finds and puts them
            last = first + len(part.param_groups)
            part.param_groups, part.state, first = self.param_groups[first:last], self.state, last
            part.step()
        return loss
