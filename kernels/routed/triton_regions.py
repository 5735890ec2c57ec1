"""What the routed Triton kernels share: where a program works, where the tokens of a region lie.

A program works for one head on a *tile* of the tokens of a *group*. A group is a region; in the dense form, it is the
whole map, its tokens taken region by region. A tile then goes through a *list* of regions, all of whose tokens follow
one another in blocks, however few a region has; in the dense form the list names every region once, and the log of how
often a region is really listed is added to its scores.

Vectors longer than what there is to do repeat their last token, and a token beyond the map stands for the last one of
its row or column, so that loads need no mask and never leave the tensor; neither is seen as a key or stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridzoo.kernels.triton_common import UNSEEN


@triton.jit
def locate(program, heads, tiles, groups):
    """Head, tile, group and image of a program. Heads come first: those of a token are neighbors in memory."""
    head = program % heads
    program = program // heads
    tile = program % tiles
    program = program // tiles
    return head, tile, program % groups, tl.cast(program // groups, tl.int64)


@triton.jit
def place(region, token, columns, region_h, region_w, height, width):
    """Row and column of a region's token on the map, and whether it lies there."""
    row = region // columns * region_h + token // region_w
    column = region % columns * region_w + token % region_w
    exists = (row < height) & (column < width)
    # As unsigned numbers, so that negative ones are large: whatever a route says, nothing outside the tensor is read.
    row, column = tl.minimum(row.to(tl.uint32), height - 1), tl.minimum(column.to(tl.uint32), width - 1)
    return row.to(tl.int32), column.to(tl.int32), exists


@triton.jit
def tile_of(tile, group, regions, columns, region_h, region_w, height, width, BLOCK: tl.constexpr, DENSE: tl.constexpr):
    """Regions, rows and columns of a tile's tokens, and which of them exist."""
    tokens = region_h * region_w
    index = tile * BLOCK + tl.arange(0, BLOCK)
    if DENSE:
        some = index < regions * tokens
        index = tl.minimum(index, regions * tokens - 1)
        region = index // tokens
        row, column, exists = place(region, index % tokens, columns, region_h, region_w, height, width)
    else:
        some = index < tokens
        index = tl.minimum(index, tokens - 1)
        row, column, exists = place(group, index, columns, region_h, region_w, height, width)
        region = tl.zeros([BLOCK], tl.int32) + group
    return region, row, column, some & exists


@triton.jit
def listed(
    entries, first, length, columns, region_h, region_w, height, width, BLOCK: tl.constexpr, DENSE: tl.constexpr
):
    """The same for tokens `first ... first + BLOCK - 1` of the regions that `entries`, `length` of them, points to."""
    tokens = region_h * region_w
    index = first + tl.arange(0, BLOCK)
    some = index < length * tokens
    index = tl.minimum(index, length * tokens - 1)
    region = index // tokens
    token = index % tokens
    if not DENSE:
        region = tl.load(entries + region).to(tl.int32)
    row, column, exists = place(region, token, columns, region_h, region_w, height, width)
    return region, row, column, some & exists


@triton.jit
def bias_of(counts, query_region, key_region, seen, regions, DENSE: tl.constexpr):
    """What to add to scores in base 2: how often the query's region lists the key's, UNSEEN where a key is not."""
    if DENSE:
        bias = tl.where(seen, tl.load(counts + query_region * regions + key_region), UNSEEN)
    else:
        bias = tl.where(seen, 0.0, UNSEEN)
    return bias


@triton.jit
def fill_of(fill, head, heads, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Key and value, `[1, BLOCK_D]` in float32, of the tokens beyond the map."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    key = tl.load(fill + head * HEAD_DIM + channel, mask=channel < HEAD_DIM, other=0.0)
    value = tl.load(fill + (heads + head) * HEAD_DIM + channel, mask=channel < HEAD_DIM, other=0.0)
    return key.to(tl.float32), value.to(tl.float32)


@triton.jit(do_not_specialize=["regions", "topk"])
def count_routes(routes, counts, regions, topk, BLOCK: tl.constexpr):
    """For one query region, the binary log of how often it lists every region, UNSEEN for never."""
    first = tl.cast(tl.program_id(0), tl.int64)
    number = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.float32)
    for slot in range(topk):
        count += tl.where(tl.load(routes + first * topk + slot) == number, 1.0, 0.0)
    tl.store(
        counts + first * regions + number,
        tl.where(count > 0, tl.log2(tl.maximum(count, 1.0)), UNSEEN),
        mask=number < regions,
    )
