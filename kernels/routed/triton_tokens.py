"""Routed attention in Triton: functions of all kernels, for the tokens of regions and those beyond the map.

A vector that is longer than needed repeats its last token, and a token beyond the map is replaced by the last one of
its row or column, so that loads need no mask and never leave the tensor. Such tokens are not seen as keys, and not
stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridzoo.kernels.triton_common import LOG2E

# Sizes change in multi-scale training, so the kernels are not compiled again for each of them.
SIZES = ["heads", "height", "width", "regions", "columns", "region_h", "region_w", "topk", "tiles"]


@triton.jit
def place(region, token, columns, region_h, region_w, height, width):
    """Row and column of a region's token, and whether it lies on the map."""
    row = region // columns * region_h + token // region_w
    column = region % columns * region_w + token % region_w
    return on_map(row, column, height, width)


@triton.jit
def on_map(row, column, height, width):
    """The position on the map that is nearest to a row and a column, and whether it is they."""
    exists = (row < height) & (column < width)
    # As unsigned numbers, negative ones are large. So no route, valid or not, can cause a read outside of the tensor.
    row, column = tl.minimum(row.to(tl.uint32), height - 1), tl.minimum(column.to(tl.uint32), width - 1)
    return row.to(tl.int32), column.to(tl.int32), exists


@triton.jit
def locate(program, heads, tiles, regions):
    """Head, tile, region and image of a program. Heads vary fastest: those of a token are neighbors in memory."""
    head = program % heads
    program = program // heads
    tile = program % tiles
    program = program // tiles
    return head, tile, program % regions, tl.cast(program // regions, tl.int64)


@triton.jit
def tile_of(tile, region, columns, region_h, region_w, height, width, BLOCK: tl.constexpr):
    """Rows and columns of the tokens of a region's tile, and which of them exist."""
    index = tile * BLOCK + tl.arange(0, BLOCK)
    some = index < region_h * region_w
    index = tl.minimum(index, region_h * region_w - 1)
    row, column, exists = place(region, index, columns, region_h, region_w, height, width)
    return row, column, some & exists


@triton.jit
def oriented(q, scale, NEGATIVE: tl.constexpr):
    """Queries, and the positive factor that converts their dot products to scores in base 2.

    The maximum is taken over dot products, so queries are negated if the scale is NEGATIVE. The factor is not 0,
    because 0 * infinity is NaN.
    """
    if NEGATIVE:
        q = -q
    return q, tl.maximum(tl.abs(scale) * LOG2E, 1e-30)


@triton.jit
def beyond_of(region, columns, region_h, region_w, height, width):
    """How many tokens of a region lie beyond the map."""
    rows = tl.minimum(tl.maximum(height - region // columns * region_h, 0), region_h)
    across = tl.minimum(tl.maximum(width - region % columns * region_w, 0), region_w)
    return (region_h * region_w - rows * across).to(tl.float32)


@triton.jit
def fill_of(fill, head, heads, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Key and value, `[1, BLOCK_D]` in float32, of the tokens beyond the map."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    key = tl.load(fill + head * HEAD_DIM + channel, mask=channel < HEAD_DIM, other=0.0)
    value = tl.load(fill + (heads + head) * HEAD_DIM + channel, mask=channel < HEAD_DIM, other=0.0)
    return key.to(tl.float32), value.to(tl.float32)


@triton.jit
def backward_fill(q, g, norm, d, number, fill, head, heads, scale, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Gradients from the `number` tokens beyond the map that queries see: of the queries, and of fill."""
    fill_key, fill_value = fill_of(fill, head, heads, HEAD_DIM, BLOCK_D)
    score = tl.sum(q.to(tl.float32) * fill_key, 1) * (scale * LOG2E)
    weight = number * tl.exp2(tl.where(number > 0, score - norm, 0.0))  # avoids an overflow if `number` is 0
    dscore = weight * (tl.sum(g.to(tl.float32) * fill_value, 1) - d)
    dfill_key = tl.sum(dscore[:, None] * q.to(tl.float32), 0) * scale
    return dscore[:, None] * fill_key, dfill_key, tl.sum(weight[:, None] * g.to(tl.float32), 0)


@triton.jit
def store_partial(partial, dfill_key, dfill_value, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store a program's part of the gradient of fill."""
    partial += tl.cast(tl.program_id(0), tl.int64) * 2 * HEAD_DIM
    channel = tl.arange(0, BLOCK_D)
    tl.store(partial + channel, dfill_key, mask=channel < HEAD_DIM)
    tl.store(partial + HEAD_DIM + channel, dfill_value, mask=channel < HEAD_DIM)
