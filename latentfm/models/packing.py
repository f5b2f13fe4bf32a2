"""Text without its padding: the tokens that a mask leaves, behind each other, so that the others are left out of every computation."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Heads = tuple[Tensor | None, Tensor, Tensor]  # query, key and value, [B, N, heads, head_dim] each


class Packing(NamedTuple):
    """How the text tokens of a batch lie behind each other without padding: [1, sum(lengths), dim]."""

    lengths: list[int]  # of each sample
    samples: Tensor  # [sum(lengths)] int64: which sample a token is of

    def per_token(self, vectors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Vectors [B, 1, dim] of samples as vectors [1, sum(lengths), dim] of tokens."""
        return tuple(vector[:, 0][self.samples][None] for vector in vectors)


def pack(text: Tensor, mask: Tensor) -> tuple[Tensor, Packing]:
    """The tokens of text [B, L, dim] that mask [B, L] marks, behind each other, [1, total, dim], and where they belong.

    The host waits for the mask. Raises ValueError when it has another shape or a sample has no token left.
    """
    if mask.shape != text.shape[:2]:
        raise ValueError(f"encoder_attention_mask of shape {tuple(mask.shape)} should be {tuple(text.shape[:2])}")
    mask = mask.bool()
    lengths = mask.sum(1).tolist()
    if not all(lengths):
        raise ValueError(f"encoder_attention_mask leaves sample {lengths.index(0)} without a text token; keep at least one")
    samples, _ = mask.nonzero(as_tuple=True)
    return text[mask][None], Packing(lengths, samples)


def each_with_its_own(
    join: Callable[[Heads, Heads], tuple[Tensor, Tensor | None]], image: Heads, text: Heads, lengths: list[int]
) -> tuple[Tensor, Tensor | None]:
    """What `join` makes of each picture and its own text, the texts packed: of the images [B, N, ...], of the texts [1, total, ...]."""
    images = zip(*(part.split(1) for part in image), strict=True)
    texts = zip(*([None] * len(lengths) if part is None else part.split(lengths, dim=1) for part in text), strict=True)
    found = [join(*pair) for pair in zip(images, texts, strict=True)]
    return torch.cat([row[0] for row in found]), None if found[0][1] is None else torch.cat([row[1] for row in found], dim=1)
