"""Dynamic convolution in programs exported for any height and width: the graph computes the tokens' positions."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridzoo.kernels.mix.given import Mix
from hybridzoo.kernels.neighborhood.any_size import back, cut_map, take_tiles
from hybridzoo.kernels.neighborhood.given import Window


def forward(given: Mix, window: Window) -> Tensor:
    """See `api.neighborhood_mix2d`."""
    (query, taps, value, tap_bias, rpb), (kernel, dilation, scale) = given, window
    height, width, heads = query.shape[1:4]
    rows, columns, q, seen, bias = cut_map(query, rpb, kernel, dilation, False)
    tiles, queries, keys = bias.shape[1:]
    v = take_tiles(value.flatten(1, 2).to(q.dtype), seen)
    q, v = (t.unflatten(1, (tiles, heads)).transpose(1, 2) for t in (q, v))
    scores = (q.flatten(2, 3) @ taps.to(q.dtype).transpose(2, 3)).mul(scale)  # (batch, heads, tiles * queries, places)
    if tap_bias is not None:
        scores = scores + tap_bias.to(q.dtype)[:, None]
    # From a window's places to a tile's keys.
    place = rows.places[:, None, :, None, :, None] * kernel[1] + columns.places[:, None, :, None]
    place = place.flatten(4).flatten(0, 3)
    token = torch.arange(tiles * queries, device=query.device)[:, None]
    index = (token * (kernel[0] * kernel[1]) + place).flatten()
    scores = scores.flatten(2).index_select(2, index).unflatten(2, (tiles, queries, keys))
    out = ((scores + bias).softmax(-1) @ v).flatten(2, 3)
    out = out.index_select(2, back(rows, columns)).transpose(1, 2)
    return out.unflatten(1, (height, width)).to(query.dtype)
