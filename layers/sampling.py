"""Reading maps and tables between their entries: bilinear, zeros beyond the last entry, at places given as coordinates.

Coordinates are `(row, column)`, from -1 at an axis' first entry to 1 at its last; on an axis of one entry any means it.
PyTorch's `grid_sample` does it on a CPU. On a GPU its gradient is added up in whatever order threads arrive, so there
the same is made of gathers and of products with small matrices, whose gradients have the same bits on every run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridzoo.layers.precision import without_autocast


def sample_map(x: Tensor, places: Tensor) -> Tensor:
    """Read a channels-last map, each group of channels at its own places.

    Args:
        x: `(batch, height, width, dim)`.
        places: `(batch, groups, keys, 2)`, in float32 or wider.

    Returns:
        `(batch, keys, dim)` in the dtype of `x`.
    """
    groups = places.shape[1]
    if x.is_cuda:
        sampled = _gathered(x, places)
    else:
        maps = x.to(places.dtype).unflatten(3, (groups, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1)
        grid = places.flatten(0, 1)[:, :, None].flip(-1)
        sampled = F.grid_sample(maps, grid, align_corners=True)[..., 0].unflatten(0, (-1, groups)).transpose(2, 3)
    return sampled.to(x.dtype).transpose(1, 2).flatten(2)


def sample_differences(table: Tensor, rows: Tensor, columns: Tensor, places: Tensor) -> Tensor:
    """Read a table for every query of a map and every key, at half the query's coordinates minus the key's.

    What depends on an axis alone is computed for the axis alone: no coordinates are subtracted pair by pair.

    Args:
        table: `(heads, height, width)`, two entries or more along each axis.
        rows, columns: coordinates of the queries' rows and columns.
        places: of keys, `(batch, groups, keys, 2)`; heads of a group follow each other.

    Returns:
        `(batch, heads, rows * columns, keys)`, queries row by row, in the dtype of `places`.
    """
    groups = places.shape[1]
    table = table.to(places.dtype).unflatten(0, (groups, -1))
    down = (rows[:, None] - places[:, :, None, :, 0]) / 2  # (batch, groups, rows, keys)
    along = (columns[:, None] - places[:, :, None, :, 1]) / 2
    if table.is_cuda:
        return _products(table, down, along)
    maps = table.expand(places.shape[0], -1, -1, -1, -1).flatten(0, 1)
    down, along = down.flatten(0, 1)[:, :, None], along.flatten(0, 1)[:, None]
    size = (-1, len(rows), len(columns), -1)
    # Each coordinate in memory of its own, which is how `grid_sample` is fastest.
    grid = torch.stack((along.expand(size), down.expand(size))).permute(1, 2, 3, 4, 0).flatten(1, 2)
    return F.grid_sample(maps, grid, align_corners=True).unflatten(0, (-1, groups)).flatten(1, 2)


def _gathered(x: Tensor, places: Tensor) -> Tensor:
    """`sample_map` as four gathers: `(batch, groups, keys, dim / groups)`."""
    batch, height, width, _ = x.shape
    row, row_weight = _neighbours(places[..., 0], height)
    column, column_weight = _neighbours(places[..., 1], width)
    index = (row[..., :, None] * width + column[..., None, :]).flatten(3)  # (batch, groups, keys, 4)
    weight = (row_weight[..., :, None] * column_weight[..., None, :]).flatten(3)
    image = torch.arange(batch, device=x.device)[:, None, None, None]
    group = torch.arange(places.shape[1], device=x.device)[:, None, None]
    picked = x.flatten(1, 2).unflatten(2, (places.shape[1], -1))[image, index, group]
    return (picked * weight[..., None]).sum(3)


def _products(table: Tensor, down: Tensor, along: Tensor) -> Tensor:
    """`sample_differences` of a table `(groups, heads of a group, height, width)` as products.

    What a key reads along an axis is a matrix `queries x entries` with two numbers a row, so that all that it reads is
    this matrix, the table, and the columns' matrix.
    """
    batch, _, rows, keys = down.shape
    across_rows, across_columns = (
        _interpolation(line, entries).permute(1, 0, 3, 2, 4).flatten(1, 2)  # (groups, batch * keys, queries, entries)
        for line, entries in ((down, table.shape[2]), (along, table.shape[3]))
    )
    with without_autocast(table):
        # All rows of all heads of a group at once: (groups, batch * keys * rows, heads * entries).
        read = across_rows.flatten(1, 2) @ table.transpose(1, 2).flatten(2)
        read = read.unflatten(2, (table.shape[1], -1)).unflatten(1, (batch * keys, rows)).flatten(2, 3)
        read = read @ across_columns.transpose(2, 3)  # (groups, batch * keys, rows * heads, columns)
    read = read.unflatten(2, (rows, -1)).unflatten(1, (batch, keys))
    return read.permute(1, 0, 4, 3, 5, 2).flatten(3, 4).flatten(1, 2)


def _neighbours(coordinate: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Indices of the two entries around each coordinate and their linear weights, `(..., 2)` both."""
    position = (coordinate + 1) / 2 * (count - 1)
    first = position.detach().floor().clamp(0, max(count - 2, 0))
    around = torch.stack((first, first + 1), -1)
    weight = (1 - (position[..., None] - around).abs()).clamp(min=0)
    return around.long().clamp(0, count - 1), weight


def _interpolation(coordinate: Tensor, count: int) -> Tensor:
    """Matrices `(..., count)` that read an axis of `count` entries, two or more, at coordinates."""
    index, weight = _neighbours(coordinate, count)
    return weight.new_zeros(*coordinate.shape, count).scatter(-1, index, weight)
