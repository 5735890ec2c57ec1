"""Routed attention in Triton: the listed form, for maps and regions of any size.

For one head, a program processes a *tile* of the tokens of one region and loops over a *list* of regions. All tokens of
these regions follow one another in blocks, so a block is full even if a region has few tokens. Keys and values are read
in place. One backward pass loops for each tile of queries over the regions that it lists. The other loops for each tile
of keys over the regions that list it; an inverted index names them (`invert_routes`). If every region is routed to only
one region, a single pass is enough (`backward_single`), because one program computes the gradient of a query. With more
routes, that gradient would be a sum over programs: `topk` parts in float32 to write and to read, as many bytes as
4 topk maps of 16-bit numbers, while the second pass reads only 4 maps again (query, key, value, grad).

Cost in BiFormer-S at 224 pixels, batch 128, 16-bit numbers, on an H100 (3.0 TB/s; dense products at 800 TFLOP/s;
132 multiprocessors with 16 exponentials and 128 other instructions per cycle, 1.7 GHz). Microseconds for each part
alone. The parts overlap if several programs share a multiprocessor, so the largest is the lower bound:

    stage  pass      bytes        products      exponentials  other instructions, about ten per score
    1      forward   206 MB  69    6.6 GF   8     51 M   14    18
    1      backward  411 MB 136   16.4 GF  21     51 M   14    18   (a single pass)
    2      forward   103 MB  34    3.3 GF   4     26 M    7     9
    2      backward  206 MB  68   11.5 GF  14     51 M   14    18

Both are limited by memory. So a program should load its tokens early, 16 bytes per thread, with little index arithmetic
before. For this reason, region sizes that are powers of two are constants of the compiled kernel, and a block of keys
inside one region reads one number of the list. Launches: one forward; three backward (queries, the index, keys), two
with the single pass.

Positions. Dividing by a region's size costs some twenty instructions, for every key that a thread loads or masks. So
sizes that are not constants are inverted once for a program (`divide`), and the tokens of large regions are cut into
blocks region by region, so that the position of the region is a scalar. For 64 x 64 scores, a warp executes 307
instructions in the forward loop if sizes are constants (8 x 8 regions at 512 pixels), and 595 if not (regions of 13 x
21 tokens at 800 x 1344; with divisions 1,328); backward 574 (1,631) for queries and 399 (610) for keys. Tiles of 128
queries in 8 warps take as many registers (110) and instructions per warp (303) as 64 in 4, and read keys half as often;
backward, 128 keys spill.

Tried with the compiler for sm_90, and left out:

* Tensor descriptors. Regions of 8 x 8 take 780 instructions and 10 barriers; with pointers it is 745 and 5. A
  descriptor loads only 16 keys of regions of 4 x 4: four loops of some 400 instructions, where 64 keys together take
  836.
* All heads of a token in one program. A thread already loads 16 bytes and a warp 8 tokens of 64 bytes: only whole
  sectors of 32 bytes. The other heads of the token belong to the next programs. Stage 1 reaches 96 % of the bandwidth.
* One backward pass with more than one route. At stage 2, the parts of the queries' gradients would be 411 MB, 137 us.
  The second pass reads 103 MB, 34 us.
* Scores of keys by queries in `backward_key`, as in neighborhood attention. It saves two transpositions through shared
  memory, but the log-sum-exp and `delta` then vary along rows: 314 instructions in the loop for regions of 4 x 4, not
  293.

Instructions of a warp, in the code of Triton 3.6 for sm_90, since the H100's times in `benchmarks/results`: forward 672
(744) at stage 1 and 792 (840) at stage 2; backward 364 (446) in the loop of the single pass, and 776 (808) for queries
at stage 2. Where one block has all keys of a query, `delta` is `sum(weights * d(weights))`, and `out` is not read: one
map less of eight in the single pass, of nine in two passes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridzoo.kernels.routed.triton_tokens import (
    SIZES,
    backward_fill,
    beyond_of,
    fill_of,
    locate,
    on_map,
    oriented,
    store_partial,
    tile_of,
)
from hybridzoo.kernels.triton_common import LOG2E, UNSEEN, load_tokens, store_tokens


@triton.jit
def inverse(divisor):
    """2^32 / divisor, rounded down, for `divide`."""
    return tl.cast(0xFFFFFFFF, tl.uint32) // tl.cast(divisor, tl.uint32)


@triton.jit
def divide(number, divisor, inverted):
    """Quotient and remainder of numbers from 0 to 2^31 - 1: five instructions, where a division takes some twenty."""
    quotient = tl.umulhi(tl.cast(number, tl.uint32), inverted).to(tl.int32)  # or one less
    rest = number - quotient * divisor
    less = rest >= divisor
    return quotient + less.to(tl.int32), tl.where(less, rest - divisor, rest)


@triton.jit
def inverses(columns, region_h, region_w, BLOCK: tl.constexpr, CONSTANT: tl.constexpr, APART: tl.constexpr):
    """What `listed` divides by, inverted once for a program. The compiler knows better if they are constants."""
    tokens = region_h * region_w
    if CONSTANT:
        found = inverse(columns), 0, 0
    else:
        found = inverse(columns), inverse(region_w), inverse(tl.cdiv(tokens, BLOCK) if APART else tokens)
    return found


@triton.jit
def blocks_of(length, tokens, BLOCK: tl.constexpr, APART: tl.constexpr):
    """How many blocks the tokens of `length` regions are. APART: each block has tokens of one region only."""
    return length * tl.cdiv(tokens, BLOCK) if APART else tl.cdiv(length * tokens, BLOCK)


@triton.jit
def listed(
    entries, block, length, inverted, columns, region_h, region_w, height, width,
    BLOCK: tl.constexpr, CONSTANT: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """The same for the tokens of a block, of `blocks_of` the listed regions; `entries` is a list of `length` regions.

    CONSTANT: a region's size is a constant of the compiled kernel.
    """
    tokens = region_h * region_w
    if APART:
        blocks = tl.cdiv(tokens, BLOCK)
        if CONSTANT:
            slot, part = block // blocks, block % blocks
        else:
            slot, part = divide(block, blocks, inverted[2])
        token = part * BLOCK + tl.arange(0, BLOCK)
        some = token < tokens
        token = tl.minimum(token, tokens - 1)
    else:
        index = block * BLOCK + tl.arange(0, BLOCK)
        some = index < length * tokens
        index = tl.minimum(index, length * tokens - 1)
        if CONSTANT:
            slot, token = index // tokens, index % tokens
        else:
            slot, token = divide(index, tokens, inverted[2])
    region = tl.load(entries + slot).to(tl.int32)
    region_row, region_column = divide(region, columns, inverted[0])
    if CONSTANT:
        row, column = token // region_w, token % region_w
    else:
        row, column = divide(token, region_w, inverted[1])
    row, column, exists = on_map(region_row * region_h + row, region_column * region_w + column, height, width)
    return row, column, some & exists


@triton.jit(do_not_specialize=SIZES)
def forward(
    query, key, value, routes, fill, out, lse, scale,
    heads, height, width, regions, columns, region_h, region_w, topk, tiles,
    stride_b, stride_h, stride_w, stride_n,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    REGION_H: tl.constexpr, REGION_W: tl.constexpr, TOPK: tl.constexpr, APART: tl.constexpr,
    NEGATIVE: tl.constexpr, EXACT: tl.constexpr, FILL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of a tile of queries to all tokens of the regions listed for it, KEYS at a time."""
    region_h = REGION_H if REGION_H else region_h  # constants if the kernel is compiled for these sizes
    region_w = REGION_W if REGION_W else region_w
    topk = TOPK if TOPK else topk
    ALL: tl.constexpr = REGION_H > 0 and EXACT and REGION_H * REGION_W * TOPK % KEYS == 0  # no key is masked
    head, tile, region, image = locate(tl.program_id(0), heads, tiles, regions)
    row, column, exists = tile_of(tile, region, columns, region_h, region_w, height, width, QUERIES)
    start = image * stride_b + head * stride_n
    q = load_tokens(query + start, row * stride_h + column * stride_w, HEAD_DIM, BLOCK_D)
    q, factor = oriented(q, scale, NEGATIVE)
    routes += (image * regions + region) * topk

    if FILL:  # all tokens beyond the map are equal: they start the sums as one key that counts several times
        number = 0.0
        for slot in range(topk):
            number += beyond_of(tl.load(routes + slot).to(tl.int32), columns, region_h, region_w, height, width)
        fill_key, fill_value = fill_of(fill, head, heads, HEAD_DIM, BLOCK_D)
        score = tl.sum(q.to(tl.float32) * fill_key, 1)
        largest = tl.where(number > 0, score, float("-inf"))
        total = tl.zeros([QUERIES], tl.float32) + number
        result = tl.zeros([QUERIES, BLOCK_D], tl.float32) + number * fill_value
    else:
        largest = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        result = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    inverted = inverses(columns, region_h, region_w, KEYS, REGION_H > 0, APART)
    for block in range(blocks_of(topk, region_h * region_w, KEYS, APART)):
        key_row, key_column, seen = listed(
            routes, block, topk, inverted, columns, region_h, region_w, height, width, KEYS, REGION_H > 0, APART
        )
        offsets = key_row * stride_h + key_column * stride_w
        k = load_tokens(key + start, offsets, HEAD_DIM, BLOCK_D)
        v = load_tokens(value + start, offsets, HEAD_DIM, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if not ALL:
            scores = tl.where(seen[None, :], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        base = larger * factor
        if not ALL:
            base = tl.where(larger == float("-inf"), 0.0, base)  # any number for a row without a key yet
        shrink = tl.exp2(largest * factor - base)
        weights = tl.exp2(scores * factor - base[:, None])
        total = total * shrink + tl.sum(weights, 1)
        result = tl.dot(weights.to(v.dtype), v, result * shrink[:, None], input_precision=PRECISION)
        largest = larger

    if not ALL:  # routes that are not valid may leave a row without a key
        total = tl.where(largest == float("-inf"), 1.0, total)
        largest = tl.where(largest == float("-inf"), 0.0, largest)
    pixels = (row * width + column) * heads + head  # offsets in a contiguous (height, width, heads)
    first_pixel = image * height * width * heads
    result *= (1.0 / total)[:, None]
    store_tokens(out + first_pixel * HEAD_DIM, pixels * HEAD_DIM, exists, result, HEAD_DIM, BLOCK_D)
    tl.store(lse + first_pixel + pixels, (largest * factor + tl.log2(total)) / LOG2E, mask=exists)


@triton.jit(do_not_specialize=SIZES)
def backward_query(
    grad, query, key, value, routes, fill, out, lse, dquery, delta, partial, scale,
    heads, height, width, regions, columns, region_h, region_w, topk, tiles,
    stride_b, stride_h, stride_w, stride_n,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    REGION_H: tl.constexpr, REGION_W: tl.constexpr, TOPK: tl.constexpr, APART: tl.constexpr,
    EXACT: tl.constexpr, FILL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries, its part of the gradient of fill, and `delta = sum(grad * out)` of each query.

    If all keys fit into one block, `delta` is computed without `out`.
    """
    region_h = REGION_H if REGION_H else region_h
    region_w = REGION_W if REGION_W else region_w
    topk = TOPK if TOPK else topk
    ALL: tl.constexpr = REGION_H > 0 and EXACT and REGION_H * REGION_W * TOPK % KEYS == 0  # no key is masked
    ONE: tl.constexpr = REGION_H > 0 and REGION_H * REGION_W * TOPK <= KEYS and (TOPK == 1 or not APART) and not FILL
    head, tile, region, image = locate(tl.program_id(0), heads, tiles, regions)
    row, column, exists = tile_of(tile, region, columns, region_h, region_w, height, width, QUERIES)
    start = image * stride_b + head * stride_n
    first_pixel = image * height * width * heads
    pixels = (row * width + column) * heads + head
    q = load_tokens(query + start, row * stride_h + column * stride_w, HEAD_DIM, BLOCK_D)
    g = load_tokens(grad + first_pixel * HEAD_DIM, pixels * HEAD_DIM, HEAD_DIM, BLOCK_D)
    norm = tl.load(lse + first_pixel + pixels) * LOG2E
    if not ONE:
        o = load_tokens(out + first_pixel * HEAD_DIM, pixels * HEAD_DIM, HEAD_DIM, BLOCK_D)
        d = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
        tl.store(delta + first_pixel + pixels, d, mask=exists)
    routes += (image * regions + region) * topk

    dq = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    if FILL:
        number = tl.zeros([QUERIES], tl.float32)
        for slot in range(topk):
            number += beyond_of(tl.load(routes + slot).to(tl.int32), columns, region_h, region_w, height, width)
        number = tl.where(exists, number, 0.0)
        dq_fill, dfill_key, dfill_value = backward_fill(
            q, g, norm, d, number, fill, head, heads, scale, HEAD_DIM, BLOCK_D
        )
        dq += dq_fill
        store_partial(partial, dfill_key, dfill_value, HEAD_DIM, BLOCK_D)
    inverted = inverses(columns, region_h, region_w, KEYS, REGION_H > 0, APART)
    for block in range(blocks_of(topk, region_h * region_w, KEYS, APART)):
        key_row, key_column, seen = listed(
            routes, block, topk, inverted, columns, region_h, region_w, height, width, KEYS, REGION_H > 0, APART
        )
        offsets = key_row * stride_h + key_column * stride_w
        k = load_tokens(key + start, offsets, HEAD_DIM, BLOCK_D)
        v = load_tokens(value + start, offsets, HEAD_DIM, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        if not ALL:
            scores = tl.where(seen[None, :], scores, UNSEEN)
        weights = tl.exp2(scores - norm[:, None])
        dweights = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        if ONE:
            delta_one = tl.sum(weights * dweights, 1)
            tl.store(delta + first_pixel + pixels, delta_one, mask=exists)
            dscores = weights * (dweights - delta_one[:, None])
        else:
            dscores = weights * (dweights - d[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    store_tokens(dquery + first_pixel * HEAD_DIM, pixels * HEAD_DIM, exists, dq * scale, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def backward_key(
    grad, query, key, value, listing, starts, lse, delta, dkey, dvalue, scale,
    heads, height, width, regions, columns, region_h, region_w, topk, tiles,
    stride_b, stride_h, stride_w, stride_n,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    REGION_H: tl.constexpr, REGION_W: tl.constexpr, APART: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values: a loop over the queries of the regions that list it, QUERIES at a time.

    `listing[image, starts[image, r] : starts[image, r + 1]]` are the regions that list region `r`, repeated if they
    list it several times.
    """
    region_h = REGION_H if REGION_H else region_h
    region_w = REGION_W if REGION_W else region_w
    WHOLE: tl.constexpr = REGION_H > 0 and REGION_H * REGION_W % QUERIES == 0
    head, tile, region, image = locate(tl.program_id(0), heads, tiles, regions)
    row, column, exists = tile_of(tile, region, columns, region_h, region_w, height, width, KEYS)
    start = image * stride_b + head * stride_n
    first_pixel = image * height * width * heads
    k = load_tokens(key + start, row * stride_h + column * stride_w, HEAD_DIM, BLOCK_D)
    v = load_tokens(value + start, row * stride_h + column * stride_w, HEAD_DIM, BLOCK_D)
    starts += image * (regions + 1) + region
    begin = tl.load(starts)
    length = tl.load(starts + 1) - begin
    listing += image * regions * topk + begin

    dk = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dv = tl.zeros([KEYS, BLOCK_D], tl.float32)
    inverted = inverses(columns, region_h, region_w, QUERIES, REGION_H > 0, APART)
    for block in range(blocks_of(length, region_h * region_w, QUERIES, APART)):
        query_row, query_column, seen = listed(
            listing, block, length, inverted, columns, region_h, region_w, height, width, QUERIES, REGION_H > 0, APART
        )
        pixels = (query_row * width + query_column) * heads + head
        q = load_tokens(query + start, query_row * stride_h + query_column * stride_w, HEAD_DIM, BLOCK_D)
        g = load_tokens(grad + first_pixel * HEAD_DIM, pixels * HEAD_DIM, HEAD_DIM, BLOCK_D)
        norm = tl.load(lse + first_pixel + pixels) * LOG2E
        d = tl.load(delta + first_pixel + pixels)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        weights = tl.exp2(scores - norm[:, None])
        if not (EXACT and WHOLE):
            weights = tl.where(seen[:, None], weights, 0.0)
        dv = tl.dot(tl.trans(weights.to(g.dtype)), g, dv, input_precision=PRECISION)
        dscores = weights * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - d[:, None])
        dk = tl.dot(tl.trans(dscores.to(q.dtype)), q, dk, input_precision=PRECISION)
    pixels = ((row * width + column) * heads + head) * HEAD_DIM
    store_tokens(dvalue + first_pixel * HEAD_DIM, pixels, exists, dv, HEAD_DIM, BLOCK_D)
    store_tokens(dkey + first_pixel * HEAD_DIM, pixels, exists, dk * scale, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def backward_single(
    grad, query, key, value, listing, starts, lse, dquery, dkey, dvalue, scale,
    heads, height, width, regions, columns, region_h, region_w, topk,
    stride_b, stride_h, stride_w, stride_n,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    REGION_H: tl.constexpr, REGION_W: tl.constexpr, APART: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients if every region is routed to only one region, so that one program sees all keys of a query.

    A program holds all tokens of a key region and loops over the queries of the regions that list it.
    """
    region_h = REGION_H if REGION_H else region_h
    region_w = REGION_W if REGION_W else region_w
    WHOLE: tl.constexpr = REGION_H > 0 and REGION_H * REGION_W % QUERIES == 0
    head, _, region, image = locate(tl.program_id(0), heads, 1, regions)
    row, column, exists = tile_of(0, region, columns, region_h, region_w, height, width, KEYS)
    start = image * stride_b + head * stride_n
    first_pixel = image * height * width * heads
    k = load_tokens(key + start, row * stride_h + column * stride_w, HEAD_DIM, BLOCK_D)
    v = load_tokens(value + start, row * stride_h + column * stride_w, HEAD_DIM, BLOCK_D)
    starts += image * (regions + 1) + region
    begin = tl.load(starts)
    length = tl.load(starts + 1) - begin
    listing += image * regions * topk + begin

    dk = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dv = tl.zeros([KEYS, BLOCK_D], tl.float32)
    inverted = inverses(columns, region_h, region_w, QUERIES, REGION_H > 0, APART)
    for block in range(blocks_of(length, region_h * region_w, QUERIES, APART)):
        query_row, query_column, seen = listed(
            listing, block, length, inverted, columns, region_h, region_w, height, width, QUERIES, REGION_H > 0, APART
        )
        pixels = (query_row * width + query_column) * heads + head
        q = load_tokens(query + start, query_row * stride_h + query_column * stride_w, HEAD_DIM, BLOCK_D)
        g = load_tokens(grad + first_pixel * HEAD_DIM, pixels * HEAD_DIM, HEAD_DIM, BLOCK_D)
        norm = tl.load(lse + first_pixel + pixels) * LOG2E
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        weights = tl.exp2(scores - norm[:, None])
        if not (EXACT and REGION_H * REGION_W == KEYS):  # otherwise no key is masked
            weights = tl.where(exists[None, :], weights, 0.0)
        if not (EXACT and WHOLE):
            weights = tl.where(seen[:, None], weights, 0.0)
        dv = tl.dot(tl.trans(weights.to(g.dtype)), g, dv, input_precision=PRECISION)
        dweights = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        dscores = weights * (dweights - tl.sum(weights * dweights, 1)[:, None])
        rounded = dscores.to(k.dtype)
        dk = tl.dot(tl.trans(rounded), q, dk, input_precision=PRECISION)
        dq = tl.dot(rounded, k, input_precision=PRECISION)
        store_tokens(dquery + first_pixel * HEAD_DIM, pixels * HEAD_DIM, seen, dq * scale, HEAD_DIM, BLOCK_D)
    pixels = ((row * width + column) * heads + head) * HEAD_DIM
    store_tokens(dvalue + first_pixel * HEAD_DIM, pixels, exists, dv, HEAD_DIM, BLOCK_D)
    store_tokens(dkey + first_pixel * HEAD_DIM, pixels, exists, dk * scale, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["regions", "topk"])
def invert_routes(routes, listing, starts, regions, topk, BLOCK: tl.constexpr):
    """The inverted index for one region: the regions that list it, ascending, repeated if they list it several times.

    The lists of all regions follow one another in `listing`.
    """
    region = tl.program_id(0) % regions
    image = tl.cast(tl.program_id(0) // regions, tl.int64)
    total = regions * topk
    routes += image * total
    before = 0
    for first in range(0, total, BLOCK):
        index = first + tl.arange(0, BLOCK)
        entry = tl.load(routes + index, mask=index < total, other=regions)
        before += tl.sum((entry < region).to(tl.int32), 0)
    starts += image * (regions + 1) + region
    tl.store(starts, before)
    end = before
    for first in range(0, total, BLOCK):
        index = first + tl.arange(0, BLOCK)
        entry = tl.load(routes + index, mask=index < total, other=regions)
        mine = (entry == region).to(tl.int32)
        position = end + tl.cumsum(mine, 0) - mine
        tl.store(listing + image * total + position, index // topk, mask=mine > 0)
        end += tl.sum(mine, 0)
    if region == regions - 1:
        tl.store(starts + 1, end)
