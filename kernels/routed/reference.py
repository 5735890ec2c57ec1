"""The formulas, computed token by token. Slow; for tests in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridzoo.kernels.routed.grid import Grid


def region_of(grid: Grid) -> Tensor:
    """`(rows * height, columns * width)`: the region number of every token, including those beyond the map."""
    rows = torch.arange(grid.rows * grid.height) // grid.height
    columns = torch.arange(grid.columns * grid.width) // grid.width
    return rows[:, None] * grid.columns + columns


def extended(x: Tensor, grid: Grid, fill: Tensor | None) -> Tensor:
    """The map, extended by tokens with the value `fill` (default zeros)."""
    height, width = grid.rows * grid.height, grid.columns * grid.width
    fill = torch.zeros(x.shape[3:], dtype=x.dtype) if fill is None else fill
    beyond = torch.ones(height, width, dtype=torch.bool)
    beyond[: x.shape[1], : x.shape[2]] = False
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, width - x.shape[2], 0, height - x.shape[1]))
    return padded + beyond[:, :, None, None] * fill


def route_logits(query: Tensor, key: Tensor, grid: Grid, scale: float, fill: Tensor | None = None) -> Tensor:
    """`(batch, regions, regions)`: scaled dot products of region means over all channels."""
    region = region_of(grid)
    member = torch.nn.functional.one_hot(region, grid.regions).to(query.dtype)
    if fill is None:
        member = member[: query.shape[1], : query.shape[2]]
    else:
        query, key = extended(query, grid, fill[0]), extended(key, grid, fill[1])
    mean = member / member.sum((0, 1))
    q, k = (torch.einsum("yxr,byxc->brc", mean, t.flatten(3)) for t in (query, key))
    return scale * q @ k.transpose(1, 2)


def routed_attention2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    grid: Grid,
    scale: float,
    fill: Tensor | None = None,
) -> Tensor:
    """One query at a time: softmax over all tokens of its regions. Differentiable."""
    batch, height, width = query.shape[:3]
    region = region_of(grid)
    if fill is None:
        keys_of = region[:height, :width].flatten()
    else:
        keys_of, key, value = region.flatten(), extended(key, grid, fill[0]), extended(value, grid, fill[1])
    q, k, v = (t.flatten(1, 2) for t in (query, key, value))
    rows = []
    for b in range(batch):
        for i, own in enumerate(region[:height, :width].flatten().tolist()):
            keys = torch.cat([torch.nonzero(keys_of == r).flatten() for r in routes[b, own].tolist()])
            weight = torch.softmax(scale * torch.einsum("hd,khd->hk", q[b, i], k[b, keys]), dim=-1)
            rows.append(torch.einsum("hk,khd->hd", weight, v[b, keys]))
    return torch.stack(rows).view_as(query)
