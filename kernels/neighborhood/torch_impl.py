"""Neighborhood attention in plain PyTorch, on any device: dense attention of small tiles to the keys around them.

The queries of a tile share most of their keys. So a tile and the union of its windows are two small dense matrices, and
keys that a query of the tile does not see have minus infinity in the bias. Nothing is gathered per query. `tiles`
defines how the map is cut; small maps and small dilation groups are not cut.

For each block of equal tiles, columns of tiles are copied to *bands*, in which the keys of a tile are consecutive, so
that only neighboring columns duplicate keys. Then the tiles of a band are processed row by row while the band is in
the CPU's cache. Everything is computed in float32 or wider, and summed in a fixed order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridzoo.kernels.neighborhood import tiles
from hybridzoo.kernels.neighborhood.given import Maps, Window

# Measured on a CPU. If columns are cut, bands are copied; if not, more of the computed scores are masked.
FORWARD = tiles.Shape(uncut_rows=2, uncut_columns=4)
BACKWARD = tiles.Shape(columns=2, uncut_columns=2)
EXPORTED = tiles.Shape(max_tile=16, columns=2, uncut_columns=2, exporting=True)
# Scores processed at a time. With more of them, a CPU's cache is too small.
CHUNK_FORWARD = 1 << 20
CHUNK_BACKWARD = 1 << 18  # the backward pass holds two tensors of them
CHUNK_GPU = 1 << 26


def chunks(batch: Tensor, scores: int, chunk: int) -> Iterator[tuple[slice, ...]]:
    """Cut the batch of a block, `(B, groups, groups, tiles, tiles, ...)`, into parts of at most `chunk` scores.

    `scores`: the number of scores of one tile.
    """
    budget = (CHUNK_GPU if batch.is_cuda else chunk) // scores
    steps: list[int] = []
    for size in reversed(batch.shape[:5]):
        steps.insert(0, min(size, max(1, budget // math.prod(steps))))
    cuts = [
        [slice(None)] if step == size else [slice(i, i + step) for i in range(0, size, step)]
        for size, step in zip(batch.shape[:5], steps, strict=True)
    ]
    return itertools.product(*cuts)


def _matrices(view: Tensor, dtype: torch.dtype) -> Tensor:
    """`(..., heads, size, size, d)` -> `(tiles * heads, size * size, d)` in `dtype`; a view if possible."""
    view = view.to(dtype, memory_format=torch.contiguous_format)
    return view.reshape(math.prod(view.shape[:6]), view.shape[6] * view.shape[7], view.shape[8])


def _sequences(view: Tensor) -> Tensor:
    """`(..., heads, size, size, d)` -> `(tiles, heads, size * size, d)`; a view if possible (whole rows of a map)."""
    return view.reshape(math.prod(view.shape[:5]), view.shape[5], view.shape[6] * view.shape[7], view.shape[8])


def _weights(q: Tensor, k: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Attention weights `(tiles * heads, queries, keys)`."""
    scores = q.new_empty(q.shape[0], q.shape[1], k.shape[1])
    scores.view(len(scores) // len(bias), *bias.shape).copy_(bias)
    scores.baddbmm_(q, k.transpose(1, 2), alpha=scale)
    return torch.softmax(scores, -1, out=scores)


def _tile_rows(block: tiles.Block) -> Iterator[tuple[slice, slice, slice]]:
    """For every row of tiles: its rows on the map, and its queries and its keys in the matrices of a band."""
    rows, columns = block
    for start in range(0, rows.tiles * rows.tile, rows.tile):
        queries, keys = start * columns.tile, start * columns.keys
        yield (
            slice(start, start + rows.tile),
            slice(queries, queries + rows.tile * columns.tile),
            slice(keys, keys + rows.keys * columns.keys),
        )


def forward(maps: Maps, rpb: Tensor | None, window: Window, with_lse: bool = False) -> tuple[Tensor, Tensor | None]:
    """See `api.na2d`. The result and, if requested, the log-sum-exp of the scores `(batch, height, width, heads)`."""
    query, key, value = maps
    plan = tiles.plan(query, rpb, window.kernel, window.dilation, FORWARD)
    result = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:4], dtype=plan.dtype) if with_lse else None
    for block in plan.blocks:
        bias = block.bias(plan)
        band = block._replace(rows=block.rows.as_band())
        q_all, k_all, v_all, out_all = band.queries(query), band.keys(key), band.keys(value), band.queries(result)
        lse_all = None if lse is None else band.queries(lse.unsqueeze(-1))
        for part in chunks(q_all, query.shape[3] * bias[0].numel(), CHUNK_FORWARD):
            q, k, v = (_sequences(t[part].to(plan.dtype)) for t in (q_all, k_all, v_all))
            out = out_all[part]
            mask = bias.expand(q.shape[0], -1, -1, -1)
            for rows, queries, keys in _tile_rows(block):
                tensors = (q[:, :, queries], k[:, :, keys], v[:, :, keys], mask)
                if lse_all is None:
                    tile = F.scaled_dot_product_attention(*tensors, scale=window.scale)
                else:
                    tile, sums = _attend_with_lse(*tensors, window.scale)
                    into = lse_all[part][..., rows, :, :]
                    into.copy_(sums.view(into.shape))
                into = out[..., rows, :, :]
                into.copy_(tile.view(into.shape))
    return result, lse


def _attend_with_lse(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention `(..., queries, d)`, and the log-sum-exp of its scores `(..., queries, 1)`."""
    scores = torch.add(bias, q @ k.transpose(-2, -1), alpha=scale)
    lse = scores.logsumexp(-1, keepdim=True)
    return (scores - lse).exp() @ v, lse


def exportable_forward(
    maps: Maps, rpb: Tensor | None, window: Window, with_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """`forward` for exported graphs: it does not write into views, and uses no chunks but larger tiles.

    So the graph has few nodes and works for any batch size.
    """
    query, key, value = maps
    plan = tiles.plan(query, rpb, window.kernel, window.dilation, EXPORTED)
    batch, _, width, heads, head_dim = query.shape
    query_map, key_map, value_map = (t.flatten(1, 2).to(plan.dtype) for t in (query, key, value))
    pieces: list[Tensor] = []
    sums: list[Tensor] = []
    order: list[int] = []

    def gather(x: Tensor, tokens: list[list[int]]) -> Tensor:  # by tile
        index = torch.tensor(list(itertools.chain(*tokens)), device=x.device)
        return x.index_select(1, index).reshape(batch * len(tokens), len(tokens[0]), heads, head_dim).transpose(1, 2)

    for block in plan.blocks:
        queries, keys = (block.tokens(*axes, width) for axes in (block.query_axes, block.key_axes))
        q, k, v = gather(query_map, queries), gather(key_map, keys), gather(value_map, keys)
        if with_lse:
            piece, lse = _attend_with_lse(q, k, v, block.bias(plan), window.scale)
            sums.append(lse.transpose(1, 2).reshape(batch, len(queries) * len(queries[0]), heads))
        else:
            piece = F.scaled_dot_product_attention(q, k, v, block.bias(plan), scale=window.scale)
        pieces.append(piece.transpose(1, 2).reshape(batch, len(queries) * len(queries[0]), heads, head_dim))
        order += itertools.chain(*queries)
    place = [0] * len(order)
    for i, token in enumerate(order):
        place[token] = i
    back = torch.tensor(place, device=query.device)
    out = torch.cat(pieces, dim=1).index_select(1, back).view(query.shape).to(query.dtype)
    return out, torch.cat(sums, dim=1).index_select(1, back).view(query.shape[:4]) if with_lse else None


def backward(
    grad: Tensor,
    maps: Maps,
    rpb: Tensor | None,
    out: Tensor,
    grad_lse: Tensor | None,
    window: Window,
    into: Maps,
    want_rpb: bool,
) -> Tensor | None:
    """Write the gradients of `maps` to `into`; return that of rpb, or None if it is not needed.

    `grad`: gradient of the result; `grad_lse`: gradient of the log-sum-exp, None if nothing depends on it.
    """
    query, key, value = maps
    plan = tiles.plan(query, rpb, window.kernel, window.dilation, BACKWARD)
    # Gradients of keys and values are summed over blocks, in float32 or wider.
    grad_k, grad_v = (
        t.zero_() if t.dtype == plan.dtype else torch.zeros(t.shape, dtype=plan.dtype, device=t.device)
        for t in (into.key, into.value)
    )
    grad_rpb = None
    if rpb is not None and want_rpb:
        grad_rpb = torch.zeros(rpb.shape, dtype=plan.dtype, device=rpb.device)
    for block in plan.blocks:
        bias = block.bias(plan)
        grad_bias = torch.zeros_like(bias)
        band = block._replace(rows=block.rows.as_band())
        all_queries = [band.queries(t) for t in (query, grad, out)]
        all_keys = [band.keys(t) for t in (key, value)]
        into_q, into_k, into_v = band.queries(into.query), band.key_pieces(grad_k), band.key_pieces(grad_v)
        for part in chunks(all_queries[0], query.shape[3] * bias[0].numel(), CHUNK_BACKWARD):
            q, g, o = (_matrices(t[part], plan.dtype) for t in all_queries)
            k, v = (_matrices(t[part], plan.dtype) for t in all_keys)
            delta = (g * o).sum(-1, keepdim=True)
            if grad_lse is not None:  # d lse / d scores are the weights
                delta -= _matrices(band.queries(grad_lse.unsqueeze(-1))[part], plan.dtype)
            dk, dv = torch.zeros_like(k), torch.zeros_like(v)
            for rows, queries, keys in _tile_rows(block):
                weight = _weights(q[:, queries], k[:, keys], bias, window.scale)
                dv[:, keys] += weight.transpose(1, 2) @ g[:, queries]
                # d softmax: w * (dw - sum(w * dw)), and the sum is g . o.
                scores = (g[:, queries] @ v[:, keys].transpose(1, 2)).sub_(delta[:, queries]).mul_(weight)
                if grad_rpb is not None:
                    grad_bias += scores.view(len(scores) // len(bias), *bias.shape).sum(0)
                place = into_q[part][..., rows, :, :]
                place.copy_((scores @ k[:, keys]).mul_(window.scale).view(place.shape))
                dk[:, keys] += scores.transpose(1, 2) @ q[:, queries]
            for pieces, gradient in ((into_k, dk.mul_(window.scale)), (into_v, dv)):
                gradient = gradient.view(
                    *pieces[0][0][part].shape[:6], band.rows.keys, band.columns.keys, query.shape[4]
                )
                for view, rows, columns in pieces:
                    view[part].add_(gradient[..., rows, columns, :])
        if grad_rpb is not None:
            grad_rpb += block.bias_gradient(plan, grad_bias)
    if grad_k is not into.key:
        into.key.copy_(grad_k)
        into.value.copy_(grad_v)
    return None if rpb is None or grad_rpb is None else grad_rpb.to(rpb.dtype)
