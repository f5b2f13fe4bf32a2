"""Does a picture show what its prompt asked for? Nearest-neighbour retrieval among reference pictures, by pixels."""

import torch
from torch import Tensor
from torch.nn import functional as F

COMPARED_AT = 24  # pixels a side: small enough to forgive a shifted edge, large enough to tell two objects apart


def shrink(pictures: Tensor, size: int = COMPARED_AT) -> Tensor:
    """[N, 3 * size * size] float32: pictures [N, 3, H, W] averaged down to size x size and flattened."""
    return F.interpolate(pictures.float(), size=(size, size), mode="area").flatten(1)


def ranks(pictures: Tensor, own: Tensor, references: Tensor, allowed: Tensor) -> Tensor:
    """[N] int: how many allowed references are nearer to each picture than its own one; 0 means retrieved first.

    pictures [N, 3, H, W]; own [N] index of each one's reference; references [M, 3, H, W] on the same scale;
    allowed bool [N, M] says which references compete (for example those of the same style). Distance is Euclidean
    on the pixels at 24 x 24. Raises ValueError when a picture's own reference does not compete.
    """
    if not allowed[torch.arange(len(own)), own].all():
        raise ValueError("every picture's own reference must be among the allowed ones")
    distances = torch.cdist(shrink(pictures).double(), shrink(references).double())
    mine = distances[torch.arange(len(own)), own]
    return ((distances < mine[:, None]) & allowed).sum(dim=1)
