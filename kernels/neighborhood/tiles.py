"""How neighborhood attention is cut into tiles for the PyTorch path, and the bias that a tile's queries and keys share.

Per axis, the map falls apart into runs (`Run`): equal dilation groups, cut into equal tiles whose keys begin equally
far from them. A pair of runs, one for the rows and one for the columns, is a *block*: all its tiles share one bias, and
its queries and its overlapping keys are strided views of the map, however the map lies in memory. Far from the borders
there is one big block. Where a dilation group is hardly larger than the window (DiNAT at its own resolution) it is a
single tile, attended to in full.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Shape(NamedTuple):
    """What tiles a pass likes best. Factors count tile rows, of which there are `kernel`, at most `max_tile`."""

    max_tile: int = 8
    columns: int = 1
    uncut_rows: int = 1
    uncut_columns: int = 1
    exporting: bool = False


class Run(NamedTuple):
    """Along one axis: `groups` dilation groups side by side, `tiles` tiles in each."""

    first: int  # position of the first group's first member
    groups: int
    members: int  # of each group
    dilation: int
    kernel: int
    tiles: int
    tile: int  # queries in a tile
    query: int  # first query of the first tile, counted in members
    key: int  # first key of the first tile
    keys: int  # keys of a tile

    def positions(self, start: int, size: int) -> list[list[list[int]]]:
        """By group, by tile: positions of `size` members, in the first tile from number `start` on."""
        starts = range(start, start + self.tiles * self.tile, self.tile)
        return [
            [[self.first + group + self.dilation * (first + i) for i in range(size)] for first in starts]
            for group in range(self.groups)
        ]

    def as_band(self) -> Run:
        """The same queries and keys as one long tile."""
        more = (self.tiles - 1) * self.tile
        return self._replace(tiles=1, tile=self.tile + more, keys=self.keys + more)

    def entries(self, device: torch.device) -> Tensor:
        """`(tile, keys)`: index into rpb, and `2 * kernel - 1` where the query does not see the key."""
        query = torch.arange(self.query, self.query + self.tile, device=device)[:, None]
        key = torch.arange(self.key, self.key + self.keys, device=device)
        start = (query - self.kernel // 2).clamp(0, max(self.members - self.kernel, 0))
        seen = (start <= key) & (key < start + self.kernel)
        return torch.where(seen, key - query + self.kernel - 1, 2 * self.kernel - 1)

    def tap_entries(self, device: torch.device) -> Tensor:
        """`(tile, kernel)`: index into rpb of the window's places, and `2 * kernel - 1` of those beyond the group."""
        query = torch.arange(self.query, self.query + self.tile, device=device)[:, None]
        start = (query - self.kernel // 2).clamp(0, max(self.members - self.kernel, 0))
        key = start + torch.arange(self.kernel, device=device)
        return torch.where(key < self.members, key - query + self.kernel - 1, 2 * self.kernel - 1)

    def starts(self) -> list[int]:
        """For every query of a tile: the first key of its window, counted in the tile's keys."""
        last = max(self.members - self.kernel, 0)
        return [min(max(q - self.kernel // 2, 0), last) - self.key for q in range(self.query, self.query + self.tile)]

    def pieces(self) -> list[tuple[int, int, int, int]]:
        """A tile's queries in pieces whose windows start alike, or each one key after the one before.

        `(first query, queries, start of the first window, step between the windows)`.
        """
        found: list[tuple[int, int, int, int]] = []
        for query, start in enumerate(self.starts()):
            first, count, origin, step = found[-1] if found else (0, 0, 0, 0)
            ahead = start - origin
            if count == 1 and ahead in (0, 1):
                found[-1] = (first, 2, origin, ahead)
            elif count > 1 and ahead == count * step:
                found[-1] = (first, count + 1, origin, step)
            else:
                found.append((query, 1, start, 0))
        return found


# A few small tensors a resolution.
_kept_entries = functools.lru_cache(maxsize=256)(Run.entries)
_kept_tap_entries = functools.lru_cache(maxsize=256)(Run.tap_entries)


def _runs(length: int, kernel: int, dilation: int, tile: int, uncut: int) -> list[Run]:
    """Cut an axis into runs of tiles of about `tile` queries; a group of at most `uncut` members is one tile."""
    whole, longer = divmod(length, dilation)  # the first `longer` groups have one member more
    runs: list[Run] = []
    for first, groups, members in ((0, longer, whole + 1), (longer, dilation - longer, whole)):
        if not groups or not members:
            continue
        step = members if members <= uncut else math.ceil(members / round(members / tile))
        last = max(members - kernel, 0)  # start of the last window
        for query in range(0, members, step):
            size = min(step, members - query)
            key = min(max(query - kernel // 2, 0), last)
            keys = min(max(query + size - 1 - kernel // 2, 0), last) + min(kernel, members) - key
            run = Run(first, groups, members, dilation, kernel, 1, size, query, key, keys)
            before = runs[-1] if runs else None
            if before and run == before._replace(
                tiles=1, query=before.query + before.tiles * step, key=before.key + before.tiles * step
            ):
                runs[-1] = before._replace(tiles=before.tiles + 1)
            else:
                runs.append(run)
    return runs


class Block(NamedTuple):
    """All pairs of a row run's and a column run's tiles."""

    rows: Run
    columns: Run

    @property
    def query_axes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Per axis: the first tile's first query, and queries of a tile."""
        return (self.rows.query, self.rows.tile), (self.columns.query, self.columns.tile)

    @property
    def key_axes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Per axis: the first tile's first key, and keys of a tile."""
        return (self.rows.key, self.rows.keys), (self.columns.key, self.columns.keys)

    def view(self, x: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
        """View a map `(B, H, W, heads, d)` as `(B, groups, groups, tiles, tiles, heads, size, size, d)`.

        `rows` and `columns`: first member in the first tile, and size.
        """
        batch, heads, head_dim = x.shape[0], x.shape[3], x.shape[4]
        (down, right), (step_h, step_w) = x.stride()[1:3], (run.dilation for run in self)
        first_h, first_w = (run.first + run.dilation * axis[0] for run, axis in zip(self, (rows, columns), strict=True))
        size = (
            *(batch, self.rows.groups, self.columns.groups, self.rows.tiles, self.columns.tiles),
            *(heads, rows[1], columns[1], head_dim),
        )
        stride = (
            *(x.stride(0), down, right, down * step_h * self.rows.tile, right * step_w * self.columns.tile),
            *(x.stride(3), down * step_h, right * step_w, x.stride(4)),
        )
        return x.as_strided(size, stride, x.storage_offset() + first_h * down + first_w * right)

    def queries(self, x: Tensor) -> Tensor:
        return self.view(x, *self.query_axes)

    def keys(self, x: Tensor) -> Tensor:
        return self.view(x, *self.key_axes)

    def tokens(self, rows: tuple[int, int], columns: tuple[int, int], width: int) -> list[list[int]]:
        """By tile, in the order of `view`: the tokens of a map `width` wide, counted row by row."""
        return [
            [row * width + column for row, column in itertools.product(tile_h, tile_w)]
            for group_h, group_w in itertools.product(self.rows.positions(*rows), self.columns.positions(*columns))
            for tile_h, tile_w in itertools.product(group_h, group_w)
        ]

    def key_pieces(self, x: Tensor) -> list[tuple[Tensor, slice, slice]]:
        """`keys(x)` in pieces in which no two tiles overlap, with the rows and columns of the keys each one is."""
        rows, columns = (
            [slice(start, min(start + run.tile, run.keys)) for start in range(0, run.keys, run.tile)]
            if run.tiles > 1
            else [slice(0, run.keys)]
            for run in self
        )
        return [
            (
                self.view(
                    x, (self.rows.key + h.start, h.stop - h.start), (self.columns.key + w.start, w.stop - w.start)
                ),
                h,
                w,
            )
            for h, w in itertools.product(rows, columns)
        ]

    def bias(self, plan: Plan) -> Tensor:
        """`(heads or 1, queries, keys)`: the position bias, and minus infinity where a query does not see a key.

        Of a plan of `taps`: `(heads or 1, queries, places of the window)`.
        """
        rows, columns = (plan.entries[run] for run in self)
        entries = (rows[:, None, :, None] * plan.table.shape[2] + columns[:, None]).view(1, -1)
        bias = plan.table.flatten(1).gather(1, entries.expand(plan.table.shape[0], -1))
        return bias.view(-1, self.rows.tile * self.columns.tile, rows.shape[1] * columns.shape[1])

    def bias_gradient(self, plan: Plan, grad: Tensor) -> Tensor:
        """Adjoint of `bias`: sum `(heads, queries, keys)` into `(heads, 2kh - 1, 2kw - 1)`, as two matrix products."""
        rows, columns = (
            (plan.entries[run].flatten()[:, None] == torch.arange(size - 1, device=grad.device)).to(grad.dtype)
            for run, size in zip(self, plan.table.shape[1:], strict=True)
        )
        others = (plan.entries[run].shape[1] for run in self)
        grad = grad.view(-1, self.rows.tile, self.columns.tile, *others)
        return rows.T @ grad.transpose(2, 3).flatten(3).flatten(1, 2) @ columns


class Plan(NamedTuple):
    """How a call is cut up, and the tables that its blocks share."""

    blocks: list[Block]
    entries: dict[Run, Tensor]  # `Run.entries`, or `Run.tap_entries`
    table: Tensor  # rpb or, without it, zeros; minus infinity in one row and one column more
    dtype: torch.dtype  # to compute in


@functools.lru_cache(maxsize=256)
def _cut(
    size: tuple[int, int], kernel: tuple[int, int], dilation: tuple[int, int], tile: int, shape: Shape
) -> tuple[list[Run], list[Run]]:
    uncut = [
        max(factor * tile, k + 3) for factor, k in zip((shape.uncut_rows, shape.uncut_columns), kernel, strict=True)
    ]
    rows = _runs(size[0], kernel[0], dilation[0], tile, uncut[0])
    columns = _runs(size[1], kernel[1], dilation[1], shape.columns * tile, uncut[1])
    return rows, columns


def plan(
    query: Tensor,
    rpb: Tensor | None,
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    shape: Shape,
    *,
    taps: bool = False,
) -> Plan:
    """`taps`: scores are counted by places of a query's window, not by a tile's keys."""
    rows, columns = _cut(
        (int(query.shape[1]), int(query.shape[2])), kernel, dilation, min(max(kernel), shape.max_tile), shape
    )
    make, kept = (Run.tap_entries, _kept_tap_entries) if taps else (Run.entries, _kept_entries)
    make = make if shape.exporting else kept  # a traced tensor must not outlive the trace
    entries = {run: make(run, query.device) for run in (*rows, *columns)}
    dtype = torch.promote_types(query.dtype, torch.float32)
    if rpb is None:
        rpb = torch.zeros(1, 2 * kernel[0] - 1, 2 * kernel[1] - 1, device=query.device)
    table = F.pad(rpb.to(dtype), (0, 1, 0, 1), value=-math.inf)
    return Plan([Block(*pair) for pair in itertools.product(rows, columns)], entries, table, dtype)
