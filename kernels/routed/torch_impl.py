"""Routed attention in plain PyTorch, on any device.

Tokens are grouped so that ordinary dense attention can be used, in one of two ways:

* *by region*: a group is one query region with the tokens of its `topk` key regions, gathered by indexing the map.
  (The published code gathers from an expanded view, whose gradient is `regions` times as large as the map.) The
  backward pass gathers again instead of keeping the copies.
* *dense*: a group is the whole image, and the routing becomes an additive bias: the log of how often a region is
  listed, or minus infinity if it is not listed. If the routes cover a quarter of a small map, this wastes arithmetic
  but needs no gathering. On a CPU it is several times faster (BiFormer's third stage: regions of 4 tokens, 16 of 49
  routed).

Between the passes only the inputs are kept. Backward passes recompute the weights in float32 or wider, and process the
groups in chunks, so that scores never need more than a fixed amount of memory. Sums have a fixed order.

Tokens beyond the map do not take part, or they are copies of `fill` appended to keys and values.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridzoo.kernels.open_sizes import surely
from hybridzoo.kernels.routed.grid import Grid

DENSE_MAX_TOKENS = 1024  # the size of the dense grouping's bias is quadratic in tokens
DENSE_MIN_SHARE = 0.25  # share of regions routed to; with fewer, the wasted arithmetic costs more than gathering
CHUNK_SCORES = 1 << 24  # scores in one temporary tensor of the backward pass
BIAS_ALIGNMENT = 16  # elements
CHUNK_DENSE = 1 << 18  # the same for the dense grouping on a CPU, per thread, so that they fit into its cache


def route(query: Tensor, key: Tensor, fill: Tensor | None, grid: Grid, topk: int, scale: float) -> Tensor:
    """See `api.bi_level_route`."""
    with torch.no_grad():
        query_fill, key_fill = (None, None) if fill is None else fill
        q, k = _region_means(query, grid, query_fill), _region_means(key, grid, key_fill)
        if q.device.type != "mps":
            # The product is tiny. In float64, neither autocast nor TF32, which a user may have enabled, can round it.
            q, k = q.double(), k.double()
        return torch.topk(scale * q @ k.transpose(1, 2), topk, dim=-1, sorted=False).indices


def prefers_dense(query: Tensor, routes: Tensor) -> bool:
    """Whether the dense grouping is faster for these shapes; False in a program that leaves sizes open."""
    small = surely(query.shape[1] * query.shape[2] <= DENSE_MAX_TOKENS)
    return small and surely(routes.shape[2] >= DENSE_MIN_SHARE * routes.shape[1])


def forward(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, fill: Tensor | None, grid: Grid, scale: float
) -> Tensor:
    """See `api.routed_attention2d`. Uses the faster grouping; autograd can differentiate it (needed for export)."""
    attend = dense_forward if prefers_dense(query, routes) else region_forward
    return attend(query, key, value, routes, fill, grid, scale)


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    fill: Tensor | None,
    grid: Grid,
    scale: float,
    want_fill: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key and value, each like `query`, and of fill if `want_fill`."""
    differentiate = dense_backward if prefers_dense(query, routes) else region_backward
    return differentiate(grad, query, key, value, routes, fill, grid, scale, want_fill)


def check_routes(routes: Tensor, grid: Grid) -> None:
    """Raise if a number is out of range: gathering would read a region of another image."""
    if routes.numel() and not (routes.min() >= 0 and routes.max() < grid.regions):
        raise ValueError(
            f"routes must be region numbers from 0 to {grid.regions - 1};"
            f" got numbers from {routes.min().item()} to {routes.max().item()}"
        )


def dense_forward(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, fill: Tensor | None, grid: Grid, scale: float
) -> Tensor:
    """`forward` with the dense grouping."""
    key, value = _filled(key, value, fill, grid)
    q, k, v = (_heads_first(t) for t in (query, key, value))
    bias = _routing_bias(routes, query, key, grid, query.dtype)
    out = F.scaled_dot_product_attention(q, k, v, bias, scale=scale)
    return out.transpose(1, 2).reshape(query.shape)


def dense_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    fill: Tensor | None,
    grid: Grid,
    scale: float,
    want_fill: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`backward` with the dense grouping."""
    key, value = _filled(key, value, fill, grid)
    bias = _routing_bias(routes, query, key, grid, torch.promote_types(query.dtype, torch.float32))
    maps = [torch.empty(t.shape, dtype=bias.dtype, device=t.device) for t in (query, key, value)]
    into = [_heads_first(t) for t in maps]
    tensors = [_heads_first(t) for t in (query, key, value, grad)]
    chunk = CHUNK_SCORES if query.is_cuda else CHUNK_DENSE * torch.get_num_threads()
    step = max(1, chunk // (query.shape[3] * bias.shape[2] * bias.shape[3]))
    for start in range(0, query.shape[0], step):
        part = slice(start, start + step)
        q, k, v, g = (t[part].to(bias.dtype) for t in tensors)
        for gradient, computed in zip(into, _group_gradients(g, q, k, v, bias[part], scale), strict=True):
            gradient[part] = computed
    return _cropped(maps, query, fill if want_fill else None)


def region_forward(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, fill: Tensor | None, grid: Grid, scale: float
) -> Tensor:
    """`forward` with the grouping by region."""
    key, value = _filled(key, value, fill, grid)
    q, k, v = (_to_regions(t, grid) for t in (query, key, value))
    index, bias = _flat_index(routes), _existence_bias(key, routes, grid)
    out = F.scaled_dot_product_attention(q, _gather(k, index), _gather(v, index), bias, scale=scale)
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
    want_fill: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`backward` with the grouping by region."""
    key, value = _filled(key, value, fill, grid)
    q_all, k_all, v_all, g_all = (_to_regions(t, grid) for t in (query, key, value, grad))
    index, bias = _flat_index(routes), _existence_bias(key, routes, grid)
    dtype = torch.promote_types(query.dtype, torch.float32)
    grad_q = torch.empty_like(q_all)
    grad_k, grad_v = (torch.zeros(k_all.shape, dtype=dtype, device=k_all.device) for _ in range(2))
    groups, heads, queries, _ = q_all.shape
    step = max(1, CHUNK_SCORES // (heads * queries * index.shape[1] * grid.tokens))
    for start in range(0, groups, step):
        part = slice(start, start + step)
        q, g = q_all[part].to(dtype), g_all[part].to(dtype)
        k, v = (_gather(t, index[part]).to(dtype) for t in (k_all, v_all))
        grad_q[part], into_k, into_v = _group_gradients(g, q, k, v, None if bias is None else bias[part], scale)
        _scatter(into_k, index[part], grad_k)
        _scatter(into_v, index[part], grad_v)
    return _cropped([_whole(t, query, grid) for t in (grad_q, grad_k, grad_v)], query, fill if want_fill else None)


def _group_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of dense attention in groups, `(groups, heads, tokens, d)`, in float32 or wider."""
    q = q * scale
    scores = q @ k.transpose(-1, -2)
    if bias is not None:
        scores += bias
    weight = torch.softmax(scores, -1, out=scores)
    grad_v = weight.transpose(-1, -2) @ grad
    # d softmax: w * (dw - sum(w * dw)), in place.
    dscores = (grad @ v.transpose(-1, -2)).mul_(weight)
    dscores.addcmul_(weight, dscores.sum(-1, keepdim=True), value=-1)
    return (dscores @ k).mul_(scale), dscores.transpose(-1, -2) @ q, grad_v


def _cropped(maps: list[Tensor], query: Tensor, fill: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key and value, cropped to the map and cast; the cropped part gives the gradient of fill."""
    grad_fill = None if fill is None else torch.stack([_sum_beyond(t, query) for t in maps[1:]]).to(fill.dtype)
    q, k, v = (t[:, : query.shape[1], : query.shape[2]].to(query.dtype).contiguous() for t in maps)
    return q, k, v, grad_fill


def _filled(key: Tensor, value: Tensor, fill: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
    """Key and value, extended by the tokens beyond the map if `fill` is given."""
    return (key, value) if fill is None else (grid.extend(key, fill[0]), grid.extend(value, fill[1]))


def _heads_first(x: Tensor) -> Tensor:
    """`(B, H, W, heads, d)` -> `(B, heads, H * W, d)`; a view if the map's rows follow one another in memory."""
    return x.flatten(1, 2).transpose(1, 2)


def _pad(x: Tensor, grid: Grid) -> Tensor:
    """Append zeros to a map until it covers all regions."""
    if grid.ends_with(x):  # F.pad would copy even if there is nothing to pad.
        return x
    below, right = grid.beyond(x)
    return F.pad(x, (0, 0) * (x.ndim - 3) + (0, right, 0, below))


def _to_regions(x: Tensor, grid: Grid) -> Tensor:
    """`(B, H, W, heads, d)` -> `(B * regions, heads, tokens, d)`, zeros in tokens beyond the map."""
    x = _pad(x, grid)
    batch, _, _, heads, head_dim = x.shape
    x = x.reshape(batch, grid.rows, grid.height, grid.columns, grid.width, heads, head_dim)
    return x.permute(0, 1, 3, 5, 2, 4, 6).reshape(batch * grid.regions, heads, grid.tokens, head_dim)


def _from_regions(x: Tensor, like: Tensor, grid: Grid) -> Tensor:
    """Inverse of `_to_regions`, cropped to the map of `like`; contiguous."""
    return _whole(x, like, grid)[:, : like.shape[1], : like.shape[2]].contiguous()


def _whole(x: Tensor, like: Tensor, grid: Grid) -> Tensor:
    """Inverse of `_to_regions`, including the tokens beyond the map."""
    batch, _, _, heads, head_dim = like.shape
    x = x.reshape(batch, grid.rows, grid.columns, heads, grid.height, grid.width, head_dim)
    return x.permute(0, 1, 4, 2, 5, 3, 6).reshape(
        batch, grid.rows * grid.height, grid.columns * grid.width, heads, head_dim
    )


def _sum_beyond(x: Tensor, like: Tensor) -> Tensor:
    """`(heads, d)`: sum over the tokens of `x` that lie beyond the map of `like`."""
    height, width = like.shape[1:3]
    return x[:, height:].sum((0, 1, 2)) + x[:, :height, width:].sum((0, 1, 2))


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """`(B * regions, heads, tokens, d)` -> `(groups, heads, topk * tokens, d)`: the tokens that each group sees."""
    groups, topk = index.shape
    _, heads, tokens, head_dim = x.shape
    gathered = x.index_select(0, index.flatten()).view(groups, topk, heads, tokens, head_dim)
    return gathered.transpose(1, 2).reshape(groups, heads, topk * tokens, head_dim)


def _scatter(grad: Tensor, index: Tensor, into: Tensor) -> None:
    """Adjoint of `_gather`: add the gradients of all copies of a region."""
    groups, topk = index.shape
    _, heads, tokens, head_dim = into.shape
    copies = grad.view(groups, heads, topk, tokens, head_dim).transpose(1, 2).flatten(0, 1).contiguous()
    if grad.is_cuda:  # index_add_ uses atomics on CUDA; index_put_ sorts, so the order of the sum is fixed
        into.index_put_((index.flatten(),), copies, accumulate=True)
    else:
        into.index_add_(0, index.flatten(), copies)


def _flat_index(routes: Tensor) -> Tensor:
    """`(B * regions, topk)`: routes as row numbers of tensors `(B * regions, ...)`."""
    batch, count, _ = routes.shape
    return (routes + torch.arange(batch, device=routes.device).view(batch, 1, 1) * count).flatten(0, 1)


def _routing_bias(routes: Tensor, query: Tensor, key: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """`(B, 1, queries, keys)`: the log of how often the query's region lists the key's region."""
    listed = (routes.unsqueeze(-1) == torch.arange(grid.regions, device=routes.device)).sum(2)  # (B, regions, regions)
    of_query, of_key = (_region_of(x, grid) for x in (query, key))
    keys = len(of_key)
    if query.is_cuda:  # PyTorch's fast kernels copy a bias whose rows are not aligned
        of_key = F.pad(of_key, (0, -keys % BIAS_ALIGNMENT))
    # Keys first, so that the larger copy moves whole rows.
    bias = listed.to(torch.promote_types(dtype, torch.float32)).log().to(dtype)
    return bias.index_select(2, of_key).index_select(1, of_query).unsqueeze(1)[..., :keys]


def _region_of(x: Tensor, grid: Grid) -> Tensor:
    """`(tokens,)`: the region of each token of a map."""
    rows, columns = (torch.arange(size, device=x.device) for size in x.shape[1:3])
    return (rows[:, None] // grid.height * grid.columns + columns // grid.width).flatten()


def _existence_bias(like: Tensor, routes: Tensor, grid: Grid) -> Tensor | None:
    """`(B * regions, 1, 1, topk * tokens)`: minus infinity for keys beyond the map of `like`. None if it has none."""
    if grid.ends_with(like):
        return None
    inside_h = (torch.arange(grid.rows * grid.height, device=like.device) < like.shape[1]).view(grid.rows, 1, -1, 1)
    inside_w = (torch.arange(grid.columns * grid.width, device=like.device) < like.shape[2]).view(grid.columns, 1, -1)
    bias = torch.where((inside_h & inside_w).view(grid.regions, grid.tokens), 0.0, -math.inf).to(like.dtype)
    return bias[routes].flatten(2).flatten(0, 1)[:, None, None]


def _region_means(x: Tensor, grid: Grid, fill: Tensor | None) -> Tensor:
    """`(B, regions, channels)`: means over the tokens of each region, in float32 or wider."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    padded = _pad(x.flatten(3), grid)
    padded = padded.reshape(x.shape[0], grid.rows, grid.height, grid.columns, grid.width, padded.shape[3])
    total = padded.sum((2, 4), dtype=dtype).flatten(1, 2)
    tokens = grid.tokens_on(x).to(dtype).unsqueeze(-1)
    if fill is None:
        return total / tokens
    return (total + (grid.tokens - tokens) * fill.flatten().to(dtype)) / grid.tokens
