"""Neighborhood attention forward in Triton: a dense kernel for small groups, a tiled one for everything else.

Both write the result and the log-sum-exp of every query's scores, which the backward pass needs to recompute the
weights. Scores live in registers only. See `triton_windows` for the words used here.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridzoo.kernels.neighborhood.triton_windows import bias_of, keys_of, locate, places, sees
from hybridzoo.kernels.triton_common import LOG2E, load_tokens, store_tokens

# Sizes differ between images of a multi-scale training run; a kernel compiled for each would never be reused.
SIZES = ["batch", "heads", "height", "width", "dilation_h", "dilation_w", "tile_h", "tile_w", "tiles_h", "tiles_w"]


@triton.jit(do_not_specialize=[*SIZES[:6], "images"])
def forward_dense(
    query, key, value, rpb, out, lse, scale, batch, heads, height, width, dilation_h, dilation_w, images,
    stride_b, stride_h, stride_w, stride_n,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    TOKENS: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Groups of at most TOKENS tokens, all of which see each other: one program takes a group of `images` images.

    The bias depends on the places only, so it is gathered once for all these images.
    """
    head, _, _, class_h, class_w, chunk, members_h, members_w = locate(
        tl.program_id(0), heads, height, width, dilation_h, dilation_w, 1, 1
    )
    h, w, exists = places(0, TOKENS, 0, 0, members_h, members_w)
    seen = exists[:, None] & exists[None, :]
    bias = bias_of(
        rpb + head * (2 * KERNEL_H - 1) * (2 * KERNEL_W - 1),
        h[:, None], w[:, None], h[None, :], w[None, :], seen, KERNEL_H, KERNEL_W, BIAS,
    )  # fmt: skip
    row, column = class_h + h * dilation_h, class_w + w * dilation_w
    offsets = row * stride_h + column * stride_w
    pixels = (row * width + column) * heads + head  # into contiguous (height, width, heads)
    for image in range(chunk * images, tl.minimum((chunk + 1) * images, batch)):
        start = tl.cast(image, tl.int64) * stride_b + head * stride_n
        q = load_tokens(query + start, offsets, HEAD_DIM, BLOCK_D)
        k = load_tokens(key + start, offsets, HEAD_DIM, BLOCK_D)
        v = load_tokens(value + start, offsets, HEAD_DIM, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E) + bias
        largest = tl.max(scores, 1)
        weights = tl.exp2(scores - largest[:, None])
        total = tl.sum(weights, 1)
        result = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION) / total[:, None]
        first = tl.cast(image, tl.int64) * height * width * heads
        store_tokens(out + first * HEAD_DIM, pixels * HEAD_DIM, exists, result, HEAD_DIM, BLOCK_D)
        tl.store(lse + first + pixels, (largest + tl.log2(total)) / LOG2E, mask=exists)


@triton.jit(do_not_specialize=SIZES)
def forward_tiled(
    query, key, value, rpb, out, lse, scale, heads, height, width, dilation_h, dilation_w,
    tile_h, tile_w, tiles_h, tiles_w, stride_b, stride_h, stride_w, stride_n,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile of tile_h x tile_w <= QUERIES queries against the keys any of them sees, KEYS at a time."""
    head, at_h, at_w, class_h, class_w, image, members_h, members_w = locate(
        tl.program_id(0), heads, height, width, dilation_h, dilation_w, tiles_h, tiles_w
    )
    first_h, first_w = at_h * tile_h, at_w * tile_w
    size_h, size_w = tl.minimum(tile_h, members_h - first_h), tl.minimum(tile_w, members_w - first_w)
    if (size_h <= 0) | (size_w <= 0):  # a class may be one member short of its last tile
        return
    query_h, query_w, exists = places(0, QUERIES, first_h, first_w, size_h, size_w)
    start_h, extent_h = keys_of(first_h, size_h, members_h, KERNEL_H)
    start_w, extent_w = keys_of(first_w, size_w, members_w, KERNEL_W)
    rpb += head * (2 * KERNEL_H - 1) * (2 * KERNEL_W - 1)

    start = tl.cast(image, tl.int64) * stride_b + head * stride_n
    row, column = class_h + query_h * dilation_h, class_w + query_w * dilation_w
    pixels = (row * width + column) * heads + head
    q = load_tokens(query + start, row * stride_h + column * stride_w, HEAD_DIM, BLOCK_D)

    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    result = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    for first in range(0, extent_h * extent_w, KEYS):
        key_h, key_w, some = places(first, KEYS, start_h, start_w, extent_h, extent_w)
        offsets = (class_h + key_h * dilation_h) * stride_h + (class_w + key_w * dilation_w) * stride_w
        k = load_tokens(key + start, offsets, HEAD_DIM, BLOCK_D)
        v = load_tokens(value + start, offsets, HEAD_DIM, BLOCK_D)
        seen = some[None, :] & sees(
            query_h[:, None], query_w[:, None], key_h[None, :], key_w[None, :],
            members_h, members_w, KERNEL_H, KERNEL_W,
        )  # fmt: skip
        bias = bias_of(
            rpb, query_h[:, None], query_w[:, None], key_h[None, :], key_w[None, :], seen, KERNEL_H, KERNEL_W, BIAS
        )
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E) + bias
        # A row that has seen no key yet holds equal weights for UNSEEN ones; the first seen key scales them to 0.
        larger = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp2(largest - larger)
        weights = tl.exp2(scores - larger[:, None])
        total = total * shrink + tl.sum(weights, 1)
        result = tl.dot(weights.to(v.dtype), v, result * shrink[:, None], input_precision=PRECISION)
        largest = larger

    first_pixel = tl.cast(image, tl.int64) * height * width * heads
    result = result / total[:, None]
    store_tokens(out + first_pixel * HEAD_DIM, pixels * HEAD_DIM, exists, result, HEAD_DIM, BLOCK_D)
    tl.store(lse + first_pixel + pixels, (largest + tl.log2(total)) / LOG2E, mask=exists)
