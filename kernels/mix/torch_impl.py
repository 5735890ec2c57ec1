"""Dynamic convolution of neighborhoods in plain PyTorch, on any device: the tiles of neighborhood attention.

A query has one score for each place of its window, `rows * columns` of them: one product with the image's matrix of
taps. Then the softmax of these scores is assigned to the keys of a tile, with zeros for keys that a query does not see,
and one product with the values computes the result. If the windows of neighboring queries start at the same key or one
key apart, the assignment is a copy into a strided view, so nothing is gathered. Tensors as wide as a window exist only
for a few tiles at a time. Everything is computed in float32 or wider, and summed in a fixed order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from hybridzoo.kernels.mix.given import Mix
from hybridzoo.kernels.neighborhood import tiles
from hybridzoo.kernels.neighborhood.given import Window
from hybridzoo.kernels.neighborhood.torch_impl import chunks

# Measured on a CPU. Larger tiles copy fewer keys twice, but multiply with more zeros.
SHAPE = tiles.Shape(max_tile=8, uncut_rows=2, uncut_columns=2)
EXPORTED = tiles.Shape(max_tile=16, columns=2, uncut_columns=2, exporting=True)
CHUNK = 1 << 18  # scores processed at a time, so that they stay in the CPU's cache


class _Spread:
    """Converts weights by place of a window, `(n, queries, rows * columns)`, to weights by key of a tile, and back."""

    def __init__(self, block: tiles.Block) -> None:
        self.queries = block.rows.tile, block.columns.tile
        self.keys = block.rows.keys, block.columns.keys
        self.kernel = block.rows.kernel, block.columns.kernel
        self.pieces = list(itertools.product(block.rows.pieces(), block.columns.pieces()))
        self.seen = tuple(min(run.kernel, run.members) for run in block)
        # If there is only one window, and it is whole, the places are the keys.
        self.same = self.keys == self.kernel == self.seen and len(self.pieces) == 1

    def _views(self, places: Tensor, keys: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of views, one of `places` and one of `keys`, that hold the same weights."""
        places = places.view(-1, *self.queries, *self.kernel)[..., : self.seen[0], : self.seen[1]]
        across = self.keys[1]
        key_step, query_step = self.keys[0] * across, self.queries[1] * self.keys[0] * across
        for (row, rows, top, down), (column, columns, left, right) in self.pieces:
            size = (len(keys), rows, columns, *self.seen)
            stride = (keys.stride(0), query_step + down * across, key_step + right, across, 1)
            first = row * query_step + column * key_step + top * across + left
            view = keys.as_strided(size, stride, keys.storage_offset() + first)
            yield places[:, row : row + rows, column : column + columns], view

    def to_keys(self, places: Tensor) -> Tensor:
        """`(n, queries, keys)`, zeros for keys that are not seen."""
        if self.same:
            return places
        keys = places.new_zeros(len(places), math.prod(self.queries), math.prod(self.keys))
        for by_place, by_key in self._views(places, keys):
            by_key.copy_(by_place)
        return keys

    def to_places(self, keys: Tensor) -> Tensor:
        """`(n, queries, rows * columns)`, zeros for places beyond the dilation group."""
        if self.same:
            return keys
        places = keys.new_zeros(len(keys), math.prod(self.queries), math.prod(self.kernel))
        for by_place, by_key in self._views(places, keys):
            by_place.copy_(by_key)
        return places


def _by_head(view: Tensor, dtype: torch.dtype) -> Tensor:
    """`(B, groups, groups, tiles, tiles, heads, size, size, d)` -> `(B * heads, tiles * size * size, d)`."""
    view = view.permute(0, 5, 1, 2, 3, 4, 6, 7, 8).to(dtype)
    return view.reshape(view.shape[0] * view.shape[1], math.prod(view.shape[2:8]), view.shape[8])


def _like(x: Tensor, view: Tensor) -> Tensor:
    """Inverse of `_by_head`: back to the axes of `view`."""
    batch, heads, axes = view.shape[0], view.shape[5], (*view.shape[1:5], *view.shape[6:8])
    return x.view(batch, heads, *axes, x.shape[-1]).permute(0, 2, 3, 4, 5, 1, 6, 7, 8)


def _weights(q: Tensor, taps: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Softmax over the window's places, `(B * heads, queries of all tiles, places)`; `bias` is that of one tile."""
    scores = q.new_empty(*q.shape[:2], taps.shape[1])
    scores.view(-1, bias.shape[0], q.shape[1] // bias.shape[1], *bias.shape[1:]).copy_(bias[:, None])
    scores.baddbmm_(q, taps.transpose(1, 2), alpha=scale)
    return torch.softmax(scores, -1, out=scores)


def _bias(block: tiles.Block, plan: tiles.Plan, tap_bias: Tensor | None, heads: int) -> Tensor:
    """`(heads, queries of a tile, places)`; minus infinity for places beyond the group."""
    bias = block.bias(plan)
    if tap_bias is not None:
        bias = bias + tap_bias.to(plan.dtype)[:, None]
    return bias.expand(heads, -1, -1)


def _budget(query: Tensor, block: tiles.Block) -> int:
    """The number of weights of a tile, by place and by key together."""
    queries = block.rows.tile * block.columns.tile
    places = block.rows.kernel * block.columns.kernel
    return query.shape[3] * queries * (places + block.rows.keys * block.columns.keys)


def forward(given: Mix, window: Window) -> Tensor:
    """See `api.neighborhood_mix2d`."""
    query, taps, value, tap_bias, rpb = given
    plan = tiles.plan(query, rpb, window.kernel, window.dilation, SHAPE, taps=True)
    result = value.new_empty(value.shape)
    for block in plan.blocks if len(query) else ():
        bias, spread = _bias(block, plan, tap_bias, query.shape[3]), _Spread(block)
        q_all, v_all, out_all = block.queries(query), block.keys(value), block.queries(result)
        for part in chunks(q_all, _budget(query, block), CHUNK):
            q, v = _by_head(q_all[part], plan.dtype), _by_head(v_all[part], plan.dtype)
            weights = _weights(q, taps[part[0]].flatten(0, 1).to(plan.dtype), bias, window.scale)
            dense = spread.to_keys(weights.view(-1, *bias.shape[1:]))
            mixed = dense @ v.reshape(len(dense), -1, v.shape[2])
            into = out_all[part]
            into.copy_(_like(mixed, into))
    return result


def backward(grad: Tensor, given: Mix, out: Tensor, window: Window) -> Mix:
    """Gradients of `forward` with respect to all inputs, each in the dtype of its input."""
    query, taps, value, tap_bias, rpb = given
    plan = tiles.plan(query, rpb, window.kernel, window.dilation, SHAPE, taps=True)
    grad_query = query.new_empty(query.shape)
    grad_value = torch.zeros(value.shape, dtype=plan.dtype, device=value.device)
    grad_taps = torch.zeros(taps.shape, dtype=plan.dtype, device=taps.device)
    grad_tap_bias = None if tap_bias is None else torch.zeros(tap_bias.shape, dtype=plan.dtype, device=taps.device)
    grad_rpb = None if rpb is None else torch.zeros(rpb.shape, dtype=plan.dtype, device=taps.device)
    for block in plan.blocks if len(query) else ():
        bias, spread = _bias(block, plan, tap_bias, query.shape[3]), _Spread(block)
        grad_bias = torch.zeros_like(bias, memory_format=torch.contiguous_format)
        q_all, v_all = block.queries(query), block.keys(value)
        g_all, o_all = block.queries(grad), block.queries(out)
        into_q, into_v = block.queries(grad_query), block.key_pieces(grad_value)
        for part in chunks(q_all, 2 * _budget(query, block), CHUNK):
            q, v, g, o = (_by_head(t[part], plan.dtype) for t in (q_all, v_all, g_all, o_all))
            matrix = taps[part[0]].flatten(0, 1).to(plan.dtype)
            weights = _weights(q, matrix, bias, window.scale)
            dense = spread.to_keys(weights.view(-1, *bias.shape[1:]))
            g_tiles = g.reshape(len(dense), -1, g.shape[2])
            v_tiles = v.reshape(len(dense), -1, v.shape[2])
            dv = _like(dense.transpose(1, 2) @ g_tiles, v_all[part])
            for view, rows, columns in into_v:
                view[part].add_(dv[..., rows, columns, :])
            # d softmax: w * (dw - sum(w * dw)), and the sum is g . o.
            scores = spread.to_places(g_tiles @ v_tiles.transpose(1, 2)).view_as(weights)
            scores = scores.sub_((g * o).sum(-1, keepdim=True)).mul_(weights)
            grad_bias += scores.view(-1, bias.shape[0], q.shape[1] // bias.shape[1], *bias.shape[1:]).sum((0, 2))
            into = into_q[part]
            into.copy_(_like((scores @ matrix).mul_(window.scale), into))
            grad_taps[part[0]] += (scores.transpose(1, 2) @ q).mul_(window.scale).view_as(grad_taps[part[0]])
        if grad_tap_bias is not None:
            grad_tap_bias += grad_bias.sum(1)
        if grad_rpb is not None:
            grad_rpb += block.bias_gradient(plan, grad_bias)
    return Mix(
        grad_query,
        grad_taps.to(taps.dtype),
        grad_value.to(value.dtype),
        None if tap_bias is None or grad_tap_bias is None else grad_tap_bias.to(tap_bias.dtype),
        None if rpb is None or grad_rpb is None else grad_rpb.to(rpb.dtype),
    )


def exportable_forward(given: Mix, window: Window) -> Tensor:
    """`forward` for exported graphs: it does not write into views, and uses no chunks but larger tiles.

    So the graph has few nodes and works for any batch size.
    """
    query, taps, value, tap_bias, rpb = given
    plan = tiles.plan(query, rpb, window.kernel, window.dilation, EXPORTED, taps=True)
    batch, _, width, heads, _ = query.shape
    query_map, value_map = (t.flatten(1, 2).transpose(1, 2).to(plan.dtype) for t in (query, value))
    matrix = taps.to(plan.dtype).transpose(2, 3)
    pieces: list[Tensor] = []
    order: list[int] = []
    for block in plan.blocks:
        queries, keys = (block.tokens(*axes, width) for axes in (block.query_axes, block.key_axes))
        tokens, others = (torch.tensor(list(itertools.chain(*found)), device=query.device) for found in (queries, keys))
        count, tile, met = len(queries), len(queries[0]), len(keys[0])
        bias = _bias(block, plan, tap_bias, heads)
        scores = (query_map.index_select(2, tokens) @ matrix).mul(window.scale).view(batch, heads, count, tile, -1)
        weights = (scores + bias[:, None]).softmax(-1)
        zero = torch.zeros_like(weights[..., :1])
        padded = torch.cat([weights, zero], -1).flatten(3)  # keys that are not seen read the zero
        dense = padded.index_select(3, _places(block, query.device)).view(batch, heads, count, tile, met)
        values = value_map.index_select(2, others).view(batch, heads, count, met, value.shape[4])
        pieces.append((dense @ values).flatten(2, 3))
        order += itertools.chain(*queries)
    place = [0] * len(order)
    for i, token in enumerate(order):
        place[token] = i
    back = torch.tensor(place, device=query.device)
    out = torch.cat(pieces, dim=2).index_select(2, back).transpose(1, 2)
    return out.reshape(value.shape).to(value.dtype)


def _places(block: tiles.Block, device: torch.device) -> Tensor:
    """`(queries * keys)`: the index of each weight by key in the weights by place, which have a zero after each row."""
    axes = []
    for run in block:
        start = torch.tensor(run.starts(), device=device)[:, None]
        place = torch.arange(run.keys, device=device) - start
        axes.append((place, (place >= 0) & (place < run.kernel)))
    (rows, seen_h), (columns, seen_w) = axes
    places = block.rows.kernel * block.columns.kernel
    index = rows[:, None, :, None] * block.columns.kernel + columns[:, None]
    index = torch.where(seen_h[:, None, :, None] & seen_w[:, None], index, places)
    query = torch.arange(block.rows.tile * block.columns.tile, device=device)[:, None]
    return (index.flatten(2).flatten(0, 1) + query * (places + 1)).flatten()
