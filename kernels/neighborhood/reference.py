"""The formula: attention with a dense mask, quadratic in tokens. For tests in float64."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def axis_table(length: int, kernel: int, dilation: int) -> list[tuple[list[int], list[int]]]:
    """For every position of one axis: the positions of its keys, and the index of each key into that axis of rpb."""
    table = []
    for i in range(length):
        residue, p = i % dilation, i // dilation  # dilation group, and place in it
        group = list(range(residue, length, dilation))
        start = min(max(p - kernel // 2, 0), max(len(group) - kernel, 0))
        places = range(start, min(start + kernel, len(group)))
        table.append(([group[j] for j in places], [j - p + kernel - 1 for j in places]))
    return table


def dense_axis(length: int, kernel: int, dilation: int) -> tuple[Tensor, Tensor]:
    """`axis_table` as `(length, length)` matrices, query by key: seen (bool), and index into rpb (0 if not seen)."""
    visible, index = torch.zeros(length, length, dtype=torch.bool), torch.zeros(length, length, dtype=torch.int64)
    for i, (keys, entries) in enumerate(axis_table(length, kernel, dilation)):
        visible[i, keys] = True
        index[i, keys] = torch.tensor(entries)
    return visible, index


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
    fill: Tensor | None = None,
) -> Tensor:
    """Masked dense attention in the dtype of `query`. Differentiable. Tokens with the value `fill` are appended."""
    height, width = query.shape[1:3]
    if fill is not None:
        extra = (0, 0, 0, 0, 0, max(0, kernel[1] * dilation[1] - width), 0, max(0, kernel[0] * dilation[0] - height))
        new = F.pad(torch.zeros_like(query[..., :1]), extra, value=1.0)
        query, key, value = F.pad(query, extra), F.pad(key, extra) + new * fill[0], F.pad(value, extra) + new * fill[1]
        return na2d(query, key, value, rpb, kernel, dilation, scale)[:, :height, :width]
    (seen_h, index_h), (seen_w, index_w) = (
        dense_axis(*axis) for axis in zip((height, width), kernel, dilation, strict=True)
    )
    # Letters of einsum: queries at row y, column x; keys at row u, column v.
    scores = scale * torch.einsum("byxhd,buvhd->bhyxuv", query, key)
    if rpb is not None:
        scores = scores + rpb[:, index_h[:, None, :, None], index_w[None, :, None, :]]
    visible = seen_h[:, None, :, None] & seen_w[None, :, None, :]
    scores = scores.masked_fill(~visible, -math.inf)
    weight = scores.flatten(-2).softmax(-1).view_as(scores)
    return torch.einsum("bhyxuv,buvhd->byxhd", weight, value)
