"""Routed attention in plain PyTorch, on any device.

Tokens are regrouped so that ordinary dense attention does the work, in one of two ways:

* *by region*: a group is one query region with the tokens of its `topk` key regions, gathered by indexing the
  un-expanded map. (The published code gathers from an expanded view, whose gradient is `regions` times the map.) The
  backward pass gathers again instead of keeping the copies, so that memory between the passes is that of the inputs,
  and works through the groups in chunks, so that scores never take more than a fixed amount.
* *dense*: a group is the whole image, and the routing becomes an additive bias: the log of how often a region is
  listed, minus infinity where it is not. Where the routes cover a quarter of a small map this wastes arithmetic but
  saves all gathering; on a CPU it is several times faster (BiFormer's third stage: 4-token regions, 16 of 49 routed).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

DENSE_MAX_TOKENS = 1024  # the bias of the dense grouping is quadratic in tokens
DENSE_MIN_SHARE = 0.25  # of all regions routed; below it the wasted arithmetic outweighs the gathering
CHUNK_SCORES = 1 << 24  # scores held at once in the backward pass, per temporary


def route(query: Tensor, key: Tensor, regions: tuple[int, int], topk: int, scale: float) -> Tensor:
    """See `api.bi_level_route`."""
    with torch.no_grad():
        q, k = _region_means(query, regions), _region_means(key, regions)
        if q.device.type != "mps":
            # The product is tiny, and in float64 neither autocast nor TF32, which a user may have on, can round it.
            q, k = q.double(), k.double()
        return torch.topk(scale * q @ k.transpose(1, 2), topk, dim=-1, sorted=False).indices


def prefers_dense(query: Tensor, routes: Tensor) -> bool:
    """Whether the dense grouping is the faster one for these shapes."""
    return query.shape[1] * query.shape[2] <= DENSE_MAX_TOKENS and routes.shape[2] >= DENSE_MIN_SHARE * routes.shape[1]


def dense_forward(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, regions: tuple[int, int], scale: float
) -> Tensor:
    """See `api.routed_attention2d`; dense grouping, differentiable by autograd as it stands."""
    batch, height, width, heads, head_dim = query.shape
    q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (query, key, value))
    bias = _routing_bias(routes, height, width, regions, query.dtype)
    out = F.scaled_dot_product_attention(q, k, v, bias, scale=scale)
    return out.transpose(1, 2).reshape(batch, height, width, heads, head_dim)


def region_forward(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, regions: tuple[int, int], scale: float
) -> Tensor:
    """See `api.routed_attention2d`; grouped by region, differentiable by autograd as it stands (export uses it so)."""
    q, k, v = (_to_regions(t, regions) for t in (query, key, value))
    k, v = _gather(k, routes), _gather(v, routes)
    out = F.scaled_dot_product_attention(q, k, v, _existence_bias(query, routes, regions), scale=scale)
    return _from_regions(out, query, regions)


def region_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, routes: Tensor, regions: tuple[int, int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `region_forward` with respect to query, key and value, each like `query`."""
    q_all, k_all, v_all, g_all = (_to_regions(t, regions) for t in (query, key, value, grad))
    k_all, v_all = _gather(k_all, routes), _gather(v_all, routes)
    bias = _existence_bias(query, routes, regions)
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
    return (
        _from_regions(grad_q, query, regions),
        _from_regions(grad_k, query, regions),
        _from_regions(grad_v, query, regions),
    )


def _to_regions(x: Tensor, regions: tuple[int, int]) -> Tensor:
    """`(B, H, W, heads, d)` -> `(B * regions, heads, tokens, d)`, zeros where a region reaches beyond the map."""
    (rows, columns), (rh, rw) = regions, _region_size(x, regions)
    below, right = rows * rh - x.shape[1], columns * rw - x.shape[2]
    if below or right:
        x = F.pad(x, (0, 0, 0, 0, 0, right, 0, below))
    batch, _, _, heads, head_dim = x.shape
    x = x.reshape(batch, rows, rh, columns, rw, heads, head_dim).permute(0, 1, 3, 5, 2, 4, 6)
    return x.reshape(batch * rows * columns, heads, rh * rw, head_dim)


def _from_regions(x: Tensor, like: Tensor, regions: tuple[int, int]) -> Tensor:
    """Inverse of `_to_regions`, cropped to the map of `like`; contiguous."""
    batch, height, width, heads, head_dim = like.shape
    (rows, columns), (rh, rw) = regions, _region_size(like, regions)
    x = x.reshape(batch, rows, columns, heads, rh, rw, head_dim).permute(0, 1, 4, 2, 5, 3, 6)
    return x.reshape(batch, rows * rh, columns * rw, heads, head_dim)[:, :height, :width].contiguous()


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


def _routing_bias(routes: Tensor, height: int, width: int, regions: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """`(B, 1, H*W, H*W)`: log of how many times the query's region lists the key's region."""
    count = regions[0] * regions[1]
    listed = (routes.unsqueeze(-1) == torch.arange(count, device=routes.device)).sum(2)  # (B, regions, regions)
    rows = torch.arange(height, device=routes.device) // math.ceil(height / regions[0])
    columns = torch.arange(width, device=routes.device) // math.ceil(width / regions[1])
    region = (rows[:, None] * regions[1] + columns).flatten()
    return listed.to(dtype).log()[:, region][:, :, region].unsqueeze(1)


def _existence_bias(like: Tensor, routes: Tensor, regions: tuple[int, int]) -> Tensor | None:
    """`(B * regions, 1, 1, topk * tokens)`: minus infinity for keys beyond the map of `like`; None without any."""
    (rows, columns), (rh, rw) = regions, _region_size(like, regions)
    if rows * rh == like.shape[1] and columns * rw == like.shape[2]:
        return None
    inside_h = (torch.arange(rows * rh, device=like.device) < like.shape[1]).view(rows, 1, rh, 1)
    inside_w = (torch.arange(columns * rw, device=like.device) < like.shape[2]).view(1, columns, 1, rw)
    bias = torch.where((inside_h & inside_w).view(rows * columns, rh * rw), 0.0, -math.inf).to(like.dtype)
    return bias[routes].flatten(2).flatten(0, 1)[:, None, None]


def _region_means(x: Tensor, regions: tuple[int, int]) -> Tensor:
    """`(B, regions, channels)` means over the tokens of each region, in float32 or wider."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    batch, height, width = x.shape[:3]
    (rows, columns), (rh, rw) = regions, _region_size(x, regions)
    x = F.pad(x.flatten(3), (0, 0, 0, columns * rw - width, 0, rows * rh - height))
    total = x.reshape(batch, rows, rh, columns, rw, -1).sum((2, 4), dtype=dtype)
    tokens_h = (height - rh * torch.arange(rows, device=x.device)).clamp(max=rh)
    tokens_w = (width - rw * torch.arange(columns, device=x.device)).clamp(max=rw)
    return (total / (tokens_h[:, None] * tokens_w).unsqueeze(-1)).flatten(1, 2)


def _region_size(x: Tensor, regions: tuple[int, int]) -> tuple[int, int]:
    return math.ceil(x.shape[1] / regions[0]), math.ceil(x.shape[2] / regions[1])
