"""What the Triton kernels share: where a program works, which keys a query sees, scores with bias.

A program works on one tile of one dilation group of one head. Inside a group, tokens are named by their *place*
(row, column), so that the group is an ordinary map with dilation 1: place `p` of residue class `g` is token
`g + p * dilation`. Places are vectors, shaped `[n, 1]` or `[1, n]` where two of them meet in a matrix of scores.

Vectors longer than what there is to do repeat their last valid place, so that loads need no mask and never leave the
tensor; such repeats count as unseen keys, and are not stored as queries.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridzoo.kernels.triton_common import LOG2E, UNSEEN


@triton.jit
def locate(program, heads, height, width, dilation_h, dilation_w, tiles_h, tiles_w):
    """Head, tile, residue class and the rest (image or chunk of images) of a program, and the members of its class.

    Heads come first, because the heads of a token are neighbors in memory.
    """
    head = program % heads
    program = program // heads
    tile_w = program % tiles_w
    program = program // tiles_w
    tile_h = program % tiles_h
    program = program // tiles_h
    classes_w = tl.minimum(dilation_w, width)
    classes_h = tl.minimum(dilation_h, height)
    class_w = program % classes_w
    program = program // classes_w
    class_h = program % classes_h
    rest = program // classes_h
    members_h = (height - class_h + dilation_h - 1) // dilation_h
    members_w = (width - class_w + dilation_w - 1) // dilation_w
    return head, tile_h, tile_w, class_h, class_w, rest, members_h, members_w


@triton.jit
def window_start(place, members, KERNEL: tl.constexpr):
    """First place that the query at `place` sees; the window is shifted inward at both ends."""
    return tl.maximum(tl.minimum(place - KERNEL // 2, members - KERNEL), 0)


@triton.jit
def keys_of(first, count, members, KERNEL: tl.constexpr):
    """First place and number of places seen by any of the queries `first ... first + count - 1`."""
    start = window_start(first, members, KERNEL)
    last = tl.minimum(first + count, members) - 1
    end = tl.minimum(window_start(last, members, KERNEL) + KERNEL, members)
    return start, tl.maximum(end - start, 0)


@triton.jit
def queries_of(first, count, members, KERNEL: tl.constexpr):
    """First place and number of places that see any of the keys `first ... first + count - 1`.

    The window of the first KERNEL keys is clamped for some of its queries: they see everything from place 0 on; the
    same at the other end.
    """
    start = tl.where(first < KERNEL, 0, first - KERNEL // 2)
    last = tl.minimum(first + count, members) - 1
    end = tl.where(last >= members - KERNEL, members, last + KERNEL // 2 + 1)
    return start, tl.maximum(end - start, 0)


@triton.jit
def places(first, BLOCK: tl.constexpr, start_h, start_w, extent_h, extent_w):
    """Rows and columns of the places `first ... first + BLOCK - 1` of a rectangle, row by row, and which exist."""
    index = first + tl.arange(0, BLOCK)
    count = extent_h * extent_w
    exists = index < count
    index = tl.maximum(tl.minimum(index, count - 1), 0)
    return start_h + index // tl.maximum(extent_w, 1), start_w + index % tl.maximum(extent_w, 1), exists


@triton.jit
def sees(query_h, query_w, key_h, key_w, members_h, members_w, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr):
    start_h = window_start(query_h, members_h, KERNEL_H)
    start_w = window_start(query_w, members_w, KERNEL_W)
    rows = (key_h >= start_h) & (key_h < start_h + KERNEL_H)
    return rows & (key_w >= start_w) & (key_w < start_w + KERNEL_W)


@triton.jit
def bias_of(
    rpb, query_h, query_w, key_h, key_w, seen, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, BIAS: tl.constexpr
):
    """What to add to scores in base 2: the bias between queries and keys, UNSEEN where a key is not seen."""
    if BIAS:
        columns: tl.constexpr = 2 * KERNEL_W - 1
        middle: tl.constexpr = (KERNEL_H - 1) * columns + KERNEL_W - 1
        index = (key_h * columns + key_w + middle) - (query_h * columns + query_w)
        # `other` is a float32 of the table's dtype: bfloat16 holds 1e30, float16 does not, so the choice comes after.
        bias = tl.load(rpb + index, mask=seen, other=0.0).to(tl.float32) * LOG2E
        bias = tl.where(seen, bias, UNSEEN)
    else:
        bias = tl.where(seen, 0.0, UNSEEN)
    return bias
