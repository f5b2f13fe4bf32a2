"""Image tokens that go round a stretch of blocks while a new network is trained: fewer tokens to compute (TREAD, Krause et al. 2025)."""

from typing import NamedTuple

from torch import Tensor


class TokenRoute(NamedTuple):
    """Image tokens that alone pass through a stretch of blocks; the others go round it unchanged."""

    kept: Tensor  # [B, K] int64: indices of image tokens, each row without repeats
    first: int  # the first block of the stretch
    last: int  # its last block, where the others rejoin

    def check(self, blocks: int, image: Tensor) -> None:
        """Raises ValueError unless the route fits so many blocks and the tokens image [B, N, dim]."""
        if not 0 <= self.first <= self.last < blocks:
            raise ValueError(f"a token route from block {self.first} to {self.last} does not fit {blocks} blocks")
        if self.kept.ndim != 2 or self.kept.shape[0] != image.shape[0] or not 1 <= self.kept.shape[1] <= image.shape[1]:
            raise ValueError(f"kept tokens of shape {tuple(self.kept.shape)} should be [{image.shape[0]}, 1 to {image.shape[1]}]")

    def indices(self, image: Tensor) -> Tensor:
        """Where the kept tokens lie in image [B, N, dim]: [B, K, dim], as gather and scatter ask."""
        return self.kept.unsqueeze(-1).expand(-1, -1, image.shape[-1])
