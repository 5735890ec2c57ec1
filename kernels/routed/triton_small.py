"""Routed attention in Triton: the small form, for maps of at most 64 regions and 256 tokens with tiny regions.

For example BiFormer's third stage at 224 pixels: 14 x 14 tokens, 49 regions of 4 tokens, each routed to 16. The listed
form would use only 4 of the 16 rows of a block. Here every query is multiplied with every key, in the order of the
regions, and a 64-bit mask selects its keys: one bit for every region, tested by a shift by the key's region and an
`and`. The program computes the masks from the routes, without a table and without another launch. A region that is
listed twice counts twice: if a program finds one, it takes a slower branch that weighs keys by how often they are
listed. Backward, a program processes one head of a whole image: weights are computed once for all three gradients (5
products; two passes need 7), and every map is read once.

Cost of that stage in BiFormer-S at batch 128, as in `triton_listed`: bytes, products, exponentials and other
instructions, in microseconds for each alone. Launches: one forward, one backward.

    forward    51 MB  17    7.0 GF   9     55 M   15    19   (256 rows and 208 keys for 196 tokens)
    backward  103 MB  34   18.8 GF  23     59 M   16    20   (256 rows and 224 keys)

A warp executes about 2,570 instructions forward, in the code of Triton 3.6 for sm_90 (2,700 when the H100's times in
`benchmarks/results` were measured).
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridzoo.kernels.routed.triton_tokens import (
    SIZES,
    backward_fill,
    beyond_of,
    fill_of,
    oriented,
    place,
    store_partial,
)
from hybridzoo.kernels.triton_common import LOG2E, load_tokens, store_tokens


@triton.jit
def tokens_of(first, height, width, COLUMNS: tl.constexpr, REGION_H: tl.constexpr, REGION_W: tl.constexpr,
              REGIONS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Regions, rows and columns of tokens `first ... first + BLOCK - 1` (region by region), and which of them exist."""
    index = first + tl.arange(0, BLOCK)
    some = index < REGIONS * REGION_H * REGION_W
    index = tl.minimum(index, REGIONS * REGION_H * REGION_W - 1)
    region = index // (REGION_H * REGION_W)
    token = index % (REGION_H * REGION_W)
    row, column, exists = place(region, token, COLUMNS, REGION_H, REGION_W, height, width)
    return region, row, column, some & exists


@triton.jit
def either(a, b):
    return a | b


@triton.jit
def masks(
    routes, first, query_region, exists, height, width, topk,
    REGIONS: tl.constexpr, COLUMNS: tl.constexpr, REGION_H: tl.constexpr, REGION_W: tl.constexpr,
    QUERIES: tl.constexpr, SLOTS: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    """For each query: the mask of its listed regions, and how many listed tokens lie beyond the map.

    The third result tells whether any query lists a region twice.
    """
    TOKENS: tl.constexpr = REGION_H * REGION_W
    if (TOKENS & (TOKENS - 1)) == 0 and QUERIES % TOKENS == 0:
        # Load the routes of all regions of the tile at once (contiguous in memory), then expand the masks to tokens.
        region = first // TOKENS + tl.arange(0, QUERIES // TOKENS)
        slot = tl.arange(0, SLOTS)
        there = (region < REGIONS)[:, None] & (slot < topk)[None, :]
        listed = tl.load(routes + region[:, None] * topk + slot[None, :], mask=there, other=0).to(tl.int32)
        bits = tl.where(there, tl.full([1, 1], 1, tl.uint64) << (listed & 63).to(tl.uint64), 0)
        of_region = tl.reduce(bits, 1, either)
        pairs = of_region - ((of_region >> 1) & 0x5555555555555555)  # count the bits: in pairs, fours, eights, all
        fours = (pairs & 0x3333333333333333) + ((pairs >> 2) & 0x3333333333333333)
        eights = (fours + (fours >> 4)) & 0x0F0F0F0F0F0F0F0F
        repeated = tl.sum(there.to(tl.int32), 1) - ((eights * 0x0101010101010101) >> 56).to(tl.int32)
        mask = tl.reshape(tl.broadcast_to(of_region[:, None], [QUERIES // TOKENS, TOKENS]), [QUERIES])
        twice = tl.max(repeated, 0) > 0
        number = tl.zeros([QUERIES], tl.float32)
        if FILL:
            beyond = tl.where(there, beyond_of(listed, COLUMNS, REGION_H, REGION_W, height, width), 0.0)
            number = tl.broadcast_to(tl.sum(beyond, 1)[:, None], [QUERIES // TOKENS, TOKENS])
            number = tl.reshape(number, [QUERIES])
    else:
        mask = tl.zeros_like(query_region).to(tl.uint64)
        again = mask
        number = mask.to(tl.float32)
        for slot in range(topk):
            region = tl.load(routes + query_region * topk + slot).to(tl.int32)
            bit = tl.full([1], 1, tl.uint64) << (region & 63).to(tl.uint64)
            again |= mask & bit
            mask |= bit
            if FILL:
                number += beyond_of(region, COLUMNS, REGION_H, REGION_W, height, width)
        twice = tl.max((again != 0).to(tl.int32), 0) > 0
    return tl.where(exists, mask, 0), tl.where(exists, number, 0.0), twice


@triton.jit
def chosen(mask, first, exists, TOKENS: tl.constexpr, KEYS: tl.constexpr, EXACT: tl.constexpr):
    """`[queries, KEYS]`: which of the keys `first ... first + KEYS - 1` each query is routed to.

    These keys overlap at most 32 regions, so a 32-bit word of the mask is enough. Regions after the last have no bit.
    """
    word = (mask >> tl.cast(first // TOKENS, tl.uint64)).to(tl.uint32)
    region = tl.arange(0, KEYS) // TOKENS if KEYS % TOKENS == 0 else (first % TOKENS + tl.arange(0, KEYS)) // TOKENS
    bit = (word[:, None] >> region[None, :].to(tl.uint32)) & 1
    if not EXACT:
        bit &= exists[None, :].to(tl.uint32)
    return bit != 0


@triton.jit
def times(weights, routes, query_region, first, topk, TOKENS: tl.constexpr, KEYS: tl.constexpr):
    """Multiply every weight by how often the query's region lists the key's region."""
    key_region = (first + tl.arange(0, KEYS)) // TOKENS
    total = weights * 0.0
    for slot in range(topk):
        listed = tl.load(routes + query_region * topk + slot).to(tl.int32)
        total += tl.where(listed[:, None] == key_region[None, :], weights, 0.0)
    return total


@triton.jit
def attend_block(
    first, q, key, value, mask, query_region, routes, largest, total, result, factor,
    height, width, topk, stride_h, stride_w,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr,
    REGIONS: tl.constexpr, COLUMNS: tl.constexpr, REGION_H: tl.constexpr, REGION_W: tl.constexpr,
    TWICE: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`forward_small` for one block. `largest` is a dot product; `factor` converts dot products to scores in base 2."""
    TOKENS: tl.constexpr = REGION_H * REGION_W
    _, key_row, key_column, key_exists = tokens_of(first, height, width, COLUMNS, REGION_H, REGION_W, REGIONS, KEYS)
    offsets = key_row * stride_h + key_column * stride_w
    k = load_tokens(key, offsets, HEAD_DIM, BLOCK_D)
    v = load_tokens(value, offsets, HEAD_DIM, BLOCK_D)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    scores = tl.where(chosen(mask, first, key_exists, TOKENS, KEYS, EXACT), scores, float("-inf"))
    larger = tl.maximum(largest, tl.max(scores, 1))
    base = tl.where(larger == float("-inf"), 0.0, larger * factor)  # any number for a row without a key yet
    shrink = tl.exp2(largest * factor - base)
    weights = tl.exp2(scores * factor - base[:, None])
    if TWICE:
        weights = times(weights, routes, query_region, first, topk, TOKENS, KEYS)
    total = total * shrink + tl.sum(weights, 1)
    result = tl.dot(weights.to(v.dtype), v, result * shrink[:, None], input_precision=PRECISION)
    return larger, total, result


@triton.jit
def attend_small(
    q, key, value, mask, query_region, routes, largest, total, result, factor,
    height, width, topk, stride_h, stride_w,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, LAST: tl.constexpr,
    REGIONS: tl.constexpr, COLUMNS: tl.constexpr, REGION_H: tl.constexpr, REGION_W: tl.constexpr,
    TWICE: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`forward_small` for all keys: blocks of KEYS and, if LAST is not 0, a smaller block of LAST for the rest."""
    WHOLE: tl.constexpr = REGIONS * REGION_H * REGION_W // KEYS * KEYS
    for first in range(0, WHOLE if LAST else REGIONS * REGION_H * REGION_W, KEYS):
        largest, total, result = attend_block(
            first, q, key, value, mask, query_region, routes, largest, total, result, factor,
            height, width, topk, stride_h, stride_w, HEAD_DIM, BLOCK_D, KEYS, REGIONS, COLUMNS, REGION_H, REGION_W,
            TWICE, EXACT, PRECISION,
        )  # fmt: skip
    if LAST:
        largest, total, result = attend_block(
            WHOLE, q, key, value, mask, query_region, routes, largest, total, result, factor,
            height, width, topk, stride_h, stride_w, HEAD_DIM, BLOCK_D, LAST, REGIONS, COLUMNS, REGION_H, REGION_W,
            TWICE, EXACT, PRECISION,
        )  # fmt: skip
    return largest, total, result


@triton.jit(do_not_specialize=SIZES)
def forward_small(
    query, key, value, routes, fill, out, lse, scale,
    heads, height, width, topk, tiles, stride_b, stride_h, stride_w, stride_n,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    REGIONS: tl.constexpr, COLUMNS: tl.constexpr, REGION_H: tl.constexpr, REGION_W: tl.constexpr,
    LAST: tl.constexpr, SLOTS: tl.constexpr, NEGATIVE: tl.constexpr,
    EXACT: tl.constexpr, FILL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of a tile of queries to the keys of the whole map that their masks select, KEYS at a time."""
    program = tl.program_id(0)
    head = program % heads
    tile = program // heads % tiles
    image = tl.cast(program // heads // tiles, tl.int64)
    query_region, row, column, exists = tokens_of(
        tile * QUERIES, height, width, COLUMNS, REGION_H, REGION_W, REGIONS, QUERIES
    )
    start = image * stride_b + head * stride_n
    q = load_tokens(query + start, row * stride_h + column * stride_w, HEAD_DIM, BLOCK_D)
    routes += image * REGIONS * topk
    mask, number, twice = masks(
        routes, tile * QUERIES, query_region, exists, height, width, topk,
        REGIONS, COLUMNS, REGION_H, REGION_W, QUERIES, SLOTS, FILL,
    )  # fmt: skip

    q, factor = oriented(q, scale, NEGATIVE)
    if FILL:  # all tokens beyond the map are equal: they start the sums as one key that counts several times
        fill_key, fill_value = fill_of(fill, head, heads, HEAD_DIM, BLOCK_D)
        score = tl.sum(q.to(tl.float32) * fill_key, 1)
        largest = tl.where(number > 0, score, float("-inf"))
        total = number
        result = number[:, None] * fill_value
    else:
        largest = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        result = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    if twice:
        largest, total, result = attend_small(
            q, key + start, value + start, mask, query_region, routes, largest, total, result, factor,
            height, width, topk, stride_h, stride_w, HEAD_DIM, BLOCK_D, KEYS, LAST,
            REGIONS, COLUMNS, REGION_H, REGION_W, True, EXACT, PRECISION,
        )  # fmt: skip
    else:
        largest, total, result = attend_small(
            q, key + start, value + start, mask, query_region, routes, largest, total, result, factor,
            height, width, topk, stride_h, stride_w, HEAD_DIM, BLOCK_D, KEYS, LAST,
            REGIONS, COLUMNS, REGION_H, REGION_W, False, EXACT, PRECISION,
        )  # fmt: skip

    total = tl.where(exists, total, 1.0)  # rows that do not exist have no keys
    pixels = (row * width + column) * heads + head  # offsets in a contiguous (height, width, heads)
    first_pixel = image * height * width * heads
    result *= (1.0 / total)[:, None]
    store_tokens(out + first_pixel * HEAD_DIM, pixels * HEAD_DIM, exists, result, HEAD_DIM, BLOCK_D)
    tl.store(lse + first_pixel + pixels, (largest * factor + tl.log2(total)) / LOG2E, mask=exists)


@triton.jit(do_not_specialize=SIZES)
def backward_small(
    grad, query, key, value, routes, fill, out, lse, dquery, dkey, dvalue, partial, scale,
    heads, height, width, topk, stride_b, stride_h, stride_w, stride_n,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    REGIONS: tl.constexpr, COLUMNS: tl.constexpr, REGION_H: tl.constexpr, REGION_W: tl.constexpr,
    SLOTS: tl.constexpr, EXACT: tl.constexpr, FILL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of one head of an image: QUERIES covers all queries; a loop over keys, KEYS at a time."""
    TOKENS: tl.constexpr = REGION_H * REGION_W
    program = tl.program_id(0)
    head = program % heads
    image = tl.cast(program // heads, tl.int64)
    query_region, row, column, exists = tokens_of(0, height, width, COLUMNS, REGION_H, REGION_W, REGIONS, QUERIES)
    start = image * stride_b + head * stride_n
    first_pixel = image * height * width * heads
    pixels = (row * width + column) * heads + head
    q = load_tokens(query + start, row * stride_h + column * stride_w, HEAD_DIM, BLOCK_D)
    g = load_tokens(grad + first_pixel * HEAD_DIM, pixels * HEAD_DIM, HEAD_DIM, BLOCK_D)
    o = load_tokens(out + first_pixel * HEAD_DIM, pixels * HEAD_DIM, HEAD_DIM, BLOCK_D)
    norm = tl.load(lse + first_pixel + pixels) * LOG2E
    d = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    routes += image * REGIONS * topk
    # Rows that repeat the last query, or lie beyond the map, have an empty mask, so they add nothing.
    mask, number, twice = masks(
        routes, 0, query_region, exists, height, width, topk,
        REGIONS, COLUMNS, REGION_H, REGION_W, QUERIES, SLOTS, FILL,
    )  # fmt: skip

    dq = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    if FILL:
        dq_fill, dfill_key, dfill_value = backward_fill(
            q, g, norm, d, number, fill, head, heads, scale, HEAD_DIM, BLOCK_D
        )
        dq += dq_fill
        store_partial(partial, dfill_key, dfill_value, HEAD_DIM, BLOCK_D)
    for first in range(0, REGIONS * TOKENS, KEYS):
        _, key_row, key_column, key_exists = tokens_of(first, height, width, COLUMNS, REGION_H, REGION_W, REGIONS, KEYS)
        offsets = key_row * stride_h + key_column * stride_w
        k = load_tokens(key + start, offsets, HEAD_DIM, BLOCK_D)
        v = load_tokens(value + start, offsets, HEAD_DIM, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        # Keys that are not chosen may overflow, but `where` drops them.
        weights = tl.where(chosen(mask, first, key_exists, TOKENS, KEYS, EXACT), tl.exp2(scores - norm[:, None]), 0.0)
        if twice:
            weights = times(weights, routes, query_region, first, topk, TOKENS, KEYS)
        dv = tl.dot(tl.trans(weights.to(g.dtype)), g, input_precision=PRECISION)
        dscores = weights * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - d[:, None])
        rounded = dscores.to(k.dtype)
        dk = tl.dot(tl.trans(rounded), q, input_precision=PRECISION)
        dq = tl.dot(rounded, k, dq, input_precision=PRECISION)
        key_pixels = ((key_row * width + key_column) * heads + head) * HEAD_DIM
        store_tokens(dvalue + first_pixel * HEAD_DIM, key_pixels, key_exists, dv, HEAD_DIM, BLOCK_D)
        store_tokens(dkey + first_pixel * HEAD_DIM, key_pixels, key_exists, dk * scale, HEAD_DIM, BLOCK_D)
    store_tokens(dquery + first_pixel * HEAD_DIM, pixels * HEAD_DIM, exists, dq * scale, HEAD_DIM, BLOCK_D)
