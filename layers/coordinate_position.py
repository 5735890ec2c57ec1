"""Positions as learned functions of coordinates (SwinV2's continuous position bias; FasterViT): any size, no tables."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from hybridzoo.kernels.open_sizes import larger
from hybridzoo.layers.relative_position import gather_bias

HIDDEN_DIM = 512


class CoordinateEmbedding(nn.Module):
    """Embedding of every token of a map, computed from its position.

    Coordinates are relative to `side // 2`, in units of `side // 2`: from -1 to 1 for odd sides, one step less for even
    ones.

    Args:
        dim: channels.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = _mlp(dim)

    def forward(self, size: tuple[int, int]) -> Tensor:
        """`(rows * columns, dim)`, row by row."""
        like = _like(self.mlp)
        exact = torch.promote_types(like.dtype, torch.float32)
        axes = [(torch.arange(n, dtype=exact, device=like.device) - n // 2) / larger(n // 2, 1) for n in size]
        return self.mlp(_pairs(*axes).to(like.dtype)).flatten(0, 1)


class CoordinateBias(nn.Module):
    """Relative position bias from the offset of query and key, by log-spaced coordinates; between 0 and 16.

    Offsets are divided by the largest offset in the map, so that the bias scales with the map.

    Args:
        num_heads: attention heads.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.mlp = _mlp(num_heads)

    def forward(self, size: tuple[int, int], extra: int = 0) -> Tensor:
        """`(heads, extra + tokens, extra + tokens)`, query by key.

        Args:
            size: `(rows, columns)` of the tokens.
            extra: tokens without a position in front of the others; their rows and columns are zero.
        """
        axes, like = [], _like(self.mlp)
        for n in size:
            # Query minus key, descending: a table is ordered by key minus query.
            offset = torch.arange(n - 1, -n, -1, device=like.device)
            scaled = 8 * offset / larger(n - 1, 1)  # float32 in a float64 model too, as the published tables are
            axes.append(torch.sign(scaled) * torch.log2(scaled.abs() + 1) / 3)  # log2(8) = 3
        table = 16 * torch.sigmoid(self.mlp(_pairs(*axes).to(like.dtype)))
        return F.pad(gather_bias(table.permute(2, 0, 1), size), (extra, 0, extra, 0))


def _mlp(dim: int) -> Mlp:
    return Mlp(2, HIDDEN_DIM, dim, act_layer=nn.ReLU, bias=(True, False))


def _like(mlp: Mlp) -> Tensor:
    """A tensor with the coordinates' dtype and device: those of the weights, unless these are quantized."""
    weight: Any = getattr(mlp.fc1, "weight", None)
    return weight if isinstance(weight, Tensor) and weight.is_floating_point() else torch.empty(0)


def _pairs(rows: Tensor, columns: Tensor) -> Tensor:
    """All (row, column), `(rows, columns, 2)`."""
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
