"""Routed attention in plain PyTorch, on any device.

Tokens are regrouped so that ordinary dense attention does the work, in one of two ways:

* *by region*: a group is one query region with the tokens of its `topk` key regions, gathered by indexing the
  un-expanded map. (The published code gathers from an expanded view, whose gradient is `regions` times the map.) The
  backward pass gathers again instead of keeping the copies, so that memory between the passes is that of the inputs,
  and works through the groups in chunks, so that scores never take more than a fixed amount.
* *dense*: a group is the whole image, and the routing becomes an additive bias: the log of how often a region is
  listed, minus infinity where it is not. Where the routes cover a quarter of a small map this wastes arithmetic but
  saves all gathering; on a CPU it is several times faster (BiFormer's third stage: 4-token regions, 16 of 49 routed).

Tokens beyond the map are absent, or copies of `fill` appended to keys and values.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridzoo.kernels.routed.grid import Grid

DENSE_MAX_TOKENS = 1024  # the bias of the dense grouping is quadratic in tokens
DENSE_MIN_SHARE = 0.25  # of all regions routed; below it the wasted arithmetic outweighs the gathering
CHUNK_SCORES = 1 << 24  # scores held at once in the backward pass, per temporary


def route(query: Tensor, key: Tensor, fill: Tensor | None, grid: Grid, topk: int, scale: float) -> Tensor:
    """See `api.bi_level_route`."""
    with torch.no_grad():
        query_fill, key_fill = (None, None) if fill is None else fill
        q, k = _region_means(query, grid, query_fill), _region_means(key, grid, key_fill)
        if q.device.type != "mps":
            # The product is tiny, and in float64 neither autocast nor TF32, which a user may have on, can round it.
            q, k = q.double(), k.double()
        return torch.topk(scale * q @ k.transpose(1, 2), topk, dim=-1, sorted=False).indices


def prefers_dense(query: Tensor, routes: Tensor) -> bool:
    """Whether the dense grouping is the faster one for these shapes."""
    return query.shape[1] * query.shape[2] <= DENSE_MAX_TOKENS and routes.shape[2] >= DENSE_MIN_SHARE * routes.shape[1]


def dense_forward(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, fill: Tensor | None, grid: Grid, scale: float
) -> Tensor:
    """See `api.routed_attention2d`; dense grouping, differentiable by autograd as it stands."""
    if fill is not None:
        key, value = grid.extend(key, fill[0]), grid.extend(value, fill[1])
    q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, _routing_bias(routes, query, key, grid), scale=scale)
    return out.transpose(1, 2).reshape(query.shape)


def region_forward(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, fill: Tensor | None, grid: Grid, scale: float
) -> Tensor:
    """See `api.routed_attention2d`; grouped by region, differentiable by autograd as it stands (export uses it so)."""
    q, k, v, bias = _grouped(query, key, value, routes, fill, grid)
    out = F.scaled_dot_product_attention(q, k, v, bias, scale=scale)
    return _from_regions(out, query, grid)


def region_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    fill: Tensor | None,
    grid: Grid,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `region_forward` with respect to query, key, value, each like `query`, and fill."""
    q_all, k_all, v_all, bias = _grouped(query, key, value, routes, fill, grid)
    g_all = _to_regions(grad, grid)
    grad_q, grad_k, grad_v = (torch.empty_like(t) for t in (q_all, k_all, v_all))
    groups, heads, queries, _ = q_all.shape
    step = max(1, CHUNK_SCORES // (heads * queries * k_all.shape[2]))
    for start in range(0, groups, step):
        part = slice(start, start + step)
        q, k, v, g = q_all[part] * scale, k_all[part], v_all[part], g_all[part]
        scores = q @ k.transpose(-1, -2)
        if bias is not None:
            scores += bias[part]
        weight = scores.softmax(-1)
        grad_v[part] = weight.transpose(-1, -2) @ g
        # d softmax: w * (dw - sum(w * dw)), in place.
        dscores = (g @ v.transpose(-1, -2)).mul_(weight)
        dscores.addcmul_(weight, dscores.sum(-1, keepdim=True), value=-1)
        grad_q[part] = dscores @ k
        grad_k[part] = dscores.transpose(-1, -2) @ q
    grad_q *= scale
    grad_k, grad_v = _scatter(grad_k, routes), _scatter(grad_v, routes)
    grad_fill = None
    if fill is not None:
        grad_fill = torch.stack([_sum_beyond(t, query, grid) for t in (grad_k, grad_v)]).to(fill.dtype)
    maps = [_from_regions(t, query, grid) for t in (grad_q, grad_k, grad_v)]
    return maps[0], maps[1], maps[2], grad_fill


def _grouped(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, fill: Tensor | None, grid: Grid
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Query, and gathered key and value, `(groups, heads, tokens, d)`; what to add to scores, None for nothing."""
    if fill is None:
        bias = _existence_bias(query, routes, grid)
    else:
        bias, key, value = None, grid.extend(key, fill[0]), grid.extend(value, fill[1])
    q, k, v = (_to_regions(t, grid) for t in (query, key, value))
    return q, _gather(k, routes), _gather(v, routes), bias


def _pad(x: Tensor, grid: Grid) -> Tensor:
    """Zeros appended to a map as far as its regions reach."""
    below, right = grid.beyond(x)
    # Padding by nothing would copy.
    return F.pad(x, (0, 0) * (x.ndim - 3) + (0, right, 0, below)) if below or right else x


def _to_regions(x: Tensor, grid: Grid) -> Tensor:
    """`(B, H, W, heads, d)` -> `(B * regions, heads, tokens, d)`, zeros where a region reaches beyond the map."""
    x = _pad(x, grid)
    batch, _, _, heads, head_dim = x.shape
    x = x.reshape(batch, grid.rows, grid.height, grid.columns, grid.width, heads, head_dim)
    return x.permute(0, 1, 3, 5, 2, 4, 6).reshape(batch * grid.regions, heads, grid.tokens, head_dim)


def _from_regions(x: Tensor, like: Tensor, grid: Grid) -> Tensor:
    """Inverse of `_to_regions`, cropped to the map of `like`; contiguous."""
    return _whole(x, like, grid)[:, : like.shape[1], : like.shape[2]].contiguous()


def _whole(x: Tensor, like: Tensor, grid: Grid) -> Tensor:
    """Inverse of `_to_regions`, with the tokens beyond the map."""
    batch, _, _, heads, head_dim = like.shape
    x = x.reshape(batch, grid.rows, grid.columns, heads, grid.height, grid.width, head_dim)
    return x.permute(0, 1, 4, 2, 5, 3, 6).reshape(
        batch, grid.rows * grid.height, grid.columns * grid.width, heads, head_dim
    )


def _sum_beyond(x: Tensor, like: Tensor, grid: Grid) -> Tensor:
    """`(heads, d)`: sum, in float32 or wider, over the tokens beyond the map of `like`."""
    x, (height, width) = _whole(x, like, grid), like.shape[1:3]
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x[:, height:].sum((0, 1, 2), dtype=dtype) + x[:, :height, width:].sum((0, 1, 2), dtype=dtype)


def _gather(x: Tensor, routes: Tensor) -> Tensor:
    """`(B * regions, heads, tokens, d)` -> `(B * regions, heads, topk * tokens, d)`: what each region looks at."""
    groups, heads, _, head_dim = x.shape
    gathered = x.index_select(0, _flat_index(routes)).view(groups, routes.shape[2], heads, -1, head_dim)
    return gathered.transpose(1, 2).reshape(groups, heads, -1, head_dim)


def _scatter(grad: Tensor, routes: Tensor) -> Tensor:
    """Adjoint of `_gather`: every region sums what flowed back to its copies."""
    groups, heads, _, head_dim = grad.shape
    copies = grad.view(groups, heads, routes.shape[2], -1, head_dim).transpose(1, 2).flatten(0, 1).contiguous()
    index, out = _flat_index(routes), copies.new_zeros(groups, *copies.shape[1:])
    if grad.is_cuda:  # index_add_ uses atomics there; index_put_ sorts, so that the order of the sum is fixed
        return out.index_put_((index,), copies, accumulate=True)
    return out.index_add_(0, index, copies)


def _flat_index(routes: Tensor) -> Tensor:
    """Routes as rows of the `(B * regions, ...)` grouping, flattened."""
    batch, count, _ = routes.shape
    return (routes + torch.arange(batch, device=routes.device).view(-1, 1, 1) * count).flatten()


def _routing_bias(routes: Tensor, query: Tensor, key: Tensor, grid: Grid) -> Tensor:
    """`(B, 1, queries, keys)`: log of how many times the query's region lists the key's region."""
    listed = (routes.unsqueeze(-1) == torch.arange(grid.regions, device=routes.device)).sum(2)  # (B, regions, regions)
    regions = []
    for x in (query, key):
        rows, columns = (torch.arange(size, device=x.device) for size in x.shape[1:3])
        regions.append((rows[:, None] // grid.height * grid.columns + columns // grid.width).flatten())
    return listed.to(query.dtype).log()[:, regions[0]][:, :, regions[1]].unsqueeze(1)


def _existence_bias(like: Tensor, routes: Tensor, grid: Grid) -> Tensor | None:
    """`(B * regions, 1, 1, topk * tokens)`: minus infinity for keys beyond the map of `like`; None without any."""
    if not any(grid.beyond(like)):
        return None
    inside_h = (torch.arange(grid.rows * grid.height, device=like.device) < like.shape[1]).view(grid.rows, 1, -1, 1)
    inside_w = (torch.arange(grid.columns * grid.width, device=like.device) < like.shape[2]).view(grid.columns, 1, -1)
    bias = torch.where((inside_h & inside_w).view(grid.regions, grid.tokens), 0.0, -math.inf).to(like.dtype)
    return bias[routes].flatten(2).flatten(0, 1)[:, None, None]


def _region_means(x: Tensor, grid: Grid, fill: Tensor | None) -> Tensor:
    """`(B, regions, channels)` means over the tokens of each region, in float32 or wider."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    padded = _pad(x.flatten(3), grid)
    padded = padded.reshape(x.shape[0], grid.rows, grid.height, grid.columns, grid.width, -1)
    total = padded.sum((2, 4), dtype=dtype).flatten(1, 2)
    tokens = grid.tokens_on(x).to(dtype).unsqueeze(-1)
    if fill is None:
        return total / tokens
    return (total + (grid.tokens - tokens) * fill.flatten().to(dtype)) / grid.tokens
