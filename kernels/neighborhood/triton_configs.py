"""Block sizes, warps and pipeline stages of the Triton kernels, and how a map is cut into tiles for them.

A block of scores is `QUERIES x KEYS`. The "whole" kernels hold one block of a tile: all its queries against all keys
that any of them sees (keys' gradients: all its keys against all queries that see any of them). Which block that is
depends on the map, so there is a rule; the others, which go through the keys block by block, have a table.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import torch

from hybridzoo.kernels import tuning
from hybridzoo.kernels.tuning import Config, Key, Table

WHOLE = ("forward_whole", "backward_dense", "backward_query_whole", "backward_key_whole")
TILED = ("forward_tiled", "backward_query", "backward_key", "backward_bias")
KINDS = WHOLE + TILED

OWN, OTHER = (16, 64), (16, 32, 64, 128, 256)  # sides of a whole kernel's block; 64 rows are what Hopper multiplies
# Largest blocks (own side, scores) that were seen to stay in registers, by the padded head_dim.
HELD = {
    "forward_whole": {16: (64, 8192), 32: (64, 8192), 64: (64, 4096), 128: (64, 4096)},
    "backward_query_whole": {32: (64, 4096), 64: (16, 2048)},
    "backward_key_whole": {16: (64, 4096), 32: (64, 4096), 64: (64, 4096)},
}
# Registers of a thread in sm_90's code: a base, and more with every score that it holds, by the kernel and own side.
REGISTERS = {
    ("forward_whole", 16): (56.0, 3.4),
    ("forward_whole", 64): (19.0, 3.4),
    ("backward_key_whole", 16): (50.0, 5.1),
}
MAX_OTHER = {"forward_whole": 256, "backward_query_whole": 128, "backward_key_whole": 128}
MAX_SHARED = 65536  # bytes of the two maps that a program loads most of, in one stage
DENSE_MAX_BYTES = 8192  # of a block of float32 tokens, whose products take no tensor cores: it stays in registers

# NOT yet measured: chosen from the compiler's reports (registers, shared memory), to be replaced by a tuning run.
# Numbers of registers are there where the compiler, left to itself, spilled.
TABLE: Table = {
    ("forward_tiled", 32, 2): Config(64, 32, 4, 3),
    ("forward_tiled", 64, 2): Config(64, 32, 4, 3),
    ("forward_tiled", 128, 2): Config(64, 16, 4, 2),
    ("backward_query", 32, 2): Config(64, 32, 4, 2),
    ("backward_query", 64, 2): Config(64, 32, 4, 2),
    ("backward_query", 128, 2): Config(64, 16, 4, 1),
    ("backward_key", 32, 2): Config(32, 64, 4, 2),
    ("backward_key", 64, 2): Config(16, 64, 4, 2),
    ("backward_key", 128, 2): Config(32, 64, 8, 1),
    ("backward_bias", 16, 2): Config(32, 32, 4, 2),
    ("backward_bias", 32, 2): Config(64, 32, 4, 2),
    ("backward_bias", 64, 2): Config(32, 16, 4, 2),
    ("backward_bias", 128, 2): Config(16, 32, 4, 1),
    ("forward_tiled", 32, 4): Config(32, 32, 4, 2),
    ("forward_tiled", 64, 4): Config(32, 32, 4, 2),
    ("forward_tiled", 128, 4): Config(32, 16, 8, 1),
    ("backward_query", 32, 4): Config(32, 16, 4, 1, 144),
    ("backward_query", 64, 4): Config(32, 16, 4, 1),
    ("backward_query", 128, 4): Config(16, 16, 8, 1),
    ("backward_key", 32, 4): Config(32, 32, 4, 1),
    ("backward_key", 64, 4): Config(16, 32, 4, 1),
    ("backward_key", 128, 4): Config(16, 32, 8, 1),
    ("backward_bias", 32, 4): Config(32, 32, 4, 1),
    ("backward_bias", 64, 4): Config(32, 32, 4, 1),
    ("backward_bias", 128, 4): Config(32, 16, 8, 1),
}


class Axis(NamedTuple):
    """One axis of a map: the sizes of its dilation groups, of which there are one or two, and the window."""

    members: tuple[int, ...]
    kernel: int

    @classmethod
    def of(cls, length: int, kernel: int, dilation: int) -> Axis:
        sizes = math.ceil(length / dilation), length // dilation
        return cls(tuple(sorted({n for n in sizes if n}, reverse=True)), kernel)

    @property
    def dense(self) -> bool:
        """Whether every group is one window."""
        return self.members[0] <= self.kernel


class Cut(NamedTuple):
    """Tiles of a dilation group, and how the kernel that works on them is configured."""

    tile: tuple[int, int]
    tiles: tuple[int, int]
    config: Config


def whole(kind: str, rows: Axis, columns: Axis, block_d: int, itemsize: int, device: torch.device) -> Cut | None:
    """How the whole kernel `kind` cuts a map; None where no block of it holds a tile."""
    if kind == "backward_dense" and not _holds_all(rows, columns, block_d, itemsize, capability(device)):
        return None
    default = _whole_block(kind, rows, columns, block_d, itemsize)
    if default is None:
        return None
    config = tuning.pick({(kind, block_d, itemsize): default}, _key(kind, rows, columns, block_d, itemsize), device)
    cut = _cut_whole(kind, rows, columns, config) or _cut_whole(kind, rows, columns, default)
    assert cut is not None  # the default was chosen for this very map
    return cut


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU; elsewhere that of the chip that the defaults are for."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def _holds_all(rows: Axis, columns: Axis, block_d: int, itemsize: int, chip: tuple[int, int]) -> bool:
    """Whether one kernel has registers for all gradients of a dense group.

    Of 64 tokens only where tensor cores read shared memory, from compute capability 9.0 on.
    """
    tokens = rows.members[0] * columns.members[0]
    if itemsize == 4:
        return tokens <= 32 or block_d == 16
    return tokens <= 32 or (block_d == 32 and chip >= (9, 0))


def at_a_time(kind: str, cut: Cut, block_d: int, itemsize: int) -> int:
    """Programs of a whole kernel that a multiprocessor runs at a time, about: by its registers and shared memory."""
    config = cut.config
    own, other = sorted((config.queries, config.keys))
    base, each = REGISTERS.get((kind, own), (100.0, 4.0))
    registers = min(255, base + each * own * other / (32 * config.warps))
    buffers = config.stages - (own == 16)
    shared = 5120 + buffers * (own + 2 * other) * block_d * itemsize
    return max(1, min(int(65536 / (32 * config.warps * registers)), 227 * 1024 // shared))


def tiled(kind: str, rows: Axis, columns: Axis, block_d: int, itemsize: int, device: torch.device) -> Cut:
    """How the kernel `kind`, which goes through its other side block by block, cuts a map."""
    config = tuning.pick(TABLE, _key(kind, rows, columns, block_d, itemsize), device)
    return square(rows, columns, config.keys if kind == "backward_key" else config.queries, config)


def square(rows: Axis, columns: Axis, block: int, config: Config) -> Cut:
    """Tiles of at most `block` tokens."""
    side = 1 << ((block.bit_length() - 1) // 2)  # about square, all tiles of a group about equal
    tile_h = _even(rows.members[0], side)
    tile = tile_h, _even(columns.members[0], block // tile_h)
    return _of_tile(rows, columns, tile, config)


def candidates(key: Key, default: Config) -> list[Config]:
    """What a tuning run tries for `key` beside `default`: its block with other warps and stages, then other blocks.

    Few warps have less to say to each other, many hide more waiting. On an H100 three stages were best everywhere.
    """
    if key.kernel not in WHOLE:
        return tuning.candidates(default)
    groups, windows = key.shape.split(", kernel ")
    members = (tuple(map(int, side.split("+"))) for side in groups.split(" x "))
    rows, columns = itertools.starmap(Axis, zip(members, map(int, windows.split(" x ")), strict=True))
    sides = (*OWN, 32) if key.kernel == "forward_whole" else OWN  # too many registers for a default
    blocks = sorted(_blocks(key.kernel, rows, columns, key.block_d, key.itemsize, sides))
    blocks = [block for block in blocks if block[0] <= 1.7 * blocks[0][0]]
    blocks.sort(key=lambda block: {block[1], block[2]} != {default.queries, default.keys})
    found = []
    for warps, stages in ((2, 3), (1, 3), (4, 3), (2, 2), (4, 2), (1, 2), (8, 2), (4, 1), (2, 1)):
        for order, (_, own, other) in enumerate(blocks[:3]):
            queries, keys = (other, own) if key.kernel == "backward_key_whole" else (own, other)
            # Sixteen rows are what a warp multiplies; backward, 64 scores a thread, several times over, are too many.
            most = 64 if key.kernel == "forward_whole" or own == 64 else 32
            if warps <= max(4, own // 16) and own // 16 <= 2 * warps and own * other / (32 * warps) <= most:
                found.append((order * 3, Config(queries, keys, warps, stages)))
    by_worth = sorted(enumerate(found), key=lambda pair: pair[0] + pair[1][0])
    return [config for _, (_, config) in by_worth if config != default]


def _key(kind: str, rows: Axis, columns: Axis, block_d: int, itemsize: int) -> Key:
    sides = "+".join(map(str, rows.members)), "+".join(map(str, columns.members))
    return Key("na2d", kind, block_d, itemsize, f"{sides[0]} x {sides[1]}, kernel {rows.kernel} x {columns.kernel}")


def _whole_block(kind: str, rows: Axis, columns: Axis, block_d: int, itemsize: int) -> Config | None:
    """The cheapest block by a count of what it computes and loads; as many warps as its registers take."""
    blocks = _blocks(kind, rows, columns, block_d, itemsize)
    if not blocks:
        return None
    _, own, other = min(blocks)
    warps, stages = 4, 3
    if itemsize == 4:
        warps, stages = 4 if own <= 32 and block_d == 16 else 8, 1
    elif block_d > 64:
        stages = 1
    elif own * other <= 512:
        warps, stages = 1, 2
    elif kind != "backward_query_whole" and own == 16 and other <= 128 and block_d == 32:
        warps = 2
    queries, keys = (other, own) if kind == "backward_key_whole" else (own, other)
    return Config(queries, keys, warps, stages)


def _blocks(
    kind: str, rows: Axis, columns: Axis, block_d: int, itemsize: int, sides: tuple[int, ...] | None = None
) -> list[tuple[float, int, int]]:
    """Cost, about cycles of a multiprocessor for an image, and blocks `(own side, other side)` that hold a tile."""
    found = []
    if kind == "backward_dense" or itemsize == 4:
        tokens = max(16, _power_of_two(rows.members[0] * columns.members[0]))
        fits = tokens <= 64 and kind in ("forward_whole", "backward_dense")
        fits = fits and (itemsize == 2 or tokens * block_d * itemsize <= DENSE_MAX_BYTES)
        return [(0.0, tokens, tokens)] if rows.dense and columns.dense and fits else []
    most, scores = HELD[kind].get(block_d, (0, 0))
    for own, other in itertools.product(OWN if sides is None else sides, OTHER):
        if own > min(other, most) or own * other > scores or other > MAX_OTHER[kind]:
            continue
        if 2 * other * block_d * itemsize > MAX_SHARED or (block_d == 16 and other == 256):
            continue
        fit = _fit(kind, rows, columns, own, other)
        if fit is not None:
            # Counted in sm_90's code: an image takes 200 instructions of every warp, and 7.4 more per score of a
            # thread, where a multiprocessor issues four; 64 bytes of keys or values arrive in a cycle meanwhile.
            tiles, seen = fit[0]
            found.append((tiles * (200 + 0.058 * own * other + seen * block_d * itemsize / 64), own, other))
    return found


def _cut_whole(kind: str, rows: Axis, columns: Axis, config: Config) -> Cut | None:
    """None where no tile fits, as with a row of a table that was tuned before blocks changed."""
    queries, keys = config.queries, config.keys
    fit = _fit(kind, rows, columns, *((keys, queries) if kind == "backward_key_whole" else (queries, keys)))
    return None if fit is None else _of_tile(rows, columns, fit[1], config)


def _of_tile(rows: Axis, columns: Axis, tile: tuple[int, int], config: Config) -> Cut:
    tiles = math.ceil(rows.members[0] / tile[0]), math.ceil(columns.members[0] / tile[1])
    return Cut(tile, tiles, config)


@functools.lru_cache(maxsize=2048)
def _fit(kind: str, rows: Axis, columns: Axis, own: int, other: int) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """The tile of at most `own` tokens that is cheapest, if it and the `other` tokens it meets fit: least tiles, least
    tokens met. `((tiles, tokens met), tile)`."""
    found = []
    for count in range(1, rows.members[0] + 1):
        tile_h = math.ceil(rows.members[0] / count)
        met_h = _met(kind, rows, tile_h)
        if tile_h > own or met_h > other:
            continue
        for tile_w in range(min(own // tile_h, columns.members[0]), 0, -1):
            met_w = _met(kind, columns, tile_w)
            if met_h * met_w <= other:
                tile_w = _even(columns.members[0], tile_w)
                tiles = math.ceil(rows.members[0] / tile_h) * math.ceil(columns.members[0] / tile_w)
                found.append(((tiles, met_h * _met(kind, columns, tile_w)), (tile_h, tile_w)))
                break
        if tile_h == 1:
            break
    return min(found) if found else None


@functools.lru_cache(maxsize=2048)
def _met(kind: str, axis: Axis, tile: int) -> int:
    """Most keys that any tile of queries sees along an axis, or queries that see any tile of keys."""
    most, kernel = 0, axis.kernel
    for members in axis.members:
        for first in range(0, members, tile):
            last = min(first + tile, members) - 1
            if kind == "backward_key_whole":
                start = 0 if first < kernel else first - kernel // 2
                end = members if last >= members - kernel else last + kernel // 2 + 1
            else:
                start, end = (max(min(place - kernel // 2, members - kernel), 0) for place in (first, last))
                end = min(end + kernel, members)
            most = max(most, end - start)
    return most


def _even(members: int, tile: int) -> int:
    """The smallest tile that cuts `members` into no more tiles than `tile` does."""
    return math.ceil(members / math.ceil(members / tile))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
