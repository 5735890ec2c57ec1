"""How the PyTorch implementation cuts neighborhood attention into tiles, and the bias that the tiles share.

Each axis of the map is cut into runs (`Run`): equal dilation groups, cut into equal tiles whose keys start at the same
distance from them. A pair of runs, one for the rows and one for the columns, is a *block*: all its tiles share one
bias, and its queries and its overlapping keys are strided views of the map, for any strides of the map. Far from the
borders there is one big block. If a dilation group is hardly larger than the window (DiNAT at its usual resolution), it
is a single tile with dense attention.
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
    """The tiles that are fastest for a pass.

    A tile has `kernel` rows, at most `max_tile`. The other numbers are multiples of that: the width of a tile, and the
    largest dilation groups that are not cut.
    """

    max_tile: int = 8
    columns: int = 1
    uncut_rows: int = 1
    uncut_columns: int = 1
    exporting: bool = False


class Run(NamedTuple):
    """Along one axis: `groups` neighboring dilation groups with `tiles` tiles each."""

    first: int  # position of the first group's first member
    groups: int
    members: int  # of each group
    dilation: int
    kernel: int
    tiles: int
    tile: int  # queries in a tile
    query: int  # first query of the first tile, as the number of a member
    key: int  # first key of the first tile
    keys: int  # keys of a tile

    def positions(self, start: int, size: int) -> list[list[list[int]]]:
        """For each group and tile: the positions of `size` members, which start at member `start` in the first tile."""
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
        """`(tile, keys)`: index into rpb, or `2 * kernel - 1` if the query does not see the key."""
        query = torch.arange(self.query, self.query + self.tile, device=device)[:, None]
        key = torch.arange(self.key, self.key + self.keys, device=device)
        start = (query - self.kernel // 2).clamp(0, max(self.members - self.kernel, 0))
        seen = (start <= key) & (key < start + self.kernel)
        return torch.where(seen, key - query + self.kernel - 1, 2 * self.kernel - 1)

    def tap_entries(self, device: torch.device) -> Tensor:
        """`(tile, kernel)`: index into rpb of the window's places, or `2 * kernel - 1` for places beyond the group."""
        query = torch.arange(self.query, self.query + self.tile, device=device)[:, None]
        start = (query - self.kernel // 2).clamp(0, max(self.members - self.kernel, 0))
        key = start + torch.arange(self.kernel, device=device)
        return torch.where(key < self.members, key - query + self.kernel - 1, 2 * self.kernel - 1)

    def starts(self) -> list[int]:
        """For every query of a tile: the first key of its window, as an index into the tile's keys."""
        last = max(self.members - self.kernel, 0)
        return [min(max(q - self.kernel // 2, 0), last) - self.key for q in range(self.query, self.query + self.tile)]

    def pieces(self) -> list[tuple[int, int, int, int]]:
        """A tile's queries in pieces whose windows all start at the same key, or each one key after the last.

        `(first query, number of queries, start of the first window, step between the windows: 0 or 1)`.
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


# These caches hold a few small tensors for each resolution.
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
    """All pairs of the tiles of a run of rows and a run of columns."""

    rows: Run
    columns: Run

    @property
    def query_axes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Per axis: the first query of the first tile, and the number of queries of a tile."""
        return (self.rows.query, self.rows.tile), (self.columns.query, self.columns.tile)

    @property
    def key_axes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Per axis: the first key of the first tile, and the number of keys of a tile."""
        return (self.rows.key, self.rows.keys), (self.columns.key, self.columns.keys)

    def view(self, x: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
        """View a map `(B, H, W, heads, d)` as `(B, groups, groups, tiles, tiles, heads, size, size, d)`.

        `rows` and `columns`: the first member in the first tile, and the size.
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
        """For each tile, in the order of `view`: its tokens, numbered row by row in a map of the given width."""
        return [
            [row * width + column for row, column in itertools.product(tile_h, tile_w)]
            for group_h, group_w in itertools.product(self.rows.positions(*rows), self.columns.positions(*columns))
            for tile_h, tile_w in itertools.product(group_h, group_w)
        ]

    def key_pieces(self, x: Tensor) -> list[tuple[Tensor, slice, slice]]:
        """`keys(x)`, cut into pieces in which no two tiles overlap, and the rows and columns of keys of each piece."""
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
        """`(heads or 1, queries, keys)`: the position bias, or minus infinity if a query does not see a key.

        If the plan was made with `taps=True`: `(heads or 1, queries, places of the window)`.
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
    """The blocks of a call, and the tables that they share."""

    blocks: list[Block]
    entries: dict[Run, Tensor]  # `Run.entries`, or `Run.tap_entries`
    table: Tensor  # rpb (zeros if there is none), and an additional row and column of minus infinity
    dtype: torch.dtype  # of the computation


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
    """Plan a call. `taps`: there is a score for each place of a query's window, not for each key of a tile."""
    rows, columns = _cut(
        (int(query.shape[1]), int(query.shape[2])), kernel, dilation, min(max(kernel), shape.max_tile), shape
    )
    make, kept = (Run.tap_entries, _kept_tap_entries) if taps else (Run.entries, _kept_entries)
    make = make if shape.exporting else kept  # a cache must not keep tensors of a trace
    entries = {run: make(run, query.device) for run in (*rows, *columns)}
    dtype = torch.promote_types(query.dtype, torch.float32)
    if rpb is None:
        rpb = torch.zeros(1, 2 * kernel[0] - 1, 2 * kernel[1] - 1, device=query.device)
    table = F.pad(rpb.to(dtype), (0, 1, 0, 1), value=-math.inf)
    return Plan([Block(*pair) for pair in itertools.product(rows, columns)], entries, table, dtype)
