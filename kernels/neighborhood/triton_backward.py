"""Gradients of neighborhood attention in Triton. No atomics: every sum is taken by one program, in a fixed order.

Weights are recomputed from the log-sum-exp that the forward pass kept. Small groups take one kernel for queries, keys
and values; the others take a pass by tiles of queries, and one by tiles of keys over the queries that see them. The
bias takes a kernel of its own in both cases: a sum of d(scores) beside all the rest does not fit into registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridzoo.kernels.neighborhood.triton_forward import SIZES
from hybridzoo.kernels.neighborhood.triton_windows import bias_of, keys_of, locate, places, queries_of, sees
from hybridzoo.kernels.triton_common import LOG2E, load_tokens, store_tokens


@triton.jit
def delta_of(g, o, grad_lse, GRAD_LSE: tl.constexpr):
    """What d(scores) = weights * (d(weights) - delta) subtracts: sum(grad * out) of every query, less the gradient of
    its log-sum-exp where something depends on that."""
    delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    if GRAD_LSE:
        delta -= tl.load(grad_lse)
    return delta


@triton.jit(do_not_specialize=[*SIZES[:6], "images"])
def backward_dense(
    grad, grad_lse, query, key, value, rpb, out, lse, dquery, dkey, dvalue, delta, scale,
    batch, heads, height, width, dilation_h, dilation_w, images, stride_b, stride_h, stride_w, stride_n,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    TOKENS: tl.constexpr, BIAS: tl.constexpr, GRAD_LSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All but the bias for groups of at most TOKENS tokens; a program takes a group of `images` images.

    Leaves `delta` (see `delta_of`) of every query for the bias.
    """
    head, _, _, class_h, class_w, chunk, members_h, members_w = locate(
        tl.program_id(0), heads, height, width, dilation_h, dilation_w, 1, 1
    )
    h, w, exists = places(0, TOKENS, 0, 0, members_h, members_w)
    seen = exists[:, None] & exists[None, :]  # repeats are no queries here: they would reach dkey and dvalue
    bias = bias_of(
        rpb + head * (2 * KERNEL_H - 1) * (2 * KERNEL_W - 1),
        h[:, None], w[:, None], h[None, :], w[None, :], seen, KERNEL_H, KERNEL_W, BIAS,
    )  # fmt: skip
    row, column = class_h + h * dilation_h, class_w + w * dilation_w
    offsets = row * stride_h + column * stride_w
    pixels = (row * width + column) * heads + head
    for image in range(chunk * images, tl.minimum((chunk + 1) * images, batch)):
        start = tl.cast(image, tl.int64) * stride_b + head * stride_n
        first = tl.cast(image, tl.int64) * height * width * heads
        q = load_tokens(query + start, offsets, HEAD_DIM, BLOCK_D)
        k = load_tokens(key + start, offsets, HEAD_DIM, BLOCK_D)
        v = load_tokens(value + start, offsets, HEAD_DIM, BLOCK_D)
        g = load_tokens(grad + first * HEAD_DIM, pixels * HEAD_DIM, HEAD_DIM, BLOCK_D)
        o = load_tokens(out + first * HEAD_DIM, pixels * HEAD_DIM, HEAD_DIM, BLOCK_D)
        norm = tl.load(lse + first + pixels) * LOG2E
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E) + bias
        weights = tl.exp2(scores - norm[:, None])
        d = delta_of(g, o, grad_lse + first + pixels, GRAD_LSE)
        tl.store(delta + first + pixels, d, mask=exists)
        dscores = (weights * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - d[:, None])).to(q.dtype)
        dv = tl.dot(tl.trans(weights.to(g.dtype)), g, input_precision=PRECISION)
        dk = tl.dot(tl.trans(dscores), q, input_precision=PRECISION) * scale
        dq = tl.dot(dscores, k, input_precision=PRECISION) * scale
        store_tokens(dvalue + first * HEAD_DIM, pixels * HEAD_DIM, exists, dv, HEAD_DIM, BLOCK_D)
        store_tokens(dkey + first * HEAD_DIM, pixels * HEAD_DIM, exists, dk, HEAD_DIM, BLOCK_D)
        store_tokens(dquery + first * HEAD_DIM, pixels * HEAD_DIM, exists, dq, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def backward_query(
    grad, grad_lse, query, key, value, rpb, out, lse, dquery, delta, scale, heads, height, width,
    dilation_h, dilation_w, tile_h, tile_w, tiles_h, tiles_w, stride_b, stride_h, stride_w, stride_n,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BIAS: tl.constexpr, GRAD_LSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries, and `delta` (see `delta_of`) of each, which the other two passes read."""
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
    first_pixel = tl.cast(image, tl.int64) * height * width * heads
    row, column = class_h + query_h * dilation_h, class_w + query_w * dilation_w
    pixels = (row * width + column) * heads + head
    q = load_tokens(query + start, row * stride_h + column * stride_w, HEAD_DIM, BLOCK_D)
    g = load_tokens(grad + first_pixel * HEAD_DIM, pixels * HEAD_DIM, HEAD_DIM, BLOCK_D)
    o = load_tokens(out + first_pixel * HEAD_DIM, pixels * HEAD_DIM, HEAD_DIM, BLOCK_D)
    norm = tl.load(lse + first_pixel + pixels) * LOG2E
    d = delta_of(g, o, grad_lse + first_pixel + pixels, GRAD_LSE)
    tl.store(delta + first_pixel + pixels, d, mask=exists)

    dq = tl.zeros([QUERIES, BLOCK_D], tl.float32)
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
        weights = tl.exp2(scores - norm[:, None])
        dscores = weights * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - d[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    store_tokens(dquery + first_pixel * HEAD_DIM, pixels * HEAD_DIM, exists, dq * scale, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def backward_key(
    grad, query, key, value, rpb, lse, delta, dkey, dvalue, scale, heads, height, width, dilation_h, dilation_w,
    tile_h, tile_w, tiles_h, tiles_w, stride_b, stride_h, stride_w, stride_n,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values: a loop over the queries that see any of them, QUERIES at a time.

    Scores are held transposed, keys by queries, so that no product has to transpose them.
    """
    head, at_h, at_w, class_h, class_w, image, members_h, members_w = locate(
        tl.program_id(0), heads, height, width, dilation_h, dilation_w, tiles_h, tiles_w
    )
    first_h, first_w = at_h * tile_h, at_w * tile_w
    size_h, size_w = tl.minimum(tile_h, members_h - first_h), tl.minimum(tile_w, members_w - first_w)
    if (size_h <= 0) | (size_w <= 0):
        return
    key_h, key_w, exists = places(0, KEYS, first_h, first_w, size_h, size_w)
    start_h, extent_h = queries_of(first_h, size_h, members_h, KERNEL_H)
    start_w, extent_w = queries_of(first_w, size_w, members_w, KERNEL_W)
    rpb += head * (2 * KERNEL_H - 1) * (2 * KERNEL_W - 1)

    start = tl.cast(image, tl.int64) * stride_b + head * stride_n
    first_pixel = tl.cast(image, tl.int64) * height * width * heads
    row, column = class_h + key_h * dilation_h, class_w + key_w * dilation_w
    k = load_tokens(key + start, row * stride_h + column * stride_w, HEAD_DIM, BLOCK_D)
    v = load_tokens(value + start, row * stride_h + column * stride_w, HEAD_DIM, BLOCK_D)

    dk = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dv = tl.zeros([KEYS, BLOCK_D], tl.float32)
    for first in range(0, extent_h * extent_w, QUERIES):
        query_h, query_w, some = places(first, QUERIES, start_h, start_w, extent_h, extent_w)
        query_row, query_column = class_h + query_h * dilation_h, class_w + query_w * dilation_w
        pixels = (query_row * width + query_column) * heads + head
        q = load_tokens(query + start, query_row * stride_h + query_column * stride_w, HEAD_DIM, BLOCK_D)
        g = load_tokens(grad + first_pixel * HEAD_DIM, pixels * HEAD_DIM, HEAD_DIM, BLOCK_D)
        norm = tl.load(lse + first_pixel + pixels) * LOG2E
        d = tl.load(delta + first_pixel + pixels)
        seen = some[None, :] & sees(
            query_h[None, :], query_w[None, :], key_h[:, None], key_w[:, None],
            members_h, members_w, KERNEL_H, KERNEL_W,
        )  # fmt: skip
        bias = bias_of(
            rpb, query_h[None, :], query_w[None, :], key_h[:, None], key_w[:, None], seen, KERNEL_H, KERNEL_W, BIAS
        )
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E) + bias
        weights = tl.exp2(scores - norm[None, :])
        dv = tl.dot(weights.to(g.dtype), g, dv, input_precision=PRECISION)
        dscores = weights * (tl.dot(v, tl.trans(g), input_precision=PRECISION) - d[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    pixels = ((row * width + column) * heads + head) * HEAD_DIM
    store_tokens(dvalue + first_pixel * HEAD_DIM, pixels, exists, dv, HEAD_DIM, BLOCK_D)
    store_tokens(dkey + first_pixel * HEAD_DIM, pixels, exists, dk * scale, HEAD_DIM, BLOCK_D)
