"""Neighborhood attention in Triton: kernels that loop over blocks of keys, and compute bias and mask in every block.

They are for everything that does not fit into registers: float32, wide heads, large windows. Scores need 76
instructions each; for the other costs see `triton_whole`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridzoo.kernels.neighborhood.triton_places import (
    SIZES,
    bias_of,
    keys_of,
    locate,
    places,
    queries_of,
    sees,
    sum_by_offset,
)
from hybridzoo.kernels.triton_common import LOG2E, load_tokens, store_tokens


@triton.jit
def delta_of(g, o, grad_lse, GRAD_LSE: tl.constexpr):
    """`delta` of every query in d(scores) = weights * (d(weights) - delta).

    It is sum(grad * out), minus the gradient of the log-sum-exp if something depends on that.
    """
    delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    if GRAD_LSE:
        delta -= tl.load(grad_lse)
    return delta


@triton.jit(do_not_specialize=SIZES)
def forward_tiled(
    query, key, value, rpb, out, lse, scale, heads, height, width, dilation_h, dilation_w,
    tiles_h, tiles_w, stride_b, stride_h, stride_w, stride_n,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of a tile of at most QUERIES queries to the keys that any of them sees, KEYS at a time."""
    head, first_h, first_w, size_h, size_w, class_h, class_w, image, members_h, members_w = locate(
        tl.program_id(0), heads, height, width, dilation_h, dilation_w, tiles_h, tiles_w
    )
    if (size_h <= 0) | (size_w <= 0):  # in a class with one member less, a tile may be empty
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
        # Before its first seen key, a row has equal weights for UNSEEN keys. The first seen key scales them to 0.
        larger = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp2(largest - larger)
        weights = tl.exp2(scores - larger[:, None])
        total = total * shrink + tl.sum(weights, 1)
        result = tl.dot(weights.to(v.dtype), v, result * shrink[:, None], input_precision=PRECISION)
        largest = larger

    first_pixel = tl.cast(image, tl.int64) * height * width * heads
    result *= (1.0 / total)[:, None]
    store_tokens(out + first_pixel * HEAD_DIM, pixels * HEAD_DIM, exists, result, HEAD_DIM, BLOCK_D)
    tl.store(lse + first_pixel + pixels, (largest + tl.log2(total)) / LOG2E, mask=exists)


@triton.jit(do_not_specialize=SIZES)
def backward_query(
    grad, grad_lse, query, key, value, rpb, out, lse, dquery, delta, scale, heads, height, width,
    dilation_h, dilation_w, tiles_h, tiles_w, stride_b, stride_h, stride_w, stride_n, grad_token,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BIAS: tl.constexpr, GRAD_LSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries, and `delta` (see `delta_of`) of each query, which the other two passes read."""
    head, first_h, first_w, size_h, size_w, class_h, class_w, image, members_h, members_w = locate(
        tl.program_id(0), heads, height, width, dilation_h, dilation_w, tiles_h, tiles_w
    )
    if (size_h <= 0) | (size_w <= 0):  # in a class with one member less, a tile may be empty
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
    grad_offsets = (row * width + column) * grad_token + head * HEAD_DIM
    first_grad = tl.cast(image, tl.int64) * height * width * grad_token
    store_tokens(dquery + first_grad, grad_offsets, exists, dq * scale, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def backward_key(
    grad, query, key, value, rpb, lse, delta, dkey, dvalue, scale, heads, height, width, dilation_h, dilation_w,
    tiles_h, tiles_w, stride_b, stride_h, stride_w, stride_n, grad_token,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values: a loop over the queries that see any of them, QUERIES at a time.

    Scores are transposed, keys by queries, so that no product has to transpose them.
    """
    head, first_h, first_w, size_h, size_w, class_h, class_w, image, members_h, members_w = locate(
        tl.program_id(0), heads, height, width, dilation_h, dilation_w, tiles_h, tiles_w
    )
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
    grad_offsets = (row * width + column) * grad_token + head * HEAD_DIM
    first_grad = tl.cast(image, tl.int64) * height * width * grad_token
    store_tokens(dvalue + first_grad, grad_offsets, exists, dv, HEAD_DIM, BLOCK_D)
    store_tokens(dkey + first_grad, grad_offsets, exists, dk * scale, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def backward_bias(
    grad, query, key, value, rpb, lse, delta, partial, scale, batch, heads, height, width, dilation_h, dilation_w,
    images, tiles_h, tiles_w, stride_b, stride_h, stride_w, stride_n,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the bias for a tile of queries of `images` images."""
    head, first_h, first_w, size_h, size_w, class_h, class_w, chunk, members_h, members_w = locate(
        tl.program_id(0), heads, height, width, dilation_h, dilation_w, tiles_h, tiles_w
    )
    query_h, query_w, exists = places(0, QUERIES, first_h, first_w, size_h, size_w)
    start_h, extent_h = keys_of(first_h, size_h, members_h, KERNEL_H)
    start_w, extent_w = keys_of(first_w, size_w, members_w, KERNEL_W)
    # No early return, because an empty tile must write a table of zeros.
    extent_h = tl.where((size_h > 0) & (size_w > 0), extent_h, 0)
    rpb += head * (2 * KERNEL_H - 1) * (2 * KERNEL_W - 1)
    row, column = class_h + query_h * dilation_h, class_w + query_w * dilation_w
    pixels = (row * width + column) * heads + head

    size: tl.constexpr = (2 * KERNEL_H - 1) * (2 * KERNEL_W - 1)
    table = tl.zeros([ROWS, COLUMNS], tl.float32)  # the flattened bias table, padded at its end
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
        for i in range((size + COLUMNS - 1) // COLUMNS):
            sums = sum_by_offset(
                i * COLUMNS + tl.arange(0, COLUMNS), total, query_h, query_w, exists, first,
                start_h, start_w, extent_h, extent_w, KERNEL_H, KERNEL_W,
            )  # fmt: skip
            table += tl.where(tl.arange(0, ROWS)[:, None] == i, sums[None, :], 0.0)
    entry = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(partial + tl.program_id(0).to(tl.int64) * size + entry, table, mask=entry < size)
