"""The distance between two samples that the tests of sampling need: sliced Wasserstein."""

import torch
from torch import Tensor


def sliced_w2(a: Tensor, b: Tensor, directions: int = 64) -> float:
    """Returns the sliced Wasserstein-2 distance between point sets a and b, [n, d] each (Bonneel et al. 2015).

    In one dimension the best pairing is that of the sorted points; the squared costs are averaged over fixed random directions.
    """
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"a and b must have one shape [n, d], got {tuple(a.shape)} and {tuple(b.shape)}")
    axes = torch.randn(a.shape[1], directions, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    axes = axes / axes.norm(dim=0)
    apart = (a.double() @ axes).sort(dim=0).values - (b.double() @ axes).sort(dim=0).values
    return apart.square().mean().sqrt().item()
