"""How latents, timesteps and pooled text enter the MM-DiT. Parameter names are SD3's."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def sincos_1d(positions: Tensor, dim: int) -> Tensor:
    """[N, dim] float64: sines then cosines of `positions` [N] at dim/2 geometric frequencies from 1 down to 1/10000."""
    frequencies = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64, device=positions.device) / (dim / 2))
    angles = torch.outer(positions.double(), frequencies)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def position_table(dim: int, grid_size: int, base_size: int) -> Tensor:
    """[1, grid_size ** 2, dim] float32 two-dimensional table, x in the first half of the features, y in the second.

    Positions are scaled by base_size / grid_size, so the table spans base_size units whatever its resolution.
    """
    if dim % 4:
        raise ValueError(f"the position table needs a width divisible by 4, got {dim}")
    if torch.get_default_device().type == "meta":  # where nothing is computed, in Python, for which torch imports its compiler
        return torch.empty(1, grid_size**2, dim)
    axis = torch.arange(grid_size, dtype=torch.float32) / (grid_size / base_size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    table = torch.cat([sincos_1d(x.flatten(), dim // 2), sincos_1d(y.flatten(), dim // 2)], dim=1)
    return table.float().unsqueeze(0)


class PatchEmbed(nn.Module):
    """Latents [B, C, H, W] -> tokens [B, H W / patch_size^2, dim], with the centre crop of the position table added."""

    def __init__(self, sample_size: int, patch_size: int, in_channels: int, dim: int, max_size: int):
        super().__init__()
        self.patch_size, self.max_size = patch_size, max_size
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.register_buffer("pos_embed", position_table(dim, max_size, sample_size // patch_size))

    def crop(self, rows: int, columns: int) -> Tensor:
        """[1, rows * columns, dim]: the centre of the table. Raises ValueError when the grid is larger than the table."""
        if rows > self.max_size or columns > self.max_size:
            raise ValueError(
                f"latents of {rows} x {columns} patches are larger than the position table of {self.max_size} x {self.max_size}"
            )
        top, left = (self.max_size - rows) // 2, (self.max_size - columns) // 2
        table = self.pos_embed.view(1, self.max_size, self.max_size, -1)
        return table[:, top : top + rows, left : left + columns].flatten(1, 2)

    def forward(self, latents: Tensor) -> Tensor:
        rows, columns = latents.shape[-2] // self.patch_size, latents.shape[-1] // self.patch_size
        tokens = self.proj(latents).flatten(2).transpose(1, 2)
        # tokens one after another in memory: every block's norms and sums would keep the convolution's order, in which they are slower
        return (tokens + self.crop(rows, columns)).to(tokens.dtype).contiguous()


def timestep_features(timestep: Tensor, dim: int = 256) -> Tensor:
    """[B, dim] float32: cosines then sines of `timestep` [B] (1000 sigma, may be fractional)."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=timestep.device).float() / (dim // 2))
    angles = timestep.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TwoLayer(nn.Module):
    """linear_1, SiLU, linear_2."""

    def __init__(self, in_features: int, dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_features, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class TimeTextEmbed(nn.Module):
    """(timestep [B], pooled text [B, P]) -> conditioning vector [B, dim]: a sum of what each gives by itself."""

    def __init__(self, dim: int, pooled_dim: int):
        super().__init__()
        self.timestep_embedder = TwoLayer(256, dim)
        self.text_embedder = TwoLayer(pooled_dim, dim)

    def forward(self, timestep: Tensor, pooled: Tensor) -> Tensor:
        return self.timestep_embedder(timestep_features(timestep).to(pooled.dtype)) + self.text_embedder(pooled)

    def schedule(self, timesteps: Tensor, pooled: Tensor) -> Tensor:
        """[S, B, dim]: the conditioning vectors of B prompts at each of S timesteps."""
        return self.timestep_embedder(timestep_features(timesteps).to(pooled.dtype))[:, None] + self.text_embedder(pooled)
