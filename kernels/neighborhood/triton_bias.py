"""Gradient of the relative position bias in Triton.

The gradient of an entry is the sum of d(scores) over all pairs of query and key that lie that far apart, in every image
and every dilation group. Which pairs these are depends on the tile alone, so d(scores) is first summed over images, in
registers, and then picked out of that sum once per entry. Each program writes a table of its own, and PyTorch adds the
tables in a fixed order: no atomics, and nothing the size of the scores is stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridzoo.kernels.neighborhood.triton_forward import SIZES
from hybridzoo.kernels.neighborhood.triton_windows import bias_of, keys_of, locate, places, sees
from hybridzoo.kernels.triton_common import LOG2E, load_tokens


@triton.jit
def add_by_offset(
    table, dscores, query_h, query_w, exists, first, start_h, start_w, extent_h, extent_w,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
):  # fmt: skip
    """Add `dscores [queries, keys]` to `table [rows, columns]`, which flattens the bias table and pads its end.

    Keys are those of `places(first, ..., start_h, start_w, extent_h, extent_w)`. For every entry of the table each
    query has at most one key; pick it, and sum over queries.
    """
    rows: tl.constexpr = table.shape[0]
    columns: tl.constexpr = table.shape[1]
    width: tl.constexpr = 2 * KERNEL_W - 1
    size: tl.constexpr = (2 * KERNEL_H - 1) * width
    for row in range((size + columns - 1) // columns):
        entry = row * columns + tl.arange(0, columns)
        h = query_h[:, None] + (entry // width - (KERNEL_H - 1))[None, :] - start_h
        w = query_w[:, None] + (entry % width - (KERNEL_W - 1))[None, :] - start_w
        index = h * extent_w + w - first
        hit = exists[:, None] & (h >= 0) & (h < extent_h) & (w >= 0) & (w < extent_w)
        hit = hit & (index >= 0) & (index < dscores.shape[1]) & (entry < size)[None, :]
        picked = tl.gather(dscores, tl.where(hit, index, 0), 1)
        total = tl.sum(tl.where(hit, picked, 0.0), 0)
        table += tl.where(tl.arange(0, rows)[:, None] == row, total[None, :], 0.0)
    return table


@triton.jit
def store_table(partial, table, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr):
    size: tl.constexpr = (2 * KERNEL_H - 1) * (2 * KERNEL_W - 1)
    entry = tl.arange(0, table.shape[0])[:, None] * table.shape[1] + tl.arange(0, table.shape[1])[None, :]
    tl.store(partial + tl.program_id(0).to(tl.int64) * size + entry, table, mask=entry < size)


@triton.jit(do_not_specialize=[*SIZES, "images"])
def backward_bias(
    grad, query, key, value, rpb, lse, delta, partial, scale, batch, heads, height, width, dilation_h, dilation_w,
    images, tile_h, tile_w, tiles_h, tiles_w, stride_b, stride_h, stride_w, stride_n,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the bias from a tile of queries of `images` images."""
    head, at_h, at_w, class_h, class_w, chunk, members_h, members_w = locate(
        tl.program_id(0), heads, height, width, dilation_h, dilation_w, tiles_h, tiles_w
    )
    first_h, first_w = at_h * tile_h, at_w * tile_w
    size_h, size_w = tl.minimum(tile_h, members_h - first_h), tl.minimum(tile_w, members_w - first_w)
    query_h, query_w, exists = places(0, QUERIES, first_h, first_w, size_h, size_w)
    start_h, extent_h = keys_of(first_h, size_h, members_h, KERNEL_H)
    start_w, extent_w = keys_of(first_w, size_w, members_w, KERNEL_W)
    # No early return: an empty tile has a table of zeros to write.
    extent_h = tl.where((size_h > 0) & (size_w > 0), extent_h, 0)
    rpb += head * (2 * KERNEL_H - 1) * (2 * KERNEL_W - 1)
    row, column = class_h + query_h * dilation_h, class_w + query_w * dilation_w
    pixels = (row * width + column) * heads + head

    table = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, extent_h * extent_w, KEYS):
        key_h, key_w, some = places(first, KEYS, start_h, start_w, extent_h, extent_w)
        offsets = (class_h + key_h * dilation_h) * stride_h + (class_w + key_w * dilation_w) * stride_w
        seen = some[None, :] & sees(
            query_h[:, None], query_w[:, None], key_h[None, :], key_w[None, :],
            members_h, members_w, KERNEL_H, KERNEL_W,
        )  # fmt: skip
        bias = bias_of(
            rpb, query_h[:, None], query_w[:, None], key_h[None, :], key_w[None, :], seen, KERNEL_H, KERNEL_W, True
        )
        total = tl.zeros([QUERIES, KEYS], tl.float32)
        for image in range(chunk * images, tl.minimum((chunk + 1) * images, batch)):
            start = tl.cast(image, tl.int64) * stride_b + head * stride_n
            first_pixel = tl.cast(image, tl.int64) * height * width * heads
            q = load_tokens(query + start, row * stride_h + column * stride_w, HEAD_DIM, BLOCK_D)
            g = load_tokens(grad + first_pixel * HEAD_DIM, pixels * HEAD_DIM, HEAD_DIM, BLOCK_D)
            k = load_tokens(key + start, offsets, HEAD_DIM, BLOCK_D)
            v = load_tokens(value + start, offsets, HEAD_DIM, BLOCK_D)
            norm = tl.load(lse + first_pixel + pixels) * LOG2E
            d = tl.load(delta + first_pixel + pixels)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E) + bias
            weights = tl.exp2(scores - norm[:, None])
            total += weights * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - d[:, None])
        table = add_by_offset(
            table, total, query_h, query_w, exists, first, start_h, start_w, extent_h, extent_w, KERNEL_H, KERNEL_W
        )
    store_table(partial, table, KERNEL_H, KERNEL_W)
