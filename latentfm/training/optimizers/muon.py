"""Muon for the blocks' matrices beside AdamW for everything else, as one optimizer."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from latentfm.bounds import OPTIMIZER_CHUNK

MOMENTUM = 0.95
QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: singular values from 0 to 1 are near 1 after five rounds
ROUNDS = 5


def orthogonal(matrices: Tensor) -> Tensor:
    """The orthogonal matrix nearest to each of `matrices` (N, rows, columns; no more rows than columns), bfloat16 and roughly.

    Newton-Schulz in five rounds (Jordan et al. 2024): singular values come out between 0.7 and 1.2.
    """
    a, b, c = QUINTIC
    x = matrices.bfloat16()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) on the groups that say "muon": True, torch's fused AdamW on the others.

    A matrix moves along the orthogonal matrix nearest to its momentum (Nesterov's), scaled to the root mean square of AdamW's steps (Liu
    et al. 2025, "Muon is Scalable for LLM Training"), so that one learning rate and one weight decay serve both. Matrices of one shape are
    multiplied together, which is what torch.optim.Muon does but for the rounding of bfloat16, in less time where they are small.
    """

    def __init__(self, params: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float]):
        super().__init__([{"muon": False} | group for group in params], {"lr": lr, "betas": betas})
        rest = [group for group in self.param_groups if not group["muon"]]
        self.rest = torch.optim.AdamW(rest, lr=lr, betas=betas, fused=True) if rest else None  # a LoRA of the blocks leaves nothing to it

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Moves every parameter that has a gradient; a function that would compute gradients first is not taken."""
        for group in self.param_groups:
            if group["muon"]:
                self._step_matrices(group)
        if self.rest is not None:  # groups and state are kept here alone, where a checkpoint finds and puts them
            self.rest.param_groups, self.rest.state = [group for group in self.param_groups if not group["muon"]], self.state
            self.rest.step()

    def _step_matrices(self, group: dict[str, Any]) -> None:
        for parameters in alike(parameter for parameter in group["params"] if parameter.grad is not None):
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            moments, gradients = [self.state[p]["momentum_buffer"] for p in parameters], [p.grad for p in parameters]
            torch._foreach_lerp_(moments, gradients, 1 - MOMENTUM)
            updates = torch._foreach_lerp(gradients, moments, MOMENTUM)
            moves = orthogonal(torch.stack([u if u.shape[0] <= u.shape[1] else u.T for u in updates]))
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            rate = group["lr"] * 0.2 * max(parameters[0].shape) ** 0.5
            for parameter, move in zip(parameters, moves, strict=True):
                parameter.add_(move if parameter.shape[0] <= parameter.shape[1] else move.T, alpha=-rate)


def alike(matrices: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The `matrices` in groups of one shape, lying or standing, of at most OPTIMIZER_CHUNK numbers or one matrix."""
    shapes: dict[tuple[int, int], list[Tensor]] = {}
    for matrix in matrices:
        shapes.setdefault((min(matrix.shape), max(matrix.shape)), []).append(matrix)
    for (shorter, longer), found in shapes.items():
        most = max(1, OPTIMIZER_CHUNK // (shorter * longer))
        yield from (found[first : first + most] for first in range(0, len(found), most))
