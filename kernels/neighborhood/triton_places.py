"""Neighborhood attention in Triton: tiles, the keys they see, and the bias, for the kernels of all operators here.

A program processes one tile of one dilation group of one head. Inside a group, tokens are identified by their *place*
(row, column), so that the group is an ordinary map with dilation 1: place `p` of residue class `g` is token
`g + p * dilation`. Places are vectors; for a matrix of scores they get the shapes `[n, 1]` and `[1, n]`. A vector that
is longer than needed repeats its last valid place, so that loads need no mask and never leave the tensor. Such repeats
count as keys that are not seen, and are not stored as queries.

There are no atomics: one program computes each sum, in a fixed order. For the gradient of the bias, each program writes
its own table, and PyTorch adds the tables. The backward pass recomputes the weights from the log-sum-exp that the
forward pass keeps; nothing of the size of the scores is stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridzoo.kernels.triton_common import LOG2E, UNSEEN

# Sizes change in multi-scale training, so the kernels are not compiled again for each of them.
SIZES = [
    "batch", "heads", "height", "width", "dilation_h", "dilation_w", "images", "tiles_h", "tiles_w",
]  # fmt: skip


@triton.jit
def locate(program, heads, height, width, dilation_h, dilation_w, tiles_h, tiles_w):
    """Head, tile (first place and size), residue class, image (or chunk of images), and members of the class.

    Heads vary fastest, because the heads of a token are neighbors in memory. The sizes of tiles differ by at most one:
    at both ends, where windows are shifted inward, smaller tiles meet as many tokens as larger ones in the middle.
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
    first_h, first_w = tile_h * members_h // tiles_h, tile_w * members_w // tiles_w
    size_h, size_w = (tile_h + 1) * members_h // tiles_h - first_h, (tile_w + 1) * members_w // tiles_w - first_w
    return head, first_h, first_w, size_h, size_w, class_h, class_w, rest, members_h, members_w


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

    The first KERNEL keys are also seen by queries whose window is shifted inward, from place 0 on. The same holds at
    the other end.
    """
    start = tl.where(first < KERNEL, 0, first - KERNEL // 2)
    last = tl.minimum(first + count, members) - 1
    end = tl.where(last >= members - KERNEL, members, last + KERNEL // 2 + 1)
    return start, tl.maximum(end - start, 0)


@triton.jit
def places(first, BLOCK: tl.constexpr, start_h, start_w, extent_h, extent_w):
    """Rows and columns of the places `first ... first + BLOCK - 1` of a rectangle, and which of them exist."""
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
    """The summand for scores in base 2: the bias between queries and keys, or UNSEEN if a key is not seen."""
    if BIAS:
        columns: tl.constexpr = 2 * KERNEL_W - 1
        middle: tl.constexpr = (KERNEL_H - 1) * columns + KERNEL_W - 1
        index = (key_h * columns + key_w + middle) - (query_h * columns + query_w)
        # `other` is rounded to the table's dtype, and float16 cannot hold 1e30. So UNSEEN is set after the load.
        bias = tl.load(rpb + index, mask=seen, other=0.0).to(tl.float32) * LOG2E
        bias = tl.where(seen, bias, UNSEEN)
    else:
        bias = tl.where(seen, 0.0, UNSEEN)
    return bias


@triton.jit
def sum_by_offset(
    entry, dscores, query_h, query_w, exists, first, start_h, start_w, extent_h, extent_w,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
):  # fmt: skip
    """Sums of `dscores [queries, keys]` for entries `[n]` of the flattened bias table; 0 beyond its end.

    Keys are those of `places(first, ..., start_h, start_w, extent_h, extent_w)`. For an entry of the table, each query
    has at most one key; it is picked and summed over queries.
    """
    width: tl.constexpr = 2 * KERNEL_W - 1
    size: tl.constexpr = (2 * KERNEL_H - 1) * width
    h = query_h[:, None] + (entry // width - (KERNEL_H - 1))[None, :] - start_h
    w = query_w[:, None] + (entry % width - (KERNEL_W - 1))[None, :] - start_w
    index = h * extent_w + w - first
    hit = exists[:, None] & (h >= 0) & (h < extent_h) & (w >= 0) & (w < extent_w)
    hit = hit & (index >= 0) & (index < dscores.shape[1]) & (entry < size)[None, :]
    picked = tl.gather(dscores, tl.where(hit, index, 0), 1)
    return tl.sum(tl.where(hit, picked, 0.0), 0)
