"""Bi-level routing attention (BiFormer, arXiv 2303.08810, section 3), as a layer on channels-last maps."""

from __future__ import annotations

from typing import Literal

from timm.layers import register_notrace_module
from torch import Tensor, nn

from hybridzoo.kernels import arguments, bi_level_route, routed_attention2d
from hybridzoo.kernels.open_sizes import larger, parts, smaller, surely
from hybridzoo.kernels.routed.grid import Grid
from hybridzoo.layers.heads import softmax_attention

Padding = Literal["bias", "zeros", "mask"]
PADDINGS = ("bias", "zeros", "mask")


@register_notrace_module
class BiLevelRoutingAttention(nn.Module):
    """Every token attends to all tokens of the `topk` regions most like its own region; local detail is added by LePE.

    `(batch, height, width, dim)` in and out, any height and width.

    If the regions do not divide the map, they extend beyond it, to the right and bottom, over padding tokens that are

    * `"bias"`: images of a zero input, so that q, k and v equal the projection's bias. They count in the region means,
      are attended to and seen by LePE. BiFormer's tiny, small, base and stl weights were published with this code.
    * `"zeros"`: zero in q, k and v, left out of the region means but attended to (logit 0, value 0). The published
      `biformer_stl_nchw`. Here `regions` is not exact: a region has `side // regions` tokens, and there are as many
      regions as the map needs.
    * `"mask"`: absent. No published weights; the natural choice when training from scratch at odd sizes.

    Args:
        dim: channels, a multiple of `num_heads`.
        num_heads: attention heads; BiFormer uses `dim // 32`.
        topk: regions attended to by each region; at most all of them are.
        regions: regions per axis for any map size (cost then grows with the square of the area); or
        region_size: tokens per region side; the number of regions follows from the map (cost is linear in the area).
            Exactly one of the two must be given.
        padding: the padding tokens, see above.
        lepe_kernel: size of the depthwise convolution over v (local position encoding); odd.

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
        arguments.channels(dim, num_heads)
        if (regions is None) == (region_size is None):
            raise ValueError(f"give either regions or region_size; got regions={regions}, region_size={region_size}")
        if padding not in PADDINGS:
            raise ValueError(f"padding must be one of {', '.join(PADDINGS)}; got {padding!r}")
        self.num_heads = num_heads
        self.topk = arguments.positive("topk", topk)
        self.regions = None if regions is None else arguments.pair("regions", regions)
        self.region_size = None if region_size is None else arguments.positive("region_size", region_size)
        self.padding = padding
        self.scale = dim**-0.5  # of the full width, not of a head: the published softmax temperature
        self.qkv = nn.Linear(dim, 3 * dim)
        lepe_kernel = arguments.odd("lepe_kernel", lepe_kernel)
        self.lepe = nn.Conv2d(dim, dim, lepe_kernel, padding=lepe_kernel // 2, groups=dim)
        self.proj = nn.Linear(dim, dim)

    def region_grid(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Number of regions (rows, columns) on a map of this size, and tokens per region (height, width)."""
        if self.region_size is not None:
            wanted = (parts(height, self.region_size), parts(width, self.region_size))
        else:
            assert self.regions is not None
            wanted = self.regions
        sizes, counts = [], []
        for side, count in zip((height, width), wanted, strict=True):
            size = larger(1, side // count) if self.padding == "zeros" else parts(side, count)
            sizes.append(size)
            # Only the "bias" rule keeps regions that are entirely padding.
            counts.append(count if self.padding == "bias" else parts(side, size))
        return (counts[0], counts[1]), (sizes[0], sizes[1])

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, dim = x.shape
        regions, size = self.region_grid(height, width)
        grid = Grid(*regions, *size)
        heads = (3, self.num_heads, dim // self.num_heads)
        fill = None  # query, key and value of the padding tokens
        if not grid.ends_with(x) and self.padding != "mask":
            fill = self.qkv(x.new_zeros(1, dim)).view(heads) if self.padding == "bias" else x.new_zeros(heads)
        query, key, value = self.qkv(x).unflatten(-1, heads).unbind(3)
        if not surely(self.topk >= grid.regions):
            routes = self._route(query, key, grid, fill)
            beyond = None if fill is None else fill[1:]
            out = routed_attention2d(
                query, key, value, routes, regions, region_size=size, fill=beyond, scale=self.scale
            )
        else:  # every region is routed to every other: nothing to choose
            keys, values = key, value
            if fill is not None:
                keys, values = grid.extend(key, fill[1]), grid.extend(value, fill[2])
            q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (query, keys, values))
            out = softmax_attention(q, k, v, scale=self.scale).transpose(1, 2).reshape(query.shape)
        if fill is not None and self.padding == "bias":  # the code base with "zeros" convolves the unpadded map
            # Only as much padding as the convolution reads.
            reach = self.lepe.kernel_size[0] // 2
            below, right = (smaller(n, reach) for n in grid.beyond(x))
            value = Grid(1, 1, height + below, width + right).extend(value, fill[2])
        local = self.lepe(value.flatten(3).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)[:, :height, :width]
        return self.proj(out.flatten(3) + local)

    def extra_repr(self) -> str:
        cut = f"regions={self.regions}" if self.region_size is None else f"region_size={self.region_size}"
        return f"num_heads={self.num_heads}, topk={self.topk}, {cut}, padding={self.padding!r}"

    def _route(self, query: Tensor, key: Tensor, grid: Grid, fill: Tensor | None) -> Tensor:
        in_means = fill[:2] if fill is not None and self.padding == "bias" else None
        topk = smaller(self.topk, grid.regions)
        return bi_level_route(query, key, grid[:2], topk, region_size=grid[2:], fill=in_means)
