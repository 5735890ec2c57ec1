"""Routed attention the way of the published code, which everybody copies: partition, expand, gather, attend.

Written from the paper and from measurements of that code, in our parameters, to be compared with.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridzoo.kernels.routed.grid import Grid
from hybridzoo.layers import BiLevelRoutingAttention


def partition(x: Tensor, grid: Grid) -> Tensor:
    """`(B, H, W, C)`, divided by the grid -> `(B, regions, tokens, C)`."""
    x = x.reshape(x.shape[0], grid.rows, grid.height, grid.columns, grid.width, -1)
    return x.transpose(2, 3).reshape(x.shape[0], grid.regions, grid.tokens, -1)


def merge(x: Tensor, grid: Grid) -> Tensor:
    """Inverse of `partition`."""
    x = x.reshape(x.shape[0], grid.rows, grid.columns, grid.height, grid.width, -1)
    return x.transpose(2, 3).reshape(x.shape[0], grid.rows * grid.height, grid.columns * grid.width, -1)


def attend(query: Tensor, both: Tensor, routes: Tensor, heads: int, scale: float) -> Tensor:
    """Query `(B, regions, tokens, C)`, key and value side by side in `both`; out like query.

    The gather reads from keys and values expanded over all query regions: its gradient is as large as that.
    """
    batch, count, tokens, channels = query.shape
    topk = routes.shape[2]
    expanded = both[:, None].expand(-1, count, -1, -1, -1)
    index = routes[..., None, None].expand(-1, -1, -1, tokens, 2 * channels)
    key, value = torch.gather(expanded, 2, index).split(channels, dim=-1)
    key = key.reshape(batch * count, topk * tokens, heads, -1).permute(0, 2, 3, 1)
    value = value.reshape(batch * count, topk * tokens, heads, -1).transpose(1, 2)
    query = query.reshape(batch * count, tokens, heads, -1).transpose(1, 2)
    out = ((query * scale) @ key).softmax(-1) @ value
    return out.transpose(1, 2).reshape(batch, count, tokens, channels)


def routed_attention(
    q: Tensor, k: Tensor, v: Tensor, fill: Tensor | None, routes: Tensor, grid: Grid, scale: float
) -> Tensor:
    """The same function as `hybridzoo.kernels.routed_attention2d`."""
    height, width, heads = q.shape[1:4]
    if fill is not None:
        q, k, v = grid.extend(q, torch.zeros_like(fill[0])), grid.extend(k, fill[0]), grid.extend(v, fill[1])
    query, key, value = (partition(t.flatten(3), grid) for t in (q, k, v))
    out = attend(query, torch.cat([key, value], dim=-1), routes, heads, scale)
    return merge(out, grid)[:, :height, :width].unflatten(-1, (heads, -1))


class PlainBiLevelRoutingAttention(BiLevelRoutingAttention):
    """The layer as published for BiFormer-T, -S and -B: padded before the projection, partitioned throughout."""

    def forward(self, x: Tensor) -> Tensor:
        height, width, dim = x.shape[1:]
        regions, size = self.region_grid(height, width)
        grid = Grid(*regions, *size)
        below, right = grid.beyond(x)
        x = F.pad(x, (0, 0, 0, right, 0, below))
        query, both = self.qkv(partition(x, grid)).split([dim, 2 * dim], dim=-1)
        with torch.no_grad():
            logits = query.mean(2) * self.scale @ both[..., :dim].mean(2).transpose(1, 2)
            routes = logits.topk(min(self.topk, grid.regions), dim=-1).indices
        out = merge(attend(query, both, routes, self.num_heads, self.scale), grid)
        local = self.lepe(merge(both[..., dim:], grid).permute(0, 3, 1, 2).contiguous())
        return self.proj(out + local.permute(0, 2, 3, 1))[:, :height, :width]


def make_plain(model: nn.Module) -> nn.Module:
    """Give `model` plain routed layers, in place."""
    for module in model.modules():
        if type(module) is BiLevelRoutingAttention:
            module.__class__ = PlainBiLevelRoutingAttention
    return model
