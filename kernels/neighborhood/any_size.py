"""Neighborhood attention as a graph for maps of any size: for exported programs with a dynamic height and width.

`tiles` plans the tiles for a map of one size. Here no decision depends on the size: per axis, every dilation group is
cut into tiles of `kernel` queries, and a tile's keys are the `2 * kernel - 1` members of the group from its first
window on. The graph itself computes the positions of tokens; keys that a query does not see have minus infinity in its
bias. This costs more than `tiles`: keys are copied about four times, and every tile has its own bias.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Axis(NamedTuple):
    """One axis of a map, cut into tiles. The tiles of the first dilation group come first.

    Attributes:
        queries: `(tiles, kernel)`, positions of the queries; places without a token repeat the position of another one.
        keys: `(tiles, 2 * kernel - 1)`, positions of the keys, which may lie beyond the map.
        entries: `(tiles, kernel, 2 * kernel - 1)`, index into rpb; `2 * kernel - 1` for a key that is not seen.
        places: `(tiles, kernel, 2 * kernel - 1)`, where a key lies in the query's window; 0 for one that is not seen.
        tile, place: `(length,)`, the tile in which a token is a query, and its place in that tile.
    """

    queries: Tensor
    keys: Tensor
    entries: Tensor
    places: Tensor
    tile: Tensor
    place: Tensor


def cut(length: int, kernel: int, dilation: int, extends: bool, device: torch.device) -> Axis:
    """Cut an axis. `extends`: a shorter axis is extended to `kernel * dilation` tokens. Sizes may be symbolic."""
    whole: Any = torch.sym_max(length, kernel * dilation) if extends else length
    # Tiles of a group. At least two, because PyTorch makes a size of 1 a constant of the program.
    count: Any = torch.sym_max(2, (length + dilation * kernel - 1) // (dilation * kernel))
    group = torch.arange(dilation, device=device)[:, None, None]
    members = ((whole - group + dilation - 1) // dilation).clamp(min=1)
    first = torch.arange(count, device=device)[None, :, None] * kernel
    query = torch.minimum(first + torch.arange(kernel, device=device), members - 1)
    window = torch.minimum((query - kernel // 2).clamp(min=0), (members - kernel).clamp(min=0))
    key = torch.minimum((first - kernel // 2).clamp(min=0), (members - (2 * kernel - 1)).clamp(min=0))
    key = key + torch.arange(2 * kernel - 1, device=device)
    query, window, keys = query[..., None], window[..., None], key[:, :, None]
    seen = (window <= keys) & (keys < window + kernel) & (keys < members[..., None])
    entries = torch.where(seen, keys - query + kernel - 1, 2 * kernel - 1)
    token = torch.arange(length, device=device)
    member = token // dilation
    return Axis(
        (group + dilation * query[..., 0]).clamp(max=length - 1).flatten(0, 1),
        (group + dilation * key).flatten(0, 1),
        entries.flatten(0, 1),
        torch.where(seen, keys - window, 0).flatten(0, 1),
        token % dilation * count + member // kernel,
        member % kernel,
    )


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    fill: Tensor | None,
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
) -> Tensor:
    """See `api.na2d`."""
    height, width, heads = query.shape[1:4]
    rows, columns, q, keys, bias = cut_map(query, rpb, kernel, dilation, fill is not None)
    if fill is not None:  # one additional token represents all tokens beyond the map
        beyond = _pairs((rows.keys >= height).long(), (columns.keys >= width).long()) > 0
        keys = torch.where(beyond, height * width, keys)
    k, v = (
        take_tiles((t.flatten(1, 2) if fill is None else _with_token(t, fill[i])).to(q.dtype), keys)
        for i, t in enumerate((key, value))
    )
    bias = bias.transpose(0, 1).expand(-1, heads, -1, -1).flatten(0, 1)
    out = F.scaled_dot_product_attention(q, k, v, bias[None], scale=scale)
    out = out.unflatten(1, (-1, heads)).transpose(2, 3).flatten(1, 2)
    return out.index_select(1, back(rows, columns)).unflatten(1, (height, width)).to(query.dtype)


def cut_map(
    query: Tensor, rpb: Tensor | None, kernel: tuple[int, int], dilation: tuple[int, int], extends: bool
) -> tuple[Axis, Axis, Tensor, Tensor, Tensor]:
    """Both axes, the queries of all tiles, the positions of their keys `(tiles, keys)` on the map, and the bias.

    Queries are in float32 or wider. Keys beyond the map get the position of the last key of their row or column.
    """
    height, width = query.shape[1:3]
    rows, columns = (
        cut(length, k, d, extends, query.device) for length, k, d in zip((height, width), kernel, dilation, strict=True)
    )
    wide = query.flatten(1, 2).to(torch.promote_types(query.dtype, torch.float32))
    q = take_tiles(wide, _pairs(rows.queries * width, columns.queries))
    keys = _pairs(rows.keys.clamp(max=height - 1) * width, columns.keys.clamp(max=width - 1))
    if rpb is None:
        rpb = query.new_zeros(1, 2 * kernel[0] - 1, 2 * kernel[1] - 1)
    return rows, columns, q, keys, _bias(rows, columns, rpb.to(q.dtype))


def _pairs(rows: Tensor, columns: Tensor) -> Tensor:
    """`(tiles, tokens)`: the sums of `rows` and `columns`, each `(tiles, size)`, for all pairs of their tiles."""
    return (rows[:, None, :, None] + columns[:, None]).flatten(2).flatten(0, 1)


def take_tiles(tokens: Tensor, index: Tensor) -> Tensor:
    """`(batch, tokens, heads, d)` -> `(batch, tiles * heads, size, d)`, selected by an index `(tiles, size)`."""
    taken = tokens.index_select(1, index.flatten()).unflatten(1, (-1, index.shape[1]))
    return taken.transpose(2, 3).flatten(1, 2)


def _with_token(x: Tensor, token: Tensor) -> Tensor:
    """The tokens of a map `(batch, height, width, heads, d)`, followed by one additional token `(heads, d)`."""
    return torch.cat((x.flatten(1, 2), token.to(x.dtype).expand(x.shape[0], 1, -1, -1)), dim=1)


def back(rows: Axis, columns: Axis) -> Tensor:
    """Where the tokens of a map, row by row, are among the queries of all tiles."""
    tile = rows.tile[:, None] * columns.queries.shape[0] + columns.tile
    place = rows.place[:, None] * columns.queries.shape[1] + columns.place
    return (tile * (rows.queries.shape[1] * columns.queries.shape[1]) + place).flatten()


def _bias(rows: Axis, columns: Axis, rpb: Tensor) -> Tensor:
    """`(heads, tiles, queries, keys)` of rpb's heads, minus infinity if a query does not see a key."""
    table = F.pad(rpb, (0, 1, 0, 1), value=-math.inf)
    row, column = rows.entries[:, None, :, None, :, None], columns.entries[:, None, :, None]
    entries = (row * table.shape[2] + column).flatten(4).flatten(2, 3).flatten(0, 1)
    return table.flatten(1).index_select(1, entries.flatten()).unflatten(1, entries.shape)
