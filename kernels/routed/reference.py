"""The formulas, token by token. Slow, meant for float64 tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def region_of(height: int, width: int, regions: tuple[int, int]) -> Tensor:
    """Region number of every token, `(height * width,)`."""
    rows = torch.arange(height) // math.ceil(height / regions[0])
    columns = torch.arange(width) // math.ceil(width / regions[1])
    return (rows[:, None] * regions[1] + columns).flatten()


def route_logits(query: Tensor, key: Tensor, regions: tuple[int, int], scale: float) -> Tensor:
    """`(batch, regions, regions)`: scaled dot products of region means over all channels."""
    batch, height, width = query.shape[:3]
    member = torch.nn.functional.one_hot(region_of(height, width, regions), regions[0] * regions[1]).to(query.dtype)
    mean = member / member.sum(0)
    q = torch.einsum("nr,bnc->brc", mean, query.reshape(batch, height * width, -1))
    k = torch.einsum("nr,bnc->brc", mean, key.reshape(batch, height * width, -1))
    return scale * q @ k.transpose(1, 2)


def routed_attention2d(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, regions: tuple[int, int], scale: float
) -> Tensor:
    """One query at a time: softmax over the concatenated tokens of its regions. Differentiable."""
    batch, height, width, heads, head_dim = query.shape
    region = region_of(height, width, regions)
    q, k, v = (t.reshape(batch, height * width, heads, head_dim) for t in (query, key, value))
    rows = []
    for b in range(batch):
        for i in range(height * width):
            keys = torch.cat([torch.nonzero(region == r).flatten() for r in routes[b, region[i]].tolist()])
            weight = torch.softmax(scale * torch.einsum("hd,khd->hk", q[b, i], k[b, keys]), dim=-1)
            rows.append(torch.einsum("hk,khd->hd", weight, v[b, keys]))
    return torch.stack(rows).view_as(query)
