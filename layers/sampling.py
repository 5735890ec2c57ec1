"""Bilinear sampling of maps and tables at coordinates, with zeros outside.

Coordinates are `(row, column)`, from -1 at an axis' first entry to 1 at its last; on an axis with one entry, every
coordinate means that entry. PyTorch's `grid_sample` is used. On a GPU it adds gradients in an undefined order, so that
two runs may differ in their last bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_map(x: Tensor, places: Tensor) -> Tensor:
    """Read a channels-last map, each group of channels at its own places.

    Args:
        x: `(batch, height, width, dim)`.
        places: `(batch, groups, keys, 2)`, in float32 or wider: half precision is too coarse for large maps.

    Returns:
        `(batch, keys, dim)` in the dtype of `x`.
    """
    groups = places.shape[1]
    maps = x.to(places.dtype).unflatten(3, (groups, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1)
    grid = places.flatten(0, 1)[:, :, None].flip(-1)
    sampled = F.grid_sample(maps, grid, align_corners=True)[..., 0].unflatten(0, (-1, groups))
    return sampled.flatten(1, 2).transpose(1, 2).to(x.dtype)


def sample_differences(table: Tensor, rows: Tensor, columns: Tensor, places: Tensor) -> Tensor:
    """Read a table for every query of a map and every key, at half the query's coordinates minus the key's.

    Coordinates are computed per row and per column, not for each pair.

    Args:
        table: `(heads, height, width)`, two entries or more along each axis.
        rows, columns: coordinates of the queries' rows and columns.
        places: of keys, `(batch, groups, keys, 2)`; heads of a group follow each other.

    Returns:
        `(batch, heads, rows * columns, keys)`, queries row by row, in the dtype of `places`.
    """
    groups = places.shape[1]
    maps = table.to(places.dtype).unflatten(0, (groups, -1)).expand(places.shape[0], -1, -1, -1, -1).flatten(0, 1)
    down = (rows[:, None] - places[:, :, None, :, 0]) / 2  # (batch, groups, rows, keys)
    along = (columns[:, None] - places[:, :, None, :, 1]) / 2
    down, along = down.flatten(0, 1)[:, :, None], along.flatten(0, 1)[:, None]
    size = (-1, rows.shape[0], columns.shape[0], -1)
    # Each coordinate contiguous in memory, for which `grid_sample` is fastest.
    grid = torch.stack((along.expand(size), down.expand(size))).permute(1, 2, 3, 4, 0).flatten(1, 2)
    return F.grid_sample(maps, grid, align_corners=True).unflatten(0, (-1, groups)).flatten(1, 2)
