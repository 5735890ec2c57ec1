"""Routed attention forward in Triton: keys and values are read where they lie, by region and route.

It writes the result and the log-sum-exp of every query's scores, which the backward pass needs to recompute the
weights. Scores live in registers only. See `triton_regions` for the words used here.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridzoo.kernels.routed.triton_regions import bias_of, fill_of, listed, locate, tile_of
from hybridzoo.kernels.triton_common import LOG2E, load_tokens, store_tokens

# Sizes differ between images of a multi-scale training run; a kernel compiled for each would never be reused.
SIZES = ["heads", "height", "width", "regions", "columns", "region_h", "region_w", "topk", "groups", "tiles"]


@triton.jit(do_not_specialize=SIZES)
def forward(
    query, key, value, routes, counts, fill, beyond, out, lse, scale,
    heads, height, width, regions, columns, region_h, region_w, topk, groups, tiles,
    stride_b, stride_h, stride_w, stride_n,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    DENSE: tl.constexpr, FILL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile of queries against all tokens of the regions listed for them, KEYS at a time."""
    head, tile, group, image = locate(tl.program_id(0), heads, tiles, groups)
    query_region, row, column, exists = tile_of(
        tile, group, regions, columns, region_h, region_w, height, width, QUERIES, DENSE
    )
    start = image * stride_b + head * stride_n
    q = load_tokens(query + start, row * stride_h + column * stride_w, HEAD_DIM, BLOCK_D)
    routes += (image * regions + group) * topk
    counts += image * regions * regions
    length = regions if DENSE else topk

    if FILL:  # tokens beyond the map are all alike: one key with a multiplicity, seen before the others
        number = tl.load(beyond + image * regions + query_region)
        fill_key, fill_value = fill_of(fill, head, heads, HEAD_DIM, BLOCK_D)
        score = tl.sum(q.to(tl.float32) * fill_key, 1) * (scale * LOG2E)
        largest = tl.where(number > 0, score, float("-inf"))
        total = number
        result = number[:, None] * fill_value
    else:
        largest = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        result = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    for first in range(0, length * region_h * region_w, KEYS):
        key_region, key_row, key_column, seen = listed(
            routes, first, length, columns, region_h, region_w, height, width, KEYS, DENSE
        )
        offsets = key_row * stride_h + key_column * stride_w
        k = load_tokens(key + start, offsets, HEAD_DIM, BLOCK_D)
        v = load_tokens(value + start, offsets, HEAD_DIM, BLOCK_D)
        bias = bias_of(counts, query_region[:, None], key_region[None, :], seen[None, :], regions, DENSE)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E) + bias
        # A row that has seen no key yet holds equal weights for UNSEEN ones; the first seen key scales them to 0.
        larger = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp2(largest - larger)
        weights = tl.exp2(scores - larger[:, None])
        total = total * shrink + tl.sum(weights, 1)
        result = tl.dot(weights.to(v.dtype), v, result * shrink[:, None], input_precision=PRECISION)
        largest = larger

    pixels = (row * width + column) * heads + head  # into contiguous (height, width, heads)
    first_pixel = image * height * width * heads
    store_tokens(out + first_pixel * HEAD_DIM, pixels * HEAD_DIM, exists, result / total[:, None], HEAD_DIM, BLOCK_D)
    tl.store(lse + first_pixel + pixels, (largest + tl.log2(total)) / LOG2E, mask=exists)
