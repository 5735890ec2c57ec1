"""Neighborhood attention on a map that is extended by constant tokens at its bottom and right.

If a map has fewer than `kernel * dilation` tokens along an axis, the published NAT and DiNAT extend it to this number
with zeros. The projection turns zeros into its bias, so all these tokens are equal. For a query they are one key that
occurs once for each place of its window beyond the map, each time with another position bias. So nothing has to be
appended: the result of attention over the map, with its log-sum-exp, is merged with that one key.

    weight = exp(l) / (exp(l) + exp(lse)),  l = scale * query . key + log(sum over the window beyond of exp(rpb))

The extension does not change which tokens of the map a query sees: along an extended axis every dilation group is as
long as the window, which is then the whole group, with or without the tokens beyond the map.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hybridzoo.kernels.neighborhood.given import Window


def reaches(size: tuple[int, int], window: Window) -> bool:
    """Whether windows extend beyond a map of this size, `(rows, columns)`."""
    return any(k * d > length for length, k, d in zip(size, window.kernel, window.dilation, strict=True))


def merge(out: Tensor, lse: Tensor, query: Tensor, rpb: Tensor | None, fill: Tensor, window: Window) -> Tensor:
    """Attention over the map and the tokens beyond it, computed from attention over the map.

    Args:
        out: `(batch, height, width, heads, head_dim)`, the result for the map without the other tokens.
        lse: `(batch, height, width, heads)`, log-sum-exp of its scores.
        query: like `out`.
        rpb: `(heads, 2 * rows - 1, 2 * columns - 1)` or None.
        fill: `(2, heads, head_dim)`, key and value of the tokens beyond the map.
        window: see `api.na2d`.

    Returns:
        Like `out`; computed in float32 or wider, differentiable with respect to all tensors.
    """
    key, value = fill.to(lse.dtype).unbind(0)
    bias = log_sum_beyond((out.shape[1], out.shape[2]), rpb, out.shape[3], window, lse)
    score = window.scale * (query.to(lse.dtype) * key).sum(-1) + bias
    weight = torch.sigmoid(score - lse).unsqueeze(-1)
    wide = out.to(lse.dtype)
    return (wide + weight * (value - wide)).to(out.dtype)


def log_sum_beyond(size: tuple[int, int], rpb: Tensor | None, heads: int, window: Window, like: Tensor) -> Tensor:
    """`(height, width, heads)`: log of the sum of exp(rpb) over a query's window beyond the map; -inf if empty."""
    if rpb is None:
        rpb = like.new_zeros(heads, *(2 * k - 1 for k in window.kernel))
    table = rpb.to(like.dtype)
    largest = table.detach().amax((1, 2), keepdim=True)
    table = (table - largest).exp()
    (rows_on, rows_off), (columns_on, columns_off) = (
        _offsets(length, k, d, like) for length, k, d in zip(size, window.kernel, window.dilation, strict=True)
    )

    def total(table: Tensor) -> Tensor:  # the part at the bottom, then the rest on the right; no inexact differences
        return rows_off @ table @ (columns_on + columns_off).T + rows_on @ table @ columns_off.T

    some = total(torch.ones_like(table[:1])) > 0
    logs = torch.where(some, total(table), 1.0).log() + largest
    return torch.where(some, logs, -math.inf).permute(1, 2, 0)


def _offsets(length: int, kernel: int, dilation: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Two `(length, 2 * kernel - 1)` masks: the entries of the bias table in a token's window on and beyond the map.

    Every window is whole, because the axis is extended to at least `kernel * dilation` tokens.
    """
    token = torch.arange(length, device=like.device)
    group, place = token % dilation, token // dilation
    whole = max(length, kernel * dilation)
    members = (whole - group + dilation - 1) // dilation
    start = torch.minimum((place - kernel // 2).clamp(min=0), members - kernel)
    window = start[:, None] + torch.arange(kernel, device=like.device)
    on_map = group[:, None] + window * dilation < length
    entry = (window - place[:, None] + kernel - 1)[:, :, None] == torch.arange(2 * kernel - 1, device=like.device)
    on, off = ((entry & chosen[:, :, None]).sum(1).to(like.dtype) for chosen in (on_map, ~on_map))
    return on, off
