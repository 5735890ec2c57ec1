"""Routed attention as in the published code (partition, expand, gather, attend), and with FlexAttention.

Written from the paper and from measurements of that code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridzoo.kernels.routed.grid import Grid
from hybridzoo.train.bench.forms import Function


def partition(x: Tensor, grid: Grid) -> Tensor:
    """`(B, H, W, C)` -> `(B, regions, tokens, C)`; the grid divides H and W."""
    x = x.reshape(x.shape[0], grid.rows, grid.height, grid.columns, grid.width, -1)
    return x.transpose(2, 3).reshape(x.shape[0], grid.regions, grid.tokens, -1)


def merge(x: Tensor, grid: Grid) -> Tensor:
    """Inverse of `partition`."""
    x = x.reshape(x.shape[0], grid.rows, grid.columns, grid.height, grid.width, -1)
    return x.transpose(2, 3).reshape(x.shape[0], grid.rows * grid.height, grid.columns * grid.width, -1)


def attend(query: Tensor, both: Tensor, routes: Tensor, heads: int, scale: float) -> Tensor:
    """Query `(B, regions, tokens, C)`; key and value side by side in `both`; the result has the query's shape.

    The gather reads from keys and values expanded over all query regions, so its gradient has that size too.
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


def gather(
    q: Tensor, k: Tensor, v: Tensor, fill: Tensor | None, routes: Tensor, grid: Grid, scale: float
) -> Tensor:  # fmt: skip
    """The same function as `hybridzoo.kernels.routed_attention2d`."""
    height, width, heads = q.shape[1:4]
    if fill is not None:
        q, k, v = grid.extend(q, torch.zeros_like(fill[0])), grid.extend(k, fill[0]), grid.extend(v, fill[1])
    query, key, value = (partition(t.flatten(3), grid) for t in (q, k, v))
    out = attend(query, torch.cat([key, value], dim=-1), routes, heads, scale)
    return merge(out, grid)[:, :height, :width].unflatten(-1, (heads, -1))


def region_of(grid: Grid, height: int, width: int, device: torch.device) -> Tensor:
    """The region of every token, in row-major order."""
    row = torch.arange(height, device=device) // grid.height
    return (row[:, None] * grid.columns + torch.arange(width, device=device) // grid.width).flatten()


def seen(routes: Tensor, grid: Grid) -> Tensor:
    """Routes as a matrix `(B, regions, regions)`, true where a region attends to another."""
    found = torch.zeros(len(routes), grid.regions, grid.regions, dtype=torch.bool, device=routes.device)
    return found.scatter_(2, routes, True)


def flex(seen: Tensor, region: Tensor, scale: float, size: tuple[int, int]) -> Function:
    """FlexAttention, compiled, with the same mask; `(query, key, value) -> out`."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return seen[b, region[i], region[j]]

    blocks = create_block_mask(mask, len(seen), None, len(region), len(region), device=str(seen.device), _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
        return compiled(q, k, v, block_mask=blocks, scale=scale).transpose(1, 2).unflatten(1, size)

    return attend_all
