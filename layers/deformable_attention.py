"""Deformable attention: all tokens attend to the same few places of the map, which are predicted from the image.

DAT (Xia et al., CVPR 2022, arXiv 2201.00520) and DAT++ (the same authors, arXiv 2309.01430). Places are coordinates
`(row, column)`, from -1 at the first token of an axis to 1 at its last.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hybridzoo.kernels import arguments
from hybridzoo.kernels.open_sizes import is_open, larger, smaller
from hybridzoo.layers.heads import merge_heads, softmax_attention, split_heads
from hybridzoo.layers.init import trunc_normal_
from hybridzoo.layers.precision import without_autocast
from hybridzoo.layers.relative_position import resize_table
from hybridzoo.layers.sampling import sample_differences, sample_map

# Largest number of scores of an image in memory (32 MB in float32); further rows of queries are processed in parts.
SCORES = 2**23


@register_notrace_module
class DeformableAttention(nn.Module):
    """Multi-head attention to keys and values that are sampled from the map at learned places.

    `(batch, height, width, dim)` in and out, any height and width. A grid of one key for `stride x stride` tokens is
    moved by offsets that a small convolution reads from the queries, for every group of channels its own. The map is
    read there (bilinearly, zeros beyond it) and projected to keys and values. A bias depends on where a query stands
    relative to a key, see `DisplacementBias`. Memory grows with the number of tokens, not of pairs: the queries of
    large maps attend some rows at a time, and training computes their scores again in the backward pass.

    Two generations differ in the rule for the places:

    * DAT++ (`offset_range=None`): offsets are free and the places are kept inside the map. The undisturbed grid lies
      half a step to the bottom and right of one from corner to corner (published so). Queries stand from corner to
      corner. A single query or key of an axis stands in its middle, at 0; the published code gives NaN there.
    * DAT (`offset_range=1`): a tanh keeps offsets below so many steps of the grid, and the places may leave the map.
      Grid and queries stand as the centres of pixels do, at `2 * (i + 0.5) / n - 1`.

    Args:
        dim: channels, a multiple of `num_heads`.
        num_heads: attention heads; the published models use `dim // 32`.
        groups: groups of channels that are sampled at different places; divides `num_heads`.
        table_size: side of the map, in tokens, for which neighbours in the bias table are one token apart; 2 or more.
        stride: tokens for one key, along each axis.
        offset_kernel: size of the convolution that makes the offsets, odd.
        offset_range: see above.

    Raises:
        ValueError: an argument does not fit; the message names it.

    Example:
        >>> import torch
        >>> from hybridzoo.layers import DeformableAttention
        >>> layer = DeformableAttention(64, num_heads=2, groups=1, table_size=56, stride=8, offset_kernel=9)
        >>> x = torch.randn(1, 30, 41, 64)
        >>> layer(x).shape
        torch.Size([1, 30, 41, 64])
        >>> layer.places(layer.query(x)).shape
        torch.Size([1, 1, 4, 6, 2])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        groups: int,
        table_size: int,
        stride: int = 1,
        offset_kernel: int = 3,
        *,
        offset_range: float | None = None,
    ) -> None:
        super().__init__()
        arguments.channels(dim, num_heads)
        if num_heads % arguments.positive("groups", groups):
            raise ValueError(f"groups must divide num_heads; got groups={groups}, num_heads={num_heads}")
        self.num_heads = num_heads
        self.groups = groups
        self.offset_range = offset_range
        self.query = nn.Linear(dim, dim)
        self.offset = Offset(
            dim // groups, arguments.odd("offset_kernel", offset_kernel), arguments.positive("stride", stride)
        )
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.bias = DisplacementBias(num_heads, table_size)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        query = self.query(x)
        places = self.places(query).flatten(2, 3)
        sampled = sample_map(x, places)
        key, value = split_heads(self.key(sampled), self.num_heads), split_heads(self.value(sampled), self.num_heads)
        line = _corners if self.offset_range is None else _centres
        rows, columns = line(height, places), line(width, places)
        step = larger(1, SCORES // (self.num_heads * width * places.shape[2]))
        if is_open(step) or step >= height:  # how many parts there are cannot be left open
            return self.proj(self._attend(query, key, value, rows, columns, places))
        parts = []
        for part, coordinates in zip(query.split(step, 1), rows.split(step), strict=True):
            given = (part, key, value, coordinates, columns, places)
            again = torch.is_grad_enabled()
            out = checkpoint(self._attend, *given, use_reentrant=False) if again else self._attend(*given)
            parts.append(out)
        return self.proj(torch.cat(parts, 1))

    def places(self, query: Tensor) -> Tensor:
        """Where keys are read: queries `(batch, height, width, dim)` -> `(batch, groups, rows, columns, 2)`."""
        grouped = query.unflatten(3, (self.groups, -1)).permute(0, 3, 1, 2, 4)
        offset = self.offset(grouped.flatten(0, 1)).unflatten(0, (-1, self.groups))
        offset = offset.to(torch.promote_types(offset.dtype, torch.float32))
        rows, columns = offset.shape[2:4]
        if self.offset_range is None:
            return (_pairs(_corners(rows, offset, 0.5), _corners(columns, offset, 0.5)) + offset).clamp(-1, 1)
        down, along = (offset.tanh() * 2 * self.offset_range).unbind(-1)
        moved = torch.stack((down / rows, along / columns), dim=-1)
        return _pairs(_centres(rows, offset), _centres(columns, offset)) + moved

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, rows: Tensor, columns: Tensor, places: Tensor
    ) -> Tensor:
        """`(batch, rows, columns, dim)` of these rows of queries."""
        bias = self.bias(rows, columns, places).to(query.dtype)
        out = softmax_attention(split_heads(query.flatten(1, 2), self.num_heads), key, value, bias)
        return merge_heads(out).view(query.shape)


class Offset(nn.Module):
    """Queries of a group `(batch, height, width, dim)` -> offsets `(batch, rows, columns, 2)`, one a key."""

    def __init__(self, dim: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel_size, stride, kernel_size // 2, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.act = nn.GELU()
        self.proj = nn.Linear(dim, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x):  # bfloat16 is coarser than a token of a large map
            x = self.conv(x.to(self.norm.weight.dtype).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            return self.proj(self.act(self.norm(x)))


class DisplacementBias(nn.Module):
    """Bias of attention to places anywhere, read bilinearly from a table over displacements.

    The entry for a query at `t` and a key at `p` is the table's value at `(t - p) / 2`, in coordinates from -1 at its
    first entry of an axis to 1 at its last, zero beyond. One table serves maps of all sizes: it stretches with the map.

    A state dict whose table belongs to another size is resized (bicubic) while it is loaded.

    Args:
        num_heads: attention heads.
        size: side of the map, in tokens, for which neighbouring entries are one token apart; 2 or more.

    Raises:
        ValueError: `size` is below 2.
    """

    def __init__(self, num_heads: int, size: int) -> None:
        super().__init__()
        if arguments.positive("table_size", size) < 2:
            raise ValueError(f"table_size must be 2 tokens or more; got {size}")
        self.size = size
        self.table = nn.Parameter(torch.empty(num_heads, 2 * size - 1, 2 * size - 1))
        trunc_normal_(self.table, std=0.01)

    def forward(self, rows: Tensor, columns: Tensor, places: Tensor) -> Tensor:
        """`(batch, heads, rows * columns, keys)`; see `sample_differences`."""
        return sample_differences(self.table, rows, columns, places)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        loaded = state_dict.get(f"{prefix}table")
        if loaded is not None and loaded.ndim == 3 and loaded.shape[1:] != self.table.shape[1:]:
            state_dict[f"{prefix}table"] = resize_table(loaded, (self.size, self.size), "bicubic")
        super()._load_from_state_dict(state_dict, prefix, *args)


def _corners(count: int, like: Tensor, shift: float = 0.0) -> Tensor:
    """Coordinates of `count` points from the first token to the last, moved by `shift` steps; 0 for a single one."""
    points = torch.arange(count, dtype=like.dtype, device=like.device)
    return ((points + shift) / larger(count - 1, 1) * 2 - 1) * smaller(count - 1, 1)


def _centres(count: int, like: Tensor) -> Tensor:
    """Coordinates of the centres of `count` equal parts of an axis."""
    return (torch.arange(count, dtype=like.dtype, device=like.device) + 0.5) / count * 2 - 1


def _pairs(rows: Tensor, columns: Tensor) -> Tensor:
    """All (row, column), `(rows, columns, 2)`."""
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
