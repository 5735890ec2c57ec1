"""Bi-level routing attention (BiFormer, arXiv 2303.08810, section 3), as a layer on channels-last maps."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridzoo.kernels import bi_level_route, routed_attention2d

Padding = Literal["bias", "zeros", "mask"]
PADDINGS = ("bias", "zeros", "mask")


class BiLevelRoutingAttention(nn.Module):
    """Every token attends to all tokens of the `topk` regions most like its own region; local detail is added by LePE.

    `(batch, height, width, dim)` in and out, any height and width.

    Where the regions do not divide the map, it is extended to the right and bottom by tokens that are

    * `"bias"`: images of a zero input, so that q, k and v equal the projection's bias. They count in the region means,
      are attended to and seen by LePE. BiFormer's tiny, small, base and stl weights were published with this code.
    * `"zeros"`: zero in q, k and v, left out of the region means but attended to (logit 0, value 0). The published
      `biformer_stl_nchw`. Here `regions` is only a wish: a region has `side // regions` tokens, and there are as many
      regions as the map then needs.
    * `"mask"`: absent. No published weights; the natural choice when training from scratch at odd sizes.

    Args:
        dim: channels, a multiple of `num_heads`.
        num_heads: attention heads; BiFormer uses `dim // 32`.
        topk: regions attended to by each region; at most all of them are.
        regions: regions per axis, whatever the map's size (cost then grows with the square of the area); or
        region_size: tokens per region side, the number of regions following the map (cost is linear in the area).
            Exactly one of the two must be given.
        padding: what stands beyond the map's edge, see above.
        lepe_kernel: size of the depthwise convolution over v (local position encoding).

    Raises:
        ValueError: an argument does not fit; the message names it.

    Example:
        >>> import torch
        >>> from hybridzoo.layers import BiLevelRoutingAttention
        >>> layer = BiLevelRoutingAttention(64, num_heads=2, topk=4, regions=7)
        >>> layer(torch.randn(1, 30, 41, 64)).shape
        torch.Size([1, 30, 41, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        topk: int,
        *,
        regions: int | tuple[int, int] | None = None,
        region_size: int | None = None,
        padding: Padding = "bias",
        lepe_kernel: int = 5,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads; got dim={dim}, num_heads={num_heads}")
        if (regions is None) == (region_size is None):
            raise ValueError(f"give either regions or region_size; got regions={regions}, region_size={region_size}")
        if min(regions if isinstance(regions, tuple) else (regions or region_size or 0,)) < 1:
            raise ValueError(f"regions and region_size must be positive; got {regions}, {region_size}")
        if padding not in PADDINGS:
            raise ValueError(f"padding must be one of {', '.join(PADDINGS)}; got {padding!r}")
        self.num_heads = num_heads
        self.topk = topk
        self.regions = (regions, regions) if isinstance(regions, int) else regions
        self.region_size = region_size
        self.padding = padding
        self.scale = dim**-0.5  # of the full width, not of a head: the published softmax temperature
        self.qkv = nn.Linear(dim, 3 * dim)
        self.lepe = nn.Conv2d(dim, dim, lepe_kernel, padding=lepe_kernel // 2, groups=dim)
        self.proj = nn.Linear(dim, dim)

    def region_grid(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Number of regions (rows, columns) on a map of this size, and tokens per region (height, width)."""
        if self.region_size is not None:
            wanted = (math.ceil(height / self.region_size), math.ceil(width / self.region_size))
        else:
            assert self.regions is not None
            wanted = self.regions
        sizes, counts = [], []
        for side, count in zip((height, width), wanted, strict=True):
            size = max(1, side // count) if self.padding == "zeros" else math.ceil(side / count)
            sizes.append(size)
            # Only the "bias" rule keeps regions that lie wholly beyond the edge.
            counts.append(count if self.padding == "bias" else math.ceil(side / size))
        return (counts[0], counts[1]), (sizes[0], sizes[1])

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, dim = x.shape
        grid, size = self.region_grid(height, width)
        qkv = self.qkv(x)
        beyond = (grid[0] * size[0] - height, grid[1] * size[1] - width)
        if any(beyond) and self.padding != "mask":
            fill = self.qkv.bias if self.padding == "bias" else torch.zeros_like(self.qkv.bias)
            qkv = _extend(qkv, beyond, fill.to(qkv.dtype))
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, dim // self.num_heads)).unbind(3)
        if self.topk >= grid[0] * grid[1]:  # every region is routed to every other: nothing to choose
            q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (query, key, value))
            out = F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).reshape(query.shape)
        else:
            routes = self._route(query, key, grid, size, (height, width))
            out = routed_attention2d(query, key, value, routes, grid, scale=self.scale)
        out = out[:, :height, :width].flatten(3)
        return self.proj(out + self._lepe(value.flatten(3), height, width))

    def _route(
        self, query: Tensor, key: Tensor, grid: tuple[int, int], size: tuple[int, int], real: tuple[int, int]
    ) -> Tensor:
        if self.padding == "zeros" and real != key.shape[1:3]:
            # Means over real tokens only: undo the dilution of a key region by its zeros. (A query region's own
            # dilution scales all its logits alike and changes no choice.)
            share = [
                (side - step * torch.arange(n, device=key.device)).clamp(max=step) / step
                for side, step, n in zip(real, size, grid, strict=True)
            ]
            rows, columns = (s.repeat_interleave(step) for s, step in zip(share, size, strict=True))
            key = key / (rows[:, None] * columns)[:, :, None, None].to(key.dtype)
        return bi_level_route(query, key, grid, self.topk)

    def _lepe(self, value: Tensor, height: int, width: int) -> Tensor:
        if self.padding == "zeros":  # the rewrite convolves the map as it was; the legacy code the extended one
            value = value[:, :height, :width]
        return self.lepe(value.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)[:, :height, :width]


def _extend(x: Tensor, beyond: tuple[int, int], fill: Tensor) -> Tensor:
    """Append rows and columns of the vector `fill` to a `(B, H, W, C)` map, at the bottom and right."""
    below, right = beyond
    if right:
        x = torch.cat([x, fill.expand(x.shape[0], x.shape[1], right, -1)], dim=2)
    if below:
        x = torch.cat([x, fill.expand(x.shape[0], below, x.shape[2], -1)], dim=1)
    return x
