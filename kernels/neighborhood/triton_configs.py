"""Block sizes, warps and pipeline stages of the Triton kernels, and how a map is cut into tiles for them.

A block of scores is `QUERIES x KEYS`. The "whole" kernels hold one block of a tile: all its queries and all keys that
any of them sees (for the gradients of keys: all its keys and all queries that see any of them). The size of that block
depends on the map, so a rule computes it. The other kernels loop over blocks of keys; their sizes are in a table.
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

OWN, OTHER = (16, 64), (16, 32, 64, 128, 256)  # sides of a whole kernel's block; Hopper multiplies 64 rows at a time
# The largest blocks (own side, scores) that stayed in registers, for each padded head_dim.
HELD = {
    "forward_whole": {16: (64, 8192), 32: (64, 8192), 64: (64, 4096), 128: (64, 4096)},
    "backward_query_whole": {32: (64, 4096), 64: (16, 2048)},
    "backward_key_whole": {16: (64, 4096), 32: (64, 4096), 64: (64, 4096)},
}
# Registers of a thread in the code for sm_90, by kernel and own side: a base, and more for each score that it holds.
REGISTERS = {
    ("forward_whole", 16): (56.0, 3.4),
    ("forward_whole", 64): (19.0, 3.4),
    ("backward_key_whole", 16): (50.0, 5.1),
}
# Limits that a tuning run tries, by kernel and warps, in registers of a thread: more programs at a time for some values
# that the compiler spills (none to 24 bytes; 72 in the third).
FEWER = {
    ("forward_whole", 1): 184, ("forward_whole", 2): 128, ("backward_query_whole", 2): 200,
    ("backward_query_whole", 4): 128, ("backward_key_whole", 2): 168, ("backward_key_whole", 4): 128,
    ("backward_dense", 4): 168,
}  # fmt: skip
# Registers of a thread for blocks (kernel, own side, other side, padded head_dim, bytes) of which the compiler spills
# some without a number. With 200 in the second, a multiprocessor runs five programs instead of four.
GIVEN = {
    ("forward_whole", 64, 64, 16, 4): 168,
    ("backward_key_whole", 16, 128, 32, 2): 200,
    ("backward_dense", 32, 32, 128, 2): 192,
}
MAX_OTHER = {"forward_whole": 256, "backward_query_whole": 128, "backward_key_whole": 128}
MAX_SHARED = 65536  # bytes, in one stage, of the two maps that a program reads most from
DENSE_MAX_BYTES = 8192  # size of a block of float32 tokens, which stays in registers (no tensor cores in float32)

# Chosen from the compiler's reports (registers, shared memory). No shape that was measured on a GPU uses these kernels.
# A number of registers is given where the compiler spilled without one.
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
    ("backward_bias", 16, 2): Config(32, 32, 4, 2, 176),
    ("backward_bias", 32, 2): Config(64, 32, 4, 2),
    ("backward_bias", 64, 2): Config(32, 16, 4, 2),
    ("backward_bias", 128, 2): Config(16, 32, 4, 1),
    ("forward_tiled", 16, 4): Config(32, 32, 4, 2, 208),
    ("forward_tiled", 32, 4): Config(32, 32, 4, 2, 128),
    ("forward_tiled", 64, 4): Config(32, 32, 4, 2, 192),
    ("forward_tiled", 128, 4): Config(32, 16, 8, 1, 96),
    ("backward_query", 32, 4): Config(32, 16, 4, 1, 144),
    ("backward_query", 64, 4): Config(32, 16, 4, 1),
    ("backward_query", 128, 4): Config(16, 16, 8, 1),
    ("backward_key", 16, 4): Config(32, 32, 4, 1, 144),
    ("backward_key", 32, 4): Config(32, 32, 4, 1),
    ("backward_key", 64, 4): Config(16, 32, 4, 1),
    ("backward_key", 128, 4): Config(16, 32, 8, 1),
    ("backward_bias", 16, 4): Config(32, 32, 4, 1, 224),
    ("backward_bias", 32, 4): Config(32, 32, 4, 1),
    ("backward_bias", 64, 4): Config(32, 32, 4, 1),
    ("backward_bias", 128, 4): Config(32, 16, 8, 1),
}


class Axis(NamedTuple):
    """One axis of a map: the one or two sizes of its dilation groups, and the window."""

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
    """How the whole kernel `kind` cuts a map into tiles; None if none of its blocks can hold a tile."""
    if kind == "backward_dense" and not _holds_all(rows, columns, block_d, itemsize, capability(device)):
        return None
    default = _whole_block(kind, rows, columns, block_d, itemsize)
    if default is None:
        return None
    config = tuning.pick({(kind, block_d, itemsize): default}, _key(kind, rows, columns, block_d, itemsize), device)
    cut = _cut_whole(kind, rows, columns, config) or _cut_whole(kind, rows, columns, default)
    assert cut is not None  # the default was chosen for this map
    return cut


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU; for other devices that of the H100, for which the defaults were chosen."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def _holds_all(rows: Axis, columns: Axis, block_d: int, itemsize: int, chip: tuple[int, int]) -> bool:
    """Whether one kernel has enough registers for all gradients of a dense group.

    For 64 tokens this needs compute capability 9.0, whose tensor cores read shared memory.
    """
    tokens = rows.members[0] * columns.members[0]
    if itemsize == 4:
        return tokens <= 32 or block_d == 16
    return tokens <= 32 or (block_d == 32 and chip >= (9, 0))


def at_a_time(kind: str, cut: Cut, block_d: int, itemsize: int) -> int:
    """About how many programs of a whole kernel a multiprocessor runs at a time, given registers and shared memory."""
    config = cut.config
    own, other = sorted((config.queries, config.keys))
    base, each = REGISTERS.get((kind, own), (100.0, 4.0))
    registers = min(config.registers or 255, base + each * own * other / (32 * config.warps))
    buffers = config.stages - (own == 16)
    shared = 5120 + buffers * (own + 2 * other) * block_d * itemsize
    return max(1, min(int(65536 / (32 * config.warps * registers)), 227 * 1024 // shared))


def tiled(kind: str, rows: Axis, columns: Axis, block_d: int, itemsize: int, device: torch.device) -> Cut:
    """How the kernel `kind`, which loops over blocks of the other side, cuts a map into tiles."""
    config = tuning.pick(TABLE, _key(kind, rows, columns, block_d, itemsize), device)
    return square(rows, columns, config.keys if kind == "backward_key" else config.queries, config)


def square(rows: Axis, columns: Axis, block: int, config: Config) -> Cut:
    """Cut a map into nearly square, nearly equal tiles of at most `block` tokens."""
    side = 1 << ((block.bit_length() - 1) // 2)
    tiles_h = math.ceil(rows.members[0] / side)
    tile_h = math.ceil(rows.members[0] / tiles_h)
    return _of_tiles(rows, columns, (tiles_h, math.ceil(columns.members[0] / (block // tile_h))), config)


def candidates(key: Key, default: Config) -> list[Config]:
    """Configurations that a tuning run tries for `key` besides `default`: other warps and stages, then other blocks.

    Few warps exchange less data, many warps hide more latency. On an H100, three stages were best everywhere.
    """
    if key.kernel not in WHOLE:
        return tuning.candidates(default)
    groups, windows = key.shape.split(", kernel ")
    members = (tuple(map(int, side.split("+"))) for side in groups.split(" x "))
    rows, columns = itertools.starmap(Axis, zip(members, map(int, windows.split(" x ")), strict=True))
    sides = (*OWN, 32) if key.kernel == "forward_whole" else OWN  # 32 needs too many registers to be a default
    blocks = sorted(_blocks(key.kernel, rows, columns, key.block_d, key.itemsize, sides))
    blocks = [block for block in blocks if block[0] <= 1.7 * blocks[0][0]]
    blocks.sort(key=lambda block: {block[1], block[2]} != {default.queries, default.keys})
    found = []
    for warps, stages in ((2, 3), (1, 3), (4, 3), (2, 2), (4, 2), (1, 2), (8, 2), (4, 1), (2, 1)):
        for order, (_, own, other) in enumerate(blocks[:3]):
            queries, keys = (other, own) if key.kernel == "backward_key_whole" else (own, other)
            # A warp multiplies 16 rows. In a backward pass, 64 scores per thread need too many registers.
            most = 64 if key.kernel == "forward_whole" or own == 64 else 32
            if warps <= max(4, own // 16) and own // 16 <= 2 * warps and own * other / (32 * warps) <= most:
                fewer = FEWER.get((key.kernel, warps)) if stages == 3 and order == 0 else None
                found += [
                    (order * 3, Config(queries, keys, warps, stages, limit)) for limit in dict.fromkeys((None, fewer))
                ]
    by_worth = sorted(enumerate(found), key=lambda pair: pair[0] + pair[1][0])
    return [config for _, (_, config) in by_worth if config != default]


def _key(kind: str, rows: Axis, columns: Axis, block_d: int, itemsize: int) -> Key:
    sides = "+".join(map(str, rows.members)), "+".join(map(str, columns.members))
    return Key("na2d", kind, block_d, itemsize, f"{sides[0]} x {sides[1]}, kernel {rows.kernel} x {columns.kernel}")


def _whole_block(kind: str, rows: Axis, columns: Axis, block_d: int, itemsize: int) -> Config | None:
    """The block with the lowest estimated cost of computing and loading, and enough warps for its registers."""
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
    return Config(queries, keys, warps, stages, GIVEN.get((kind, own, other, block_d, itemsize)))


def _blocks(
    kind: str, rows: Axis, columns: Axis, block_d: int, itemsize: int, sides: tuple[int, ...] | None = None
) -> list[tuple[float, int, int]]:
    """`(cost, own side, other side)` of the blocks that can hold a tile.

    The cost is an estimate in cycles of a multiprocessor for one image.
    """
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
            # Counted in the code for sm_90: every warp executes 200 instructions per image, and 7.4 per score of a
            # thread. A multiprocessor issues four instructions in a cycle and receives 64 bytes of keys or values.
            tiles, seen = fit[0]
            found.append((tiles * (200 + 0.058 * own * other + seen * block_d * itemsize / 64), own, other))
    return found


def _cut_whole(kind: str, rows: Axis, columns: Axis, config: Config) -> Cut | None:
    """None if no tile fits, for example with a tuned row that is older than the current blocks."""
    queries, keys = config.queries, config.keys
    fit = _fit(kind, rows, columns, *((keys, queries) if kind == "backward_key_whole" else (queries, keys)))
    return None if fit is None else _of_tiles(rows, columns, fit[1], config)


def _of_tiles(rows: Axis, columns: Axis, tiles: tuple[int, int], config: Config) -> Cut:
    tile = math.ceil(rows.members[0] / tiles[0]), math.ceil(columns.members[0] / tiles[1])
    return Cut(tile, tiles, config)


@functools.lru_cache(maxsize=2048)
def _fit(kind: str, rows: Axis, columns: Axis, own: int, other: int) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """The best cut into tiles of at most `own` tokens that meet at most `other`: `((tiles, tokens met), tiles of both
    axes)`.

    Best: the fewest tiles, then the fewest tokens met. None if no tile fits.
    """
    found = []
    for tile_h in range(min(own, rows.members[0]), 0, -1):
        tiles_h = math.ceil(rows.members[0] / tile_h)
        met_h = _met(kind, rows, tiles_h)
        if met_h > other:
            continue
        for tile_w in range(min(own // tile_h, columns.members[0]), 0, -1):
            tiles_w = math.ceil(columns.members[0] / tile_w)
            met = met_h * _met(kind, columns, tiles_w)
            if met <= other:
                found.append(((tiles_h * tiles_w, met), (tiles_h, tiles_w)))
                break
    return min(found) if found else None


@functools.lru_cache(maxsize=2048)
def _met(kind: str, axis: Axis, tiles: int) -> int:
    """Along an axis, the largest number of keys that a tile of queries sees (or of queries that see a tile of keys)."""
    most, kernel = 0, axis.kernel
    for members in axis.members:
        for tile in range(tiles):
            first, last = tile * members // tiles, (tile + 1) * members // tiles - 1
            if kind == "backward_key_whole":
                start = 0 if first < kernel else first - kernel // 2
                end = members if last >= members - kernel else last + kernel // 2 + 1
            else:
                start, end = (max(min(place - kernel // 2, members - kernel), 0) for place in (first, last))
                end = min(end + kernel, members)
            most = max(most, end - start)
    return most


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
