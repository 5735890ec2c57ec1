"""Rotary position embedding of a map, as in RMT and RAVLT (RoFormer, arXiv 2104.09864, on two axes)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Rotary2d(nn.Module):
    """Cosines and sines of a map's positions, `(2, height * width, head_dim / 2)`, for `rotate`.

    The first half of a head's channels is rotated by the row, the second by the column, counted in tokens from 0. Along
    an axis, pair t of m = head_dim / 4 is rotated by 10000 ** (-t / (m - 1)) per token: the first by 1, the last by
    1e-4. Computed in float32, or wider for a wider `dtype`: in half precision, the angles of distant positions would be
    wrong.

    Args:
        head_dim: channels of a head, a multiple of 4.

    Raises:
        ValueError: `head_dim` is not a multiple of 4.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        if head_dim % 4:
            raise ValueError(f"head_dim must be a multiple of 4 (pairs on two axes); got {head_dim}")
        self.pairs = head_dim // 4

    def forward(self, height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        exact = torch.promote_types(dtype, torch.float32)
        # In float32 as published, also in float64 networks.
        turn = 1 / 10000 ** torch.linspace(0, 1, self.pairs, device=device, dtype=torch.float32)
        down = torch.arange(height, device=device, dtype=exact)[:, None] * turn
        right = torch.arange(width, device=device, dtype=exact)[:, None] * turn
        angles = torch.cat([down[:, None].expand(-1, width, -1), right.expand(height, -1, -1)], dim=-1).flatten(0, 1)
        return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate pairs of neighbouring channels of `(batch, heads, tokens, head_dim)` by the result of `Rotary2d`.

    The result has the memory order of `split_heads`, which compilers expect for inputs of attention.
    """
    cos, sin = rotation[:, :, None].to(x.dtype).unbind(0)
    first, second = x.transpose(1, 2).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2).transpose(1, 2)
