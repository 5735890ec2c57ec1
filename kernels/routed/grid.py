"""How a map is cut into regions."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hybridzoo.kernels.open_sizes import parts, surely


class Grid(NamedTuple):
    """`rows x columns` regions of `height x width` tokens, numbered row by row; together they cover the map."""

    rows: int
    columns: int
    height: int
    width: int

    @property
    def regions(self) -> int:
        return self.rows * self.columns

    @property
    def tokens(self) -> int:
        """The number of tokens of a region, including those beyond the map."""
        return self.height * self.width

    def crowded(self, topk: int) -> bool:
        """Whether attention to `topk` regions needs more multiplications on a GPU than attention to the whole map.

        A product on a GPU has at least 16 rows, and routed attention multiplies the tokens of one region at a time.
        """
        return topk * math.ceil(self.tokens / 16) * 16 > self.regions * self.tokens

    def beyond(self, x: Tensor) -> tuple[int, int]:
        """How many rows (at the bottom) and columns (on the right) the regions extend beyond the map `x`."""
        return self.rows * self.height - x.shape[1], self.columns * self.width - x.shape[2]

    def ends_with(self, x: Tensor) -> bool:
        """Whether no region reaches beyond the map `x`; False in a program that leaves this open."""
        return all(surely(beyond == 0) for beyond in self.beyond(x))

    def tokens_on(self, x: Tensor) -> Tensor:
        """`(regions,)`: how many tokens of each region lie on the map `x`."""
        rows = (x.shape[1] - self.height * torch.arange(self.rows, device=x.device)).clamp(0, self.height)
        columns = (x.shape[2] - self.width * torch.arange(self.columns, device=x.device)).clamp(0, self.width)
        return (rows[:, None] * columns).flatten()

    def extend(self, x: Tensor, fill: Tensor) -> Tensor:
        """Append copies of the token `fill`, of shape `x.shape[3:]`, to a map until it covers all regions."""
        below, right = self.beyond(x)
        fill = fill.to(x.dtype)
        if not surely(right == 0):
            x = torch.cat([x, fill.expand(x.shape[0], x.shape[1], right, *fill.shape)], dim=2)
        if not surely(below == 0):
            x = torch.cat([x, fill.expand(x.shape[0], below, x.shape[2], *fill.shape)], dim=1)
        return x

    @classmethod
    def of(cls, x: Tensor, rows: int, columns: int) -> Grid:
        """The grid with the smallest regions, so that as few tokens as possible lie beyond the map."""
        return cls(rows, columns, parts(x.shape[1], rows), parts(x.shape[2], columns))
