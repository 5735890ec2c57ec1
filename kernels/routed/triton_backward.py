"""Gradients of routed attention in Triton. No atomics: every sum is taken by one program, in a fixed order.

Weights are recomputed from the log-sum-exp that the forward pass kept. One pass goes by tiles of queries over the
regions they list; the other by tiles of keys over the regions that list them, which an inverted index names.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridzoo.kernels.routed.triton_forward import SIZES
from hybridzoo.kernels.routed.triton_regions import bias_of, fill_of, listed, locate, tile_of
from hybridzoo.kernels.triton_common import LOG2E, load_tokens, store_tokens


@triton.jit(do_not_specialize=SIZES)
def backward_query(
    grad, query, key, value, routes, counts, fill, beyond, out, lse, dquery, delta, partial, scale,
    heads, height, width, regions, columns, region_h, region_w, topk, groups, tiles,
    stride_b, stride_h, stride_w, stride_n,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    DENSE: tl.constexpr, FILL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries, its part of the fill's, and `delta = sum(grad * out)` of each query."""
    head, tile, group, image = locate(tl.program_id(0), heads, tiles, groups)
    query_region, row, column, exists = tile_of(
        tile, group, regions, columns, region_h, region_w, height, width, QUERIES, DENSE
    )
    start = image * stride_b + head * stride_n
    first_pixel = image * height * width * heads
    pixels = (row * width + column) * heads + head
    q = load_tokens(query + start, row * stride_h + column * stride_w, HEAD_DIM, BLOCK_D)
    g = load_tokens(grad + first_pixel * HEAD_DIM, pixels * HEAD_DIM, HEAD_DIM, BLOCK_D)
    o = load_tokens(out + first_pixel * HEAD_DIM, pixels * HEAD_DIM, HEAD_DIM, BLOCK_D)
    norm = tl.load(lse + first_pixel + pixels) * LOG2E
    d = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + first_pixel + pixels, d, mask=exists)
    routes += (image * regions + group) * topk
    counts += image * regions * regions
    length = regions if DENSE else topk

    dq = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    if FILL:
        number = tl.load(beyond + image * regions + query_region)
        number = tl.where(exists, number, 0.0)
        fill_key, fill_value = fill_of(fill, head, heads, HEAD_DIM, BLOCK_D)
        score = tl.sum(q.to(tl.float32) * fill_key, 1) * (scale * LOG2E)
        weight = number * tl.exp2(tl.where(number > 0, score - norm, 0.0))  # else it might overflow, and not count
        dscore = weight * (tl.sum(g.to(tl.float32) * fill_value, 1) - d)
        dq += dscore[:, None] * fill_key
        dfill_key = tl.sum(dscore[:, None] * q.to(tl.float32), 0) * scale
        dfill_value = tl.sum(weight[:, None] * g.to(tl.float32), 0)
        partial += tl.cast(tl.program_id(0), tl.int64) * 2 * HEAD_DIM
        channel = tl.arange(0, BLOCK_D)
        tl.store(partial + channel, dfill_key, mask=channel < HEAD_DIM)
        tl.store(partial + HEAD_DIM + channel, dfill_value, mask=channel < HEAD_DIM)
    for first in range(0, length * region_h * region_w, KEYS):
        key_region, key_row, key_column, seen = listed(
            routes, first, length, columns, region_h, region_w, height, width, KEYS, DENSE
        )
        offsets = key_row * stride_h + key_column * stride_w
        k = load_tokens(key + start, offsets, HEAD_DIM, BLOCK_D)
        v = load_tokens(value + start, offsets, HEAD_DIM, BLOCK_D)
        bias = bias_of(counts, query_region[:, None], key_region[None, :], seen[None, :], regions, DENSE)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E) + bias
        weights = tl.exp2(scores - norm[:, None])
        dscores = weights * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - d[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    store_tokens(dquery + first_pixel * HEAD_DIM, pixels * HEAD_DIM, exists, dq * scale, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def backward_key(
    grad, query, key, value, listing, starts, counts, lse, delta, dkey, dvalue, scale,
    heads, height, width, regions, columns, region_h, region_w, topk, groups, tiles,
    stride_b, stride_h, stride_w, stride_n,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    DENSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values: a loop over the queries of the regions listing it, QUERIES at a time.

    `listing[image, starts[image, r] : starts[image, r + 1]]` are the regions that list region `r`, once for each time.
    Scores are held transposed, keys by queries, so that no product has to transpose them.
    """
    head, tile, group, image = locate(tl.program_id(0), heads, tiles, groups)
    key_region, row, column, exists = tile_of(
        tile, group, regions, columns, region_h, region_w, height, width, KEYS, DENSE
    )
    start = image * stride_b + head * stride_n
    first_pixel = image * height * width * heads
    k = load_tokens(key + start, row * stride_h + column * stride_w, HEAD_DIM, BLOCK_D)
    v = load_tokens(value + start, row * stride_h + column * stride_w, HEAD_DIM, BLOCK_D)
    counts += image * regions * regions
    if DENSE:
        length = regions
    else:
        starts += image * (regions + 1) + group
        begin = tl.load(starts).to(tl.int32)
        length = tl.load(starts + 1).to(tl.int32) - begin
        listing += image * regions * topk + begin

    dk = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dv = tl.zeros([KEYS, BLOCK_D], tl.float32)
    for first in range(0, length * region_h * region_w, QUERIES):
        query_region, query_row, query_column, seen = listed(
            listing, first, length, columns, region_h, region_w, height, width, QUERIES, DENSE
        )
        pixels = (query_row * width + query_column) * heads + head
        q = load_tokens(query + start, query_row * stride_h + query_column * stride_w, HEAD_DIM, BLOCK_D)
        g = load_tokens(grad + first_pixel * HEAD_DIM, pixels * HEAD_DIM, HEAD_DIM, BLOCK_D)
        norm = tl.load(lse + first_pixel + pixels) * LOG2E
        d = tl.load(delta + first_pixel + pixels)
        bias = bias_of(counts, query_region[None, :], key_region[:, None], seen[None, :], regions, DENSE)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E) + bias
        weights = tl.exp2(scores - norm[None, :])
        dv = tl.dot(weights.to(g.dtype), g, dv, input_precision=PRECISION)
        dscores = weights * (tl.dot(v, tl.trans(g), input_precision=PRECISION) - d[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    pixels = ((row * width + column) * heads + head) * HEAD_DIM
    store_tokens(dvalue + first_pixel * HEAD_DIM, pixels, exists, dv, HEAD_DIM, BLOCK_D)
    store_tokens(dkey + first_pixel * HEAD_DIM, pixels, exists, dk * scale, HEAD_DIM, BLOCK_D)
