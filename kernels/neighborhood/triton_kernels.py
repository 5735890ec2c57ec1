"""Neighborhood attention in Triton: the kernels.

A program processes one tile of one dilation group of one head. Inside a group, tokens are identified by their *place*
(row, column), so that the group is an ordinary map with dilation 1: place `p` of residue class `g` is token
`g + p * dilation`. Places are vectors; for a matrix of scores they get the shapes `[n, 1]` and `[1, n]`. A vector that
is longer than needed repeats its last valid place, so that loads need no mask and never leave the tensor. Such repeats
count as keys that are not seen, and are not stored as queries.

There are two sets of kernels. The *whole* kernels hold all scores of a tile in one block, `[queries, keys they see]`.
Bias and mask depend only on the tile, so a program gathers them once, keeps them in registers and loops over many
images. For each score remain a multiply-add, an exponential and the sums. The gradient of the bias is summed over those
images in a second block; at the end, the sum of each entry of the table is picked from it. The other kernels loop over
blocks of keys, and compute bias and mask in every block. They are for everything that does not fit into registers:
float32, wide heads, large windows.

There are no atomics: one program computes each sum, in a fixed order. For the gradient of the bias, each program writes
its own table, and PyTorch adds the tables. The backward pass recomputes the weights from the log-sum-exp that the
forward pass keeps; nothing of the size of the scores is stored.

Cost, for head_dim 32, bfloat16 and a 7 x 7 window. A query of one head needs 6.3 kFLOP for the 49 keys that it sees,
and 256 bytes for query, key, value and result. A GPU could compute much more in that time, so memory is the lower
bound: 206 MB for 128 images of 56 x 56 with two heads, 84 us on an H100 that copies 2.43 TB/s. The backward pass moves
at least seven maps, or eleven in two passes. What comes on top of that, per image and program:

* reads from L2: a tile of 4 x 4 queries loads 100 keys and values, 6.25 of each per query (5 x 5 of 32 rows: 4.8);
* scores: 128 per query, 2.6 times as many as needed (for a dense 7 x 7 group 64 x 64 instead of 49 x 49, 1.7 times).
  Each score needs an exponential (a multiprocessor computes 16 per cycle) and 4 to 6 other instructions (76 in the
  kernels that compute bias and mask for every score);
* 150 to 200 instructions of every warp for addresses, fragments and barriers, so few warps are faster than many.

So that a score costs little, the bias is divided by the scale once, and the tensor cores add it: products start from
it. Offsets from a program's first image have 32 bits, so that an address is one multiply-add, and its offset one
register. Tiles differ in size by one token: maps of 14 x 14 need 16 tiles of keys; in equal tiles they needed 28.
Instructions of all warps for one tile and image, in the code of Triton 3.6 for sm_90, with the blocks tuned on an H100:

    56 x 56, dilation 1    forward 708 (863 before), registers 249; queries 986 (1,178), 244; keys 1,052 (1,090), 200
    56 x 56, dilation 8    forward 1,464 (1,706), registers 253; backward 2,072 (2,264), 230
    14 x 14, dilation 1    keys of a head: 16 tiles, 16,800 (28 tiles, 30,500)

With 200 registers instead of 255, five programs of the keys' pass share a multiprocessor instead of four. The times in
`benchmarks/results` are older than these numbers.

Tried with the compiler for sm_90, and left out: each warp its own keys (batched products: 677 instructions a warp
instead of 567, because operands go through shared memory); two halves of the keys, one after the other (as many
registers: they hold offsets and fragments, not scores); `sum(grad * out)` instead of `sum(weights * d(weights))` (25
instructions fewer, but the pipeline does not prefetch `out`); reading neighboring tiles through the L1 cache (copies to
shared memory bypass it).

Two backward passes for dilation 1 (625 us for both at 56 x 56, on an H100). Of the 525 instructions of a warp in the
keys' pass, every pass needs 276: 128 multiplications, additions and exponentials of scores, 32 conversions, 64 products
and 52 loads of their operands. 22 copy tokens (16 bytes a thread), and some 100 compute addresses. With a third fewer,
52 would be left for addresses, barriers and stores. Left out, computed and not measured:

* One pass, with 5 products instead of 7 and half of the exponentials. A key is seen by 6.25 tiles of queries, so its
  gradients become sums over programs: 1,600 bytes in float32 for a query of a head, 1.28 GB to write and to read,
  1,057 us. Overlapping windows in one program do not help: neighboring columns of tiles still share keys.
* Weights and d(scores) kept for the keys' pass, which saves two of its four products and the exponentials: 822 MB to
  write and read, 338 us, and a tile of keys would collect them from the blocks of six or more tiles of queries.
* Copies by tensor descriptors: sides of their boxes are powers of two, so the 10 x 10 tokens that a tile meets would
  need 16 x 16.

Launches: one forward; two backward (one for a dense group), and two more for the bias: `bias_table` and a sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridzoo.kernels.triton_common import LOG2E, UNSEEN, load_tokens, store_tokens

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


@triton.jit
def factor_of(scale):
    """What converts dot products to scores in base 2, but at least 1e-8: bias and UNSEEN are divided by it."""
    factor = scale * LOG2E
    return tl.where(tl.abs(factor) < 1e-8, 1e-8, factor)


@triton.jit
def store_block(blocks, scores):
    """Store the program's block of sums of d(scores), for `bias_table`."""
    rows: tl.constexpr = scores.shape[0]
    columns: tl.constexpr = scores.shape[1]
    entry = tl.arange(0, rows)[:, None] * columns + tl.arange(0, columns)[None, :]
    tl.store(blocks + tl.program_id(0).to(tl.int64) * (rows * columns) + entry, scores)


@triton.jit(do_not_specialize=SIZES)
def forward_whole(
    query, key, value, rpb, out, lse, scale, batch, heads, height, width, dilation_h, dilation_w, images,
    tiles_h, tiles_w, stride_b, stride_h, stride_w, stride_n,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BIAS: tl.constexpr, NEGATIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of a tile of queries to all keys that any of them sees, in `images` images.

    NEGATIVE: the scale is; then the queries are negated, because the maximum is taken over dot products.
    """
    head, first_h, first_w, size_h, size_w, class_h, class_w, chunk, members_h, members_w = locate(
        tl.program_id(0), heads, height, width, dilation_h, dilation_w, tiles_h, tiles_w
    )
    if (size_h <= 0) | (size_w <= 0):  # in a class with one member less, a tile may be empty
        return
    query_h, query_w, exists = places(0, QUERIES, first_h, first_w, size_h, size_w)
    start_h, extent_h = keys_of(first_h, size_h, members_h, KERNEL_H)
    start_w, extent_w = keys_of(first_w, size_w, members_w, KERNEL_W)
    key_h, key_w, some = places(0, KEYS, start_h, start_w, extent_h, extent_w)
    seen = some[None, :] & sees(
        query_h[:, None], query_w[:, None], key_h[None, :], key_w[None, :], members_h, members_w, KERNEL_H, KERNEL_W
    )
    rpb += head * (2 * KERNEL_H - 1) * (2 * KERNEL_W - 1)
    bias = bias_of(
        rpb, query_h[:, None], query_w[:, None], key_h[None, :], key_w[None, :], seen, KERNEL_H, KERNEL_W, BIAS
    )
    factor = tl.abs(factor_of(scale))
    bias *= 1.0 / factor  # the products start from it

    row, column = class_h + query_h * dilation_h, class_w + query_w * dilation_w
    query_offsets = row * stride_h + column * stride_w
    pixels = (row * width + column) * heads + head  # offsets in a contiguous (height, width, heads)
    key_offsets = (class_h + key_h * dilation_h) * stride_h + (class_w + key_w * dilation_w) * stride_w
    first = tl.cast(chunk * images, tl.int64)  # from here on, 32-bit offsets: see `MAX_OFFSET`
    image_pixels = height * width * heads
    ahead = first * stride_b + head * stride_n
    query, key, value = query + ahead, key + ahead, value + ahead
    out += first * image_pixels * HEAD_DIM
    lse += first * image_pixels
    for image in range(tl.minimum(images, batch - chunk * images)):
        start = image * stride_b
        first_pixel = image * image_pixels
        q = load_tokens(query, query_offsets + start, HEAD_DIM, BLOCK_D)
        k = load_tokens(key, key_offsets + start, HEAD_DIM, BLOCK_D, some)
        v = load_tokens(value, key_offsets + start, HEAD_DIM, BLOCK_D, some)
        if NEGATIVE:
            q = -q
        scores = tl.dot(q, tl.trans(k), bias, input_precision=PRECISION)
        largest = tl.max(scores, 1) * factor
        weights = tl.exp2(scores * factor - largest[:, None])
        total = tl.sum(weights, 1)
        result = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION) * (1.0 / total)[:, None]
        store_tokens(out, (pixels + first_pixel) * HEAD_DIM, exists, result, HEAD_DIM, BLOCK_D)
        tl.store(lse + (pixels + first_pixel), (largest + tl.log2(total)) / LOG2E, mask=exists)


@triton.jit(do_not_specialize=SIZES)
def backward_dense(
    grad, grad_lse, query, key, value, rpb, lse, dquery, dkey, dvalue, blocks, scale,
    batch, heads, height, width, dilation_h, dilation_w, images, stride_b, stride_h, stride_w, stride_n, grad_token,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    TOKENS: tl.constexpr, BIAS: tl.constexpr, WANT_BIAS: tl.constexpr,
    GRAD_LSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of a group of at most TOKENS tokens that all see each other, in `images` images."""
    head, _, _, _, _, class_h, class_w, chunk, members_h, members_w = locate(
        tl.program_id(0), heads, height, width, dilation_h, dilation_w, 1, 1
    )
    h, w, exists = places(0, TOKENS, 0, 0, members_h, members_w)
    seen = exists[:, None] & exists[None, :]  # excludes repeated queries, which would be added to dkey and dvalue
    bias = bias_of(
        rpb + head * (2 * KERNEL_H - 1) * (2 * KERNEL_W - 1),
        h[:, None], w[:, None], h[None, :], w[None, :], seen, KERNEL_H, KERNEL_W, BIAS,
    )  # fmt: skip
    factor = factor_of(scale)
    bias *= 1.0 / factor  # the products start from it
    row, column = class_h + h * dilation_h, class_w + w * dilation_w
    offsets = row * stride_h + column * stride_w
    pixels = (row * width + column) * heads + head
    grad_offsets = (row * width + column) * grad_token + head * HEAD_DIM
    dbias = tl.zeros([TOKENS, TOKENS], tl.float32)
    first = tl.cast(chunk * images, tl.int64)  # from here on, 32-bit offsets: see `MAX_OFFSET`
    image_pixels = height * width * heads
    ahead = first * stride_b + head * stride_n
    query, key, value = query + ahead, key + ahead, value + ahead
    grad += first * image_pixels * HEAD_DIM
    grad_lse += first * image_pixels
    lse += first * image_pixels
    ahead = first * height * width * grad_token
    dquery, dkey, dvalue = dquery + ahead, dkey + ahead, dvalue + ahead
    for image in range(tl.minimum(images, batch - chunk * images)):
        start = image * stride_b
        first_pixel = image * image_pixels
        first_grad = image * height * width * grad_token
        q = load_tokens(query, offsets + start, HEAD_DIM, BLOCK_D, exists)
        k = load_tokens(key, offsets + start, HEAD_DIM, BLOCK_D, exists)
        v = load_tokens(value, offsets + start, HEAD_DIM, BLOCK_D, exists)
        g = load_tokens(grad, (pixels + first_pixel) * HEAD_DIM, HEAD_DIM, BLOCK_D, exists)
        norm = tl.load(lse + (pixels + first_pixel)) * LOG2E
        # Each gradient is stored before the next is computed, because registers are scarce: four matrices of scores.
        scores = tl.dot(q, tl.trans(k), bias, input_precision=PRECISION)
        weights = tl.exp2(scores * factor - norm[:, None])
        dv = tl.dot(tl.trans(weights.to(g.dtype)), g, input_precision=PRECISION)
        store_tokens(dvalue, grad_offsets + first_grad, exists, dv, HEAD_DIM, BLOCK_D)
        dweights = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        d = tl.sum(weights * dweights, 1)  # `delta_of` without `out`, because all keys are in this block
        if GRAD_LSE:
            d -= tl.load(grad_lse + (pixels + first_pixel))
        dscores = weights * (dweights - d[:, None])
        if WANT_BIAS:
            dbias += dscores
        low = dscores.to(q.dtype)
        dk = tl.dot(tl.trans(low), q, input_precision=PRECISION) * scale
        store_tokens(dkey, grad_offsets + first_grad, exists, dk, HEAD_DIM, BLOCK_D)
        dq = tl.dot(low, k, input_precision=PRECISION) * scale
        store_tokens(dquery, grad_offsets + first_grad, exists, dq, HEAD_DIM, BLOCK_D)
    if WANT_BIAS:
        store_block(blocks, dbias)


@triton.jit(do_not_specialize=SIZES)
def backward_query_whole(
    grad, grad_lse, query, key, value, rpb, lse, dquery, delta, blocks, scale,
    batch, heads, height, width, dilation_h, dilation_w, images,
    tiles_h, tiles_w, stride_b, stride_h, stride_w, stride_n, grad_token,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BIAS: tl.constexpr,
    WANT_BIAS: tl.constexpr, GRAD_LSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of queries and of the bias, and `delta` of each query, in `images` images."""
    head, first_h, first_w, size_h, size_w, class_h, class_w, chunk, members_h, members_w = locate(
        tl.program_id(0), heads, height, width, dilation_h, dilation_w, tiles_h, tiles_w
    )
    query_h, query_w, exists = places(0, QUERIES, first_h, first_w, size_h, size_w)
    start_h, extent_h = keys_of(first_h, size_h, members_h, KERNEL_H)
    start_w, extent_w = keys_of(first_w, size_w, members_w, KERNEL_W)
    key_h, key_w, some = places(0, KEYS, start_h, start_w, extent_h, extent_w)
    seen = exists[:, None] & some[None, :] & sees(  # repeated queries would be added to the bias
        query_h[:, None], query_w[:, None], key_h[None, :], key_w[None, :], members_h, members_w, KERNEL_H, KERNEL_W
    )  # fmt: skip
    rpb += head * (2 * KERNEL_H - 1) * (2 * KERNEL_W - 1)
    bias = bias_of(
        rpb, query_h[:, None], query_w[:, None], key_h[None, :], key_w[None, :], seen, KERNEL_H, KERNEL_W, BIAS
    )
    factor = factor_of(scale)
    bias *= 1.0 / factor  # the products start from it

    row, column = class_h + query_h * dilation_h, class_w + query_w * dilation_w
    query_offsets = row * stride_h + column * stride_w
    pixels = (row * width + column) * heads + head
    grad_offsets = (row * width + column) * grad_token + head * HEAD_DIM
    key_offsets = (class_h + key_h * dilation_h) * stride_h + (class_w + key_w * dilation_w) * stride_w
    dbias = tl.zeros([QUERIES, KEYS], tl.float32)
    # In a class with one member less, a tile may be empty. Then the program writes a table of zeros.
    count = tl.where((size_h > 0) & (size_w > 0), tl.minimum(images, batch - chunk * images), 0)
    first = tl.cast(chunk * images, tl.int64)  # from here on, 32-bit offsets: see `MAX_OFFSET`
    image_pixels = height * width * heads
    ahead = first * stride_b + head * stride_n
    query, key, value = query + ahead, key + ahead, value + ahead
    grad += first * image_pixels * HEAD_DIM
    grad_lse += first * image_pixels
    lse += first * image_pixels
    delta += first * image_pixels
    dquery += first * height * width * grad_token
    for image in range(count):
        start = image * stride_b
        first_pixel = image * image_pixels
        q = load_tokens(query, query_offsets + start, HEAD_DIM, BLOCK_D)
        k = load_tokens(key, key_offsets + start, HEAD_DIM, BLOCK_D, some)
        v = load_tokens(value, key_offsets + start, HEAD_DIM, BLOCK_D, some)
        g = load_tokens(grad, (pixels + first_pixel) * HEAD_DIM, HEAD_DIM, BLOCK_D)
        norm = tl.load(lse + (pixels + first_pixel)) * LOG2E
        scores = tl.dot(q, tl.trans(k), bias, input_precision=PRECISION)
        weights = tl.exp2(scores * factor - norm[:, None])
        dweights = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        d = tl.sum(weights * dweights, 1)  # `delta_of` without `out`, because all keys are in this block
        if GRAD_LSE:
            d -= tl.load(grad_lse + (pixels + first_pixel))
        tl.store(delta + (pixels + first_pixel), d, mask=exists)
        dscores = weights * (dweights - d[:, None])
        if WANT_BIAS:
            dbias += dscores
        dq = tl.dot(dscores.to(k.dtype), k, input_precision=PRECISION) * scale
        first_grad = image * height * width * grad_token
        store_tokens(dquery, grad_offsets + first_grad, exists, dq, HEAD_DIM, BLOCK_D)
    if WANT_BIAS:
        store_block(blocks, dbias)


@triton.jit(do_not_specialize=SIZES)
def backward_key_whole(
    grad, query, key, value, rpb, lse, delta, dkey, dvalue, scale,
    batch, heads, height, width, dilation_h, dilation_w, images,
    tiles_h, tiles_w, stride_b, stride_h, stride_w, stride_n, grad_token,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values from all queries that see any of them, in `images` images.

    Scores are transposed, keys by queries, so that no product has to transpose them.
    """
    head, first_h, first_w, size_h, size_w, class_h, class_w, chunk, members_h, members_w = locate(
        tl.program_id(0), heads, height, width, dilation_h, dilation_w, tiles_h, tiles_w
    )
    if (size_h <= 0) | (size_w <= 0):
        return
    key_h, key_w, exists = places(0, KEYS, first_h, first_w, size_h, size_w)
    start_h, extent_h = queries_of(first_h, size_h, members_h, KERNEL_H)
    start_w, extent_w = queries_of(first_w, size_w, members_w, KERNEL_W)
    query_h, query_w, some = places(0, QUERIES, start_h, start_w, extent_h, extent_w)
    seen = some[None, :] & sees(
        query_h[None, :], query_w[None, :], key_h[:, None], key_w[:, None], members_h, members_w, KERNEL_H, KERNEL_W
    )
    rpb += head * (2 * KERNEL_H - 1) * (2 * KERNEL_W - 1)
    bias = bias_of(
        rpb, query_h[None, :], query_w[None, :], key_h[:, None], key_w[:, None], seen, KERNEL_H, KERNEL_W, BIAS
    )
    factor = factor_of(scale)
    bias *= 1.0 / factor  # the products start from it

    row, column = class_h + key_h * dilation_h, class_w + key_w * dilation_w
    key_offsets = row * stride_h + column * stride_w
    grad_offsets = (row * width + column) * grad_token + head * HEAD_DIM
    row, column = class_h + query_h * dilation_h, class_w + query_w * dilation_w
    query_offsets = row * stride_h + column * stride_w
    pixels = (row * width + column) * heads + head
    first = tl.cast(chunk * images, tl.int64)  # from here on, 32-bit offsets: see `MAX_OFFSET`
    image_pixels = height * width * heads
    ahead = first * stride_b + head * stride_n
    query, key, value = query + ahead, key + ahead, value + ahead
    grad += first * image_pixels * HEAD_DIM
    lse += first * image_pixels
    delta += first * image_pixels
    dkey += first * height * width * grad_token
    dvalue += first * height * width * grad_token
    for image in range(tl.minimum(images, batch - chunk * images)):
        start = image * stride_b
        first_pixel = image * image_pixels
        k = load_tokens(key, key_offsets + start, HEAD_DIM, BLOCK_D)
        v = load_tokens(value, key_offsets + start, HEAD_DIM, BLOCK_D)
        q = load_tokens(query, query_offsets + start, HEAD_DIM, BLOCK_D, some)
        g = load_tokens(grad, (pixels + first_pixel) * HEAD_DIM, HEAD_DIM, BLOCK_D, some)
        norm = tl.load(lse + (pixels + first_pixel)) * LOG2E
        d = tl.load(delta + (pixels + first_pixel))
        scores = tl.dot(k, tl.trans(q), bias, input_precision=PRECISION)
        weights = tl.exp2(scores * factor - norm[None, :])
        dscores = weights * (tl.dot(v, tl.trans(g), input_precision=PRECISION) - d[None, :])
        dv = tl.dot(weights.to(g.dtype), g, input_precision=PRECISION)
        dk = tl.dot(dscores.to(q.dtype), q, input_precision=PRECISION) * scale
        first_grad = image * height * width * grad_token
        store_tokens(dvalue, grad_offsets + first_grad, exists, dv, HEAD_DIM, BLOCK_D)
        store_tokens(dkey, grad_offsets + first_grad, exists, dk, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=[*SIZES, "chunks", "groups"])
def bias_table(
    blocks, partial, chunks, groups, heads, height, width, dilation_h, dilation_w, tiles_h, tiles_w,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """ENTRIES entries of the gradient of the bias for one tile: sum the blocks of its programs, then pick by offset."""
    size: tl.constexpr = (2 * KERNEL_H - 1) * (2 * KERNEL_W - 1)
    parts: tl.constexpr = (size + ENTRIES - 1) // ENTRIES
    group = tl.program_id(0) // parts
    entry = tl.program_id(0) % parts * ENTRIES + tl.arange(0, ENTRIES)
    _, first_h, first_w, size_h, size_w, _, _, _, members_h, members_w = locate(
        group, heads, height, width, dilation_h, dilation_w, tiles_h, tiles_w
    )
    query_h, query_w, exists = places(0, QUERIES, first_h, first_w, size_h, size_w)
    start_h, extent_h = keys_of(first_h, size_h, members_h, KERNEL_H)
    start_w, extent_w = keys_of(first_w, size_w, members_w, KERNEL_W)
    inside = tl.arange(0, QUERIES)[:, None] * KEYS + tl.arange(0, KEYS)[None, :]
    dscores = tl.zeros([QUERIES, KEYS], tl.float32)
    for chunk in range(chunks):
        dscores += tl.load(blocks + (tl.cast(chunk, tl.int64) * groups + group) * (QUERIES * KEYS) + inside)
    sums = sum_by_offset(
        entry, dscores, query_h, query_w, exists, 0, start_h, start_w, extent_h, extent_w, KERNEL_H, KERNEL_W
    )
    tl.store(partial + tl.cast(group, tl.int64) * size + entry, sums, mask=entry < size)


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
