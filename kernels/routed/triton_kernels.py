"""Routed attention in Triton: all kernels. `triton_impl` chooses which of them run, and their blocks.

Tensors are `(batch, height, width, heads, head_dim)`. There are no atomics: one program computes each sum, in a fixed
order. Backward passes recompute the weights from the log-sum-exp that the forward pass keeps. Scores exist only in
registers.

**Listed form** (`forward`, `backward_query`, `backward_key`). For one head, a program processes a *tile* of the tokens
of one region and loops over a *list* of regions. All tokens of these regions follow one another in blocks, so a block
is full even if a region has few tokens. Keys and values are read in place. One backward pass loops for each tile of
queries over the regions that it lists. The other loops for each tile of keys over the regions that list it; an inverted
index names them (`invert_routes`). If every region is routed to only one region, a single pass is enough
(`backward_single`), because one program computes the gradient of a query. With more routes, that gradient would be a
sum over programs: `topk` parts in float32 to write and to read, as many bytes as 4 topk maps of 16-bit numbers, while
the second pass reads only 4 maps again (query, key, value, grad).

**Small form** (`forward_small`, `backward_small`), for maps of at most 64 regions and 256 tokens with tiny regions, for
example BiFormer's third stage at 224 pixels: 14 x 14 tokens, 49 regions of 4 tokens, each routed to 16. The listed form
would use only 4 of the 16 rows of a block. Here every query is multiplied with every key, in the order of the regions,
and a 64-bit mask selects its keys: one bit for every region, tested by a shift by the key's region and an `and`. The
program computes the masks from the routes, without a table and without another launch. A region that is listed twice
counts twice: if a program finds one, it takes a slower branch that weighs keys by how often they are listed. Backward,
a program processes one head of a whole image: weights are computed once for all three gradients (5 products; two passes
need 7), and every map is read once.

Cost in BiFormer-S at 224 pixels, batch 128, 16-bit numbers, on an H100 (3.0 TB/s; dense products at 800 TFLOP/s;
132 multiprocessors with 16 exponentials and 128 other instructions per cycle, 1.7 GHz). Microseconds for each part
alone. The parts overlap if several programs share a multiprocessor, so the largest is the lower bound:

    stage  pass      bytes        products      exponentials  other instructions, about ten per score
    1      forward   206 MB  69    6.6 GF   8     51 M   14    18
    1      backward  411 MB 136   16.4 GF  21     51 M   14    18   (a single pass)
    2      forward   103 MB  34    3.3 GF   4     26 M    7     9
    2      backward  206 MB  68   11.5 GF  14     51 M   14    18
    3      forward    51 MB  17    7.0 GF   9     55 M   15    19   (256 rows and 208 keys for 196 tokens)
    3      backward  103 MB  34   18.8 GF  23     59 M   16    20   (256 rows and 224 keys)

Stages 1 and 2 are limited by memory. So a program should load its tokens early, 16 bytes per thread, with little index
arithmetic before. For this reason, region sizes that are powers of two are constants of the compiled kernel, and a
block of keys inside one region reads one number of the list. Launches: one forward; three backward (queries, the index,
keys), two with the single pass, one in the small form.

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
(744) at stage 1 and 792 (840) at stage 2, about 2,570 (2,700) at stage 3; backward 364 (446) in the loop of the single
pass, and 776 (808) for queries at stage 2. Where one block has all keys of a query, `delta` is `sum(weights *
d(weights))`, and `out` is not read: one map less of eight in the single pass, of nine in two passes.

**Choice of regions** (`region_means`, `choose_regions`): two launches, all in float32. Query and key are read once, 103
MB and 34 us at stage 1. The products need less than a thousandth of those of the attention.

A vector that is longer than needed repeats its last token, and a token beyond the map is replaced by the last one of
its row or column, so that loads need no mask and never leave the tensor. Such tokens are not seen as keys, and not
stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridzoo.kernels.triton_common import LOG2E, UNSEEN, load_tokens, store_tokens

# Sizes change in multi-scale training, so the kernels are not compiled again for each of them.
SIZES = ["heads", "height", "width", "regions", "columns", "region_h", "region_w", "topk", "tiles"]

# --------------------------------------------------------------------------------------- positions of a region's tokens


@triton.jit
def place(region, token, columns, region_h, region_w, height, width):
    """Row and column of a region's token, and whether it lies on the map."""
    row = region // columns * region_h + token // region_w
    column = region % columns * region_w + token % region_w
    return on_map(row, column, height, width)


@triton.jit
def on_map(row, column, height, width):
    """The position on the map that is nearest to a row and a column, and whether it is they."""
    exists = (row < height) & (column < width)
    # As unsigned numbers, negative ones are large. So no route, valid or not, can cause a read outside of the tensor.
    row, column = tl.minimum(row.to(tl.uint32), height - 1), tl.minimum(column.to(tl.uint32), width - 1)
    return row.to(tl.int32), column.to(tl.int32), exists


@triton.jit
def oriented(q, scale, NEGATIVE: tl.constexpr):
    """Queries, and the positive factor that converts their dot products to scores in base 2.

    The maximum is taken over dot products, so queries are negated if the scale is NEGATIVE. The factor is not 0,
    because 0 * infinity is NaN.
    """
    if NEGATIVE:
        q = -q
    return q, tl.maximum(tl.abs(scale) * LOG2E, 1e-30)


@triton.jit
def beyond_of(region, columns, region_h, region_w, height, width):
    """How many tokens of a region lie beyond the map."""
    rows = tl.minimum(tl.maximum(height - region // columns * region_h, 0), region_h)
    across = tl.minimum(tl.maximum(width - region % columns * region_w, 0), region_w)
    return (region_h * region_w - rows * across).to(tl.float32)


@triton.jit
def fill_of(fill, head, heads, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Key and value, `[1, BLOCK_D]` in float32, of the tokens beyond the map."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    key = tl.load(fill + head * HEAD_DIM + channel, mask=channel < HEAD_DIM, other=0.0)
    value = tl.load(fill + (heads + head) * HEAD_DIM + channel, mask=channel < HEAD_DIM, other=0.0)
    return key.to(tl.float32), value.to(tl.float32)


# ---------------------------------------------------------------------------------------------------------- listed form


@triton.jit
def locate(program, heads, tiles, regions):
    """Head, tile, region and image of a program. Heads vary fastest: those of a token are neighbors in memory."""
    head = program % heads
    program = program // heads
    tile = program % tiles
    program = program // tiles
    return head, tile, program % regions, tl.cast(program // regions, tl.int64)


@triton.jit
def tile_of(tile, region, columns, region_h, region_w, height, width, BLOCK: tl.constexpr):
    """Rows and columns of the tokens of a region's tile, and which of them exist."""
    index = tile * BLOCK + tl.arange(0, BLOCK)
    some = index < region_h * region_w
    index = tl.minimum(index, region_h * region_w - 1)
    row, column, exists = place(region, index, columns, region_h, region_w, height, width)
    return row, column, some & exists


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


@triton.jit
def backward_fill(q, g, norm, d, number, fill, head, heads, scale, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Gradients from the `number` tokens beyond the map that queries see: of the queries, and of fill."""
    fill_key, fill_value = fill_of(fill, head, heads, HEAD_DIM, BLOCK_D)
    score = tl.sum(q.to(tl.float32) * fill_key, 1) * (scale * LOG2E)
    weight = number * tl.exp2(tl.where(number > 0, score - norm, 0.0))  # avoids an overflow if `number` is 0
    dscore = weight * (tl.sum(g.to(tl.float32) * fill_value, 1) - d)
    dfill_key = tl.sum(dscore[:, None] * q.to(tl.float32), 0) * scale
    return dscore[:, None] * fill_key, dfill_key, tl.sum(weight[:, None] * g.to(tl.float32), 0)


@triton.jit
def store_partial(partial, dfill_key, dfill_value, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store a program's part of the gradient of fill."""
    partial += tl.cast(tl.program_id(0), tl.int64) * 2 * HEAD_DIM
    channel = tl.arange(0, BLOCK_D)
    tl.store(partial + channel, dfill_key, mask=channel < HEAD_DIM)
    tl.store(partial + HEAD_DIM + channel, dfill_value, mask=channel < HEAD_DIM)


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


# ----------------------------------------------------------------------------------------------------------- small form


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


# ---------------------------------------------------------------------------------------------------- choice of regions


@triton.jit(do_not_specialize=SIZES)
def region_means(
    query, key, fill, means, heads, height, width, regions, columns, region_h, region_w,
    stride_b, stride_h, stride_w, stride_n,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    """The mean of a head's channels over the tokens of one region: those on the map, or all if FILL.

    `means` is `(batch, 2, regions, heads * head_dim)` in float32: queries, then keys. TOKENS are summed at a time.
    """
    head, of_key, region, image = locate(tl.program_id(0), heads, 2, regions)
    start = image * stride_b + head * stride_n
    channel = tl.arange(0, BLOCK_D)
    inside = channel < HEAD_DIM
    tokens = region_h * region_w
    total = tl.zeros([TOKENS, BLOCK_D], tl.float32)
    for first in range(0, tokens, TOKENS):
        row, column, exists = tile_of(first // TOKENS, region, columns, region_h, region_w, height, width, TOKENS)
        pointers = start + (row * stride_h + column * stride_w)[:, None] + channel[None, :]
        mask = exists[:, None] & inside[None, :]
        if of_key == 0:
            x = tl.load(query + pointers, mask=mask, other=0.0)
        else:
            x = tl.load(key + pointers, mask=mask, other=0.0)
        total += x.to(tl.float32)
    beyond = beyond_of(region, columns, region_h, region_w, height, width)
    mean = tl.sum(total, 0)
    if FILL:
        filling = tl.load(fill + (of_key * heads + head) * HEAD_DIM + channel, mask=inside, other=0.0)
        mean = (mean + beyond * filling.to(tl.float32)) / tokens
    else:
        mean = mean / (tokens - beyond)
    means += (((image * 2 + of_key) * regions + region) * heads + head) * HEAD_DIM
    tl.store(means + channel, mean, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def choose_regions(
    means, routes, scale, regions, channels, topk, tiles,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The regions with the `topk` largest dot products for a tile of query regions, the largest first.

    KEYS is at least the number of regions. Among equal regions, the smaller numbers come first. NaN and infinity count
    as a very large number.
    """
    tile = tl.program_id(0) % tiles
    image = tl.cast(tl.program_id(0) // tiles, tl.int64)
    query = tile * QUERIES + tl.arange(0, QUERIES)
    key = tl.arange(0, KEYS)
    q_means = means + image * 2 * regions * channels
    k_means = q_means + regions * channels
    logits = tl.zeros([QUERIES, KEYS], tl.float32)
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        inside = (channel < channels)[None, :]
        q_offsets = query[:, None] * channels + channel[None, :]
        k_offsets = key[:, None] * channels + channel[None, :]
        q = tl.load(q_means + q_offsets, mask=(query < regions)[:, None] & inside, other=0.0)
        k = tl.load(k_means + k_offsets, mask=(key < regions)[:, None] & inside, other=0.0)
        logits = tl.dot(q, tl.trans(k), logits, input_precision="ieee")  # never TF32: rounding changes the order
    logits *= scale
    logits = tl.where(logits == logits, tl.minimum(tl.maximum(logits, -3.0e38), 3.0e38), 3.0e38)
    logits = tl.where((key < regions)[None, :], logits, float("-inf"))
    routes += image * regions * topk
    for slot in range(topk):
        best = tl.argmax(logits, 1)
        tl.store(routes + query * topk + slot, best.to(tl.int64), mask=query < regions)
        logits = tl.where(key[None, :] == best[:, None], float("-inf"), logits)
