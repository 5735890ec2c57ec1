"""Routed attention in plain PyTorch, on any device.

Tokens are regrouped so that ordinary dense attention does the work, in one of two ways:

* *by region*: a group is one query region with the tokens of its `topk` key regions, gathered by indexing the
  un-expanded map. (The published code gathers from an expanded view, whose gradient is `regions` times the map.)
* *dense*: a group is the whole image, and the routing becomes an additive bias: the log of how often a region is
  listed, minus infinity where it is not. Where the routes cover a quarter of a small map this wastes arithmetic but
  saves all gathering; on a CPU it is several times faster (BiFormer's third stage: 4-token regions, 16 of 49 routed).

The backward pass regroups again instead of keeping the gathered keys, so that memory between the passes is that of the
inputs, and works through groups in chunks, so that scores never take more than a fixed amount.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

DENSE_MAX_TOKENS = 1024  # the bias of the dense grouping is quadratic in tokens
DENSE_MIN_SHARE = 0.25  # of all regions routed; below it the wasted arithmetic outweighs the gathering
CHUNK_SCORES = 1 << 24  # scores held at once in the backward pass, per temporary


def route(query: Tensor, key: Tensor, regions: tuple[int, int], topk: int, scale: float) -> Tensor:
    """See `api.bi_level_route`."""
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        q, k = _region_means(query.detach(), regions), _region_means(key.detach(), regions)
        if q.is_cuda:
            # Means of float32 inputs must not meet TF32, which a user may have switched on; the product is tiny.
            q, k = q.double(), k.double()
        return torch.topk(scale * q @ k.transpose(1, 2), topk, dim=-1, sorted=False).indices


def forward(query: Tensor, key: Tensor, value: Tensor, routes: Tensor, regions: tuple[int, int], scale: float) -> Tensor:
    """See `api.routed_attention2d`; differentiable by autograd as it stands (export uses it so)."""
    groups = _group(query, key, value, routes, regions)
    out = F.scaled_dot_product_attention(groups.query, groups.key, groups.value, groups.bias, scale=scale)
    return _ungroup_tokens(out, query, regions, dense=groups.dense)


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, routes: Tensor, regions: tuple[int, int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward` with respect to query, key and value, each like `query`."""
    groups = _group(query, key, value, routes, regions)
    grad_groups = _group_tokens(grad, regions, dense=groups.dense)
    grad_q, grad_k, grad_v = (torch.empty_like(t) for t in groups[:3])
    scores_per_group = groups.query.shape[1] * groups.query.shape[2] * groups.key.shape[2]
    step = max(1, CHUNK_SCORES // scores_per_group)
    for start in range(0, groups.query.shape[0], step):
        part = slice(start, start + step)
        q, k, v, g = groups.query[part] * scale, groups.key[part], groups.value[part], grad_groups[part]
        scores = q @ k.transpose(-1, -2)
        if groups.bias is not None:
            scores += groups.bias[part]
        weight = scores.softmax(-1)
        torch.matmul(weight.transpose(-1, -2), g, out=grad_v[part])
        # d softmax: w * (dw - sum(w * dw)), in place.
        dscores = torch.matmul(g, v.transpose(-1, -2)).mul_(weight)
        dscores.addcmul_(weight, dscores.sum(-1, keepdim=True), value=-1)
        torch.matmul(dscores, k, out=grad_q[part])
        torch.matmul(dscores.transpose(-1, -2), q, out=grad_k[part])
    grad_q *= scale
    if not groups.dense:
        grad_k, grad_v = (_scatter_regions(t, routes, regions) for t in (grad_k, grad_v))
    ungrouped = (_ungroup_tokens(t, query, regions, dense=groups.dense) for t in (grad_q, grad_k, grad_v))
    return tuple(ungrouped)  # type: ignore[return-value]


class _Groups(NamedTuple):
    query: Tensor  # (groups, heads, queries, head_dim)
    key: Tensor  # (groups, heads, keys, head_dim)
    value: Tensor
    bias: Tensor | None  # (groups, 1, queries or 1, keys), added to the scores
    dense: bool


def _group(query: Tensor, key: Tensor, value: Tensor, routes: Tensor, regions: tuple[int, int]) -> _Groups:
    height, width = query.shape[1:3]
    topk, count = routes.shape[2], regions[0] * regions[1]
    dense = height * width <= DENSE_MAX_TOKENS and topk >= DENSE_MIN_SHARE * count
    q, k, v = (_group_tokens(t, regions, dense=dense) for t in (query, key, value))
    if dense:
        return _Groups(q, k, v, _routing_bias(routes, height, width, regions, q.dtype), dense=True)
    k, v = _gather_regions(k, routes), _gather_regions(v, routes)
    bias = None
    if height % regions[0] or width % regions[1]:
        bias = _existence_bias(query, regions)[routes].view(k.shape[0], 1, 1, k.shape[2])
    return _Groups(q, k, v, bias, dense=False)


def _group_tokens(x: Tensor, regions: tuple[int, int], *, dense: bool) -> Tensor:
    """`(B, H, W, heads, d)` -> `(B, heads, H*W, d)`, or by region `(B * regions, heads, tokens, d)`, padded."""
    if dense:
        return x.flatten(1, 2).transpose(1, 2)
    (rows, columns), (rh, rw) = regions, _region_size(x, regions)
    pad_h, pad_w = rows * rh - x.shape[1], columns * rw - x.shape[2]
    if pad_h or pad_w:
        x = F.pad(x, (0, 0, 0, 0, 0, pad_w, 0, pad_h))
    batch, _, _, heads, head_dim = x.shape
    x = x.reshape(batch, rows, rh, columns, rw, heads, head_dim).permute(0, 1, 3, 5, 2, 4, 6)
    return x.reshape(batch * rows * columns, heads, rh * rw, head_dim)


def _ungroup_tokens(x: Tensor, like: Tensor, regions: tuple[int, int], *, dense: bool) -> Tensor:
    """Inverse of `_group_tokens`, cropped to the map of `like`; contiguous."""
    batch, height, width, heads, head_dim = like.shape
    if dense:
        return x.transpose(1, 2).reshape(batch, height, width, heads, head_dim)
    (rows, columns), (rh, rw) = regions, _region_size(like, regions)
    x = x.reshape(batch, rows, columns, heads, rh, rw, head_dim).permute(0, 1, 4, 2, 5, 3, 6)
    return x.reshape(batch, rows * rh, columns * rw, heads, head_dim)[:, :height, :width].contiguous()


def _gather_regions(x: Tensor, routes: Tensor) -> Tensor:
    """`(B * regions, heads, tokens, d)` -> `(B * regions, heads, topk * tokens, d)`, the routed tokens of each region."""
    groups, heads, _, head_dim = x.shape
    topk = routes.shape[2]
    gathered = x.index_select(0, _flat_index(routes)).view(groups, topk, heads, -1, head_dim)
    return gathered.transpose(1, 2).reshape(groups, heads, -1, head_dim)


def _scatter_regions(grad: Tensor, routes: Tensor, regions: tuple[int, int]) -> Tensor:
    """Adjoint of `_gather_regions`: every region sums what flowed back to its copies."""
    groups, heads, _, head_dim = grad.shape
    topk = routes.shape[2]
    copies = grad.view(groups, heads, topk, -1, head_dim).transpose(1, 2).reshape(groups * topk, heads, -1, head_dim)
    index, out = _flat_index(routes), copies.new_zeros(groups, *copies.shape[1:])
    if grad.is_cuda:  # index_add_ uses atomics there; index_put_ sorts, so that the order of the sum is fixed
        return out.index_put_((index,), copies, accumulate=True)
    return out.index_add_(0, index, copies)


def _flat_index(routes: Tensor) -> Tensor:
    """Routes as rows of the `(B * regions, ...)` grouping, flattened."""
    batch, count, _ = routes.shape
    return (routes + torch.arange(batch, device=routes.device).view(-1, 1, 1) * count).flatten()


def _routing_bias(routes: Tensor, height: int, width: int, regions: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """`(B, 1, H*W, H*W)`: log of how many times the query's region lists the key's region."""
    count = regions[0] * regions[1]
    listed = (routes.unsqueeze(-1) == torch.arange(count, device=routes.device)).sum(2)  # (B, regions, regions)
    rows = torch.arange(height, device=routes.device) // math.ceil(height / regions[0])
    columns = torch.arange(width, device=routes.device) // math.ceil(width / regions[1])
    region = (rows[:, None] * regions[1] + columns).flatten()
    return listed.to(dtype).log()[:, region][:, :, region].unsqueeze(1)


def _existence_bias(like: Tensor, regions: tuple[int, int]) -> Tensor:
    """`(regions, tokens)`: 0 for the tokens of the padded grouping that exist in the map of `like`, else minus infinity."""
    (rows, columns), (rh, rw) = regions, _region_size(like, regions)
    inside_h = (torch.arange(rows * rh, device=like.device) < like.shape[1]).view(rows, 1, rh, 1)
    inside_w = (torch.arange(columns * rw, device=like.device) < like.shape[2]).view(1, columns, 1, rw)
    return torch.where((inside_h & inside_w).view(rows * columns, rh * rw), 0.0, -math.inf).to(like.dtype)


def _region_means(x: Tensor, regions: tuple[int, int]) -> Tensor:
    """`(B, regions, channels)` means over the tokens of each region, in float32 or wider."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    batch, height, width = x.shape[:3]
    (rows, columns), (rh, rw) = regions, _region_size(x, regions)
    x = x.flatten(3)
    if height % rows == 0 and width % columns == 0:
        return x.reshape(batch, rows, rh, columns, rw, -1).mean((2, 4), dtype=dtype).flatten(1, 2)
    x = F.pad(x, (0, 0, 0, columns * rw - width, 0, rows * rh - height))
    total = x.reshape(batch, rows, rh, columns, rw, -1).sum((2, 4), dtype=dtype)
    tokens_h = (height - rh * torch.arange(rows, device=x.device)).clamp(max=rh)
    tokens_w = (width - rw * torch.arange(columns, device=x.device)).clamp(max=rw)
    return (total / (tokens_h[:, None] * tokens_w).unsqueeze(-1)).flatten(1, 2)


def _region_size(x: Tensor, regions: tuple[int, int]) -> tuple[int, int]:
    return math.ceil(x.shape[1] / regions[0]), math.ceil(x.shape[2] / regions[1])
