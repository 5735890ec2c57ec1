"""The dynamic convolution of neighborhoods in Triton: the kernels.

Tiles, dilation groups and places are those of neighborhood attention. A row of scores has a column for every place of
the query's window, TAPS columns with padding. One product of a tile's queries with the image's taps computes them, so
the whole softmax happens in registers for any size of the map. `tl.gather` moves a row from the window's places to the
keys of the tile (every query has a different shift), and the gradient of the weights back.

There are no atomics: one program computes each sum, in a fixed order. A program sums the gradients of taps and of both
tables over its share of an image's tiles and writes them to its own slot; PyTorch adds the slots. In backward passes,
where a thread holds more matrices, PART places are processed at a time.

Cost, for OverLoCK-T's third stage (14 x 14 tokens, 8 heads of 16 channels, a 13 x 13 window) at batch 128 in bfloat16,
on an H100 (3.0 TB/s; 740 TFLOP/s; 132 multiprocessors with 16 exponentials per cycle, 1.7 GHz). A map is 6.4 MB, the
taps are 5.5 MB. A program of the forward pass takes 16 queries of a head, so there are 16384. Microseconds for each
part alone; computed, not measured:

    pass      bytes                                    products     exponentials
    forward   three maps, the taps       25 MB   8     4.3 GF   6    67 M  19    (256 places for 169)
    backward  11 maps, 3 times taps      87 MB  29    21 GF    29   190 M  53    (the weights in each of three passes)

The limits are the exponentials, and moving as many scores from places to keys and back, which takes several
instructions each. The plain form has five tensors as wide as a window, with 338 bytes per query and head; here none of
them exists. Launches: one forward; three backward, and one sum for the taps and for each table.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridzoo.kernels.neighborhood.triton_kernels import (
    SIZES,
    bias_of,
    keys_of,
    locate,
    places,
    queries_of,
    sees,
    window_start,
)
from hybridzoo.kernels.triton_common import LOG2E, UNSEEN, load_tokens, store_tokens

MIX_SIZES = [*SIZES, "share", "shares"]


@triton.jit
def load_taps(taps, tap, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """`[taps, BLOCK_D]` of one image and head; zeros beyond the last tap."""
    return load_tokens(taps, tap * HEAD_DIM, HEAD_DIM, BLOCK_D, tap < SIZE)


@triton.jit
def products(q, matrix, tap, tap_bias, scale, SIZE: tl.constexpr, TAP_BIAS: tl.constexpr, PRECISION: tl.constexpr):
    """Scores in base 2 by place, without the position bias."""
    scores = tl.dot(q, tl.trans(matrix), input_precision=PRECISION) * (scale * LOG2E)
    if TAP_BIAS:
        scores += (tl.load(tap_bias + tap, mask=tap < SIZE, other=0.0).to(tl.float32) * LOG2E)[None, :]
    return scores


@triton.jit
def with_rpb(
    scores, tap, rpb, query_h, query_w, members_h, members_w, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """Scores by place with the position bias; UNSEEN at places beyond the group."""
    tap_h, tap_w = tap // KERNEL_W, tap % KERNEL_W
    seen = (tap_h < tl.minimum(KERNEL_H, members_h)) & (tap_w < tl.minimum(KERNEL_W, members_w))
    if BIAS:
        columns: tl.constexpr = 2 * KERNEL_W - 1
        row = window_start(query_h, members_h, KERNEL_H) - query_h + KERNEL_H - 1
        column = window_start(query_w, members_w, KERNEL_W) - query_w + KERNEL_W - 1
        index = (row[:, None] + tap_h[None, :]) * columns + column[:, None] + tap_w[None, :]
        scores += tl.load(rpb + index, mask=(index >= 0) & seen[None, :], other=0.0).to(tl.float32) * LOG2E
    return tl.where(seen[None, :], scores, UNSEEN)


@triton.jit
def places_of(query_h, query_w, key_h, key_w, members_h, members_w, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr):
    """`[queries, keys]`: the place of a key in a query's window; any number for a key that is not seen."""
    start_h = window_start(query_h, members_h, KERNEL_H)
    start_w = window_start(query_w, members_w, KERNEL_W)
    return (key_h[None, :] - start_h[:, None]) * KERNEL_W + key_w[None, :] - start_w[:, None]


@triton.jit(do_not_specialize=MIX_SIZES)
def mix_forward(
    query, taps, value, tap_bias, rpb, out, lse, scale, heads, height, width, dilation_h, dilation_w,
    tiles_h, tiles_w, stride_b, stride_h, stride_w, stride_n, value_b, value_h, value_w, value_n,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_E: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, TAPS: tl.constexpr,
    TAP_BIAS: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of at most QUERIES queries of one image and head."""
    size: tl.constexpr = KERNEL_H * KERNEL_W
    head, first_h, first_w, size_h, size_w, class_h, class_w, image, members_h, members_w = locate(
        tl.program_id(0), heads, height, width, dilation_h, dilation_w, tiles_h, tiles_w
    )
    if (size_h <= 0) | (size_w <= 0):  # in a class with one member less, a tile may be empty
        return
    query_h, query_w, exists = places(0, QUERIES, first_h, first_w, size_h, size_w)
    start_h, extent_h = keys_of(first_h, size_h, members_h, KERNEL_H)
    start_w, extent_w = keys_of(first_w, size_w, members_w, KERNEL_W)
    one = tl.cast(image, tl.int64)
    row, column = class_h + query_h * dilation_h, class_w + query_w * dilation_w
    pixels = (row * width + column) * heads + head
    q = load_tokens(query + one * stride_b + head * stride_n, row * stride_h + column * stride_w, HEAD_DIM, BLOCK_D)
    tap = tl.arange(0, TAPS)
    matrix = load_taps(taps + (one * heads + head) * size * HEAD_DIM, tap, size, HEAD_DIM, BLOCK_D)
    scores = products(q, matrix, tap, tap_bias + head * size, scale, size, TAP_BIAS, PRECISION)
    rpb += head * (2 * KERNEL_H - 1) * (2 * KERNEL_W - 1)
    scores = with_rpb(scores, tap, rpb, query_h, query_w, members_h, members_w, KERNEL_H, KERNEL_W, BIAS)
    largest = tl.max(scores, 1)
    weights = tl.exp2(scores - largest[:, None])
    total = tl.sum(weights, 1)
    weights = weights / total[:, None]

    result = tl.zeros([QUERIES, BLOCK_E], tl.float32)
    for first in range(0, extent_h * extent_w, KEYS):
        key_h, key_w, some = places(first, KEYS, start_h, start_w, extent_h, extent_w)
        offsets = (class_h + key_h * dilation_h) * value_h + (class_w + key_w * dilation_w) * value_w
        v = load_tokens(value + one * value_b + head * value_n, offsets, VALUE_DIM, BLOCK_E)
        seen = some[None, :] & sees(
            query_h[:, None], query_w[:, None], key_h[None, :], key_w[None, :],
            members_h, members_w, KERNEL_H, KERNEL_W,
        )  # fmt: skip
        place = places_of(query_h, query_w, key_h, key_w, members_h, members_w, KERNEL_H, KERNEL_W)
        by_key = tl.where(seen, tl.gather(weights, tl.where(seen, place, 0), 1), 0.0)
        result = tl.dot(by_key.to(v.dtype), v, result, input_precision=PRECISION)
    first_pixel = one * height * width * heads
    store_tokens(out + first_pixel * VALUE_DIM, pixels * VALUE_DIM, exists, result, VALUE_DIM, BLOCK_E)
    tl.store(lse + first_pixel + pixels, (largest + tl.log2(total)) / LOG2E, mask=exists)


@triton.jit
def score_gradients(
    q, g, matrix, tap, tap_bias, rpb, norm, delta, value, scale, query_h, query_w, exists, members_h, members_w,
    class_h, class_w, dilation_h, dilation_w, start_h, start_w, extent_h, extent_w, value_h, value_w,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_E: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PART: tl.constexpr, TAP_BIAS: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`[QUERIES, PART]`: gradients of a tile's scores at PART places; zero for queries that do not exist."""
    scores = products(q, matrix, tap, tap_bias, scale, KERNEL_H * KERNEL_W, TAP_BIAS, PRECISION)
    scores = with_rpb(scores, tap, rpb, query_h, query_w, members_h, members_w, KERNEL_H, KERNEL_W, BIAS)
    weights = tl.where(exists[:, None], tl.exp2(tl.minimum(scores - norm[:, None], 0.0)), 0.0)
    tap_h, tap_w = tap // KERNEL_W, tap % KERNEL_W
    shown_h, shown_w = tl.minimum(KERNEL_H, members_h), tl.minimum(KERNEL_W, members_w)
    row = window_start(query_h, members_h, KERNEL_H)[:, None] + tap_h[None, :] - start_h
    column = window_start(query_w, members_w, KERNEL_W)[:, None] + tap_w[None, :] - start_w
    inside = ((tap_h < shown_h) & (tap_w < shown_w))[None, :]
    key = row * extent_w + column
    # For all queries together, the keys at these places lie in a few rows.
    first_row = tl.minimum(tl.min(tap_h, 0), shown_h)
    rows = tl.minimum(extent_h, extent_h - shown_h + tl.max(tap_h, 0) + 1)
    dweights = tl.zeros([QUERIES, PART], tl.float32)
    for first in range(first_row * extent_w // KEYS * KEYS, rows * extent_w, KEYS):
        key_h, key_w, _ = places(first, KEYS, start_h, start_w, extent_h, extent_w)
        offsets = (class_h + key_h * dilation_h) * value_h + (class_w + key_w * dilation_w) * value_w
        v = load_tokens(value, offsets, VALUE_DIM, BLOCK_E)
        by_key = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        met = inside & (key >= first) & (key < first + KEYS)
        dweights += tl.where(met, tl.gather(by_key, tl.where(met, key - first, 0), 1), 0.0)
    return weights * (dweights - delta[:, None])


@triton.jit(do_not_specialize=MIX_SIZES)
def mix_backward_query(
    grad, query, taps, value, tap_bias, rpb, out, lse, dquery, delta, scale, heads, height, width,
    dilation_h, dilation_w, tiles_h, tiles_w,
    stride_b, stride_h, stride_w, stride_n, value_b, value_h, value_w, value_n,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_E: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PART: tl.constexpr,
    TAP_BIAS: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries, PART places at a time, and `delta = sum(grad * out)` of each, for the taps."""
    size: tl.constexpr = KERNEL_H * KERNEL_W
    head, first_h, first_w, size_h, size_w, class_h, class_w, image, members_h, members_w = locate(
        tl.program_id(0), heads, height, width, dilation_h, dilation_w, tiles_h, tiles_w
    )
    if (size_h <= 0) | (size_w <= 0):  # in a class with one member less, a tile may be empty
        return
    query_h, query_w, exists = places(0, QUERIES, first_h, first_w, size_h, size_w)
    start_h, extent_h = keys_of(first_h, size_h, members_h, KERNEL_H)
    start_w, extent_w = keys_of(first_w, size_w, members_w, KERNEL_W)
    one = tl.cast(image, tl.int64)
    first_pixel = one * height * width * heads
    row, column = class_h + query_h * dilation_h, class_w + query_w * dilation_w
    pixels = (row * width + column) * heads + head
    q = load_tokens(query + one * stride_b + head * stride_n, row * stride_h + column * stride_w, HEAD_DIM, BLOCK_D)
    g = load_tokens(grad + first_pixel * VALUE_DIM, pixels * VALUE_DIM, VALUE_DIM, BLOCK_E)
    o = load_tokens(out + first_pixel * VALUE_DIM, pixels * VALUE_DIM, VALUE_DIM, BLOCK_E)
    norm = tl.load(lse + first_pixel + pixels) * LOG2E
    d = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + first_pixel + pixels, d, mask=exists)
    dq = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    for first in range(0, size, PART):
        tap = first + tl.arange(0, PART)
        matrix = load_taps(taps + (one * heads + head) * size * HEAD_DIM, tap, size, HEAD_DIM, BLOCK_D)
        dscores = score_gradients(
            q, g, matrix, tap, tap_bias + head * size, rpb + head * (2 * KERNEL_H - 1) * (2 * KERNEL_W - 1), norm, d,
            value + one * value_b + head * value_n, scale, query_h, query_w, exists, members_h, members_w,
            class_h, class_w, dilation_h, dilation_w, start_h, start_w, extent_h, extent_w, value_h, value_w,
            KERNEL_H, KERNEL_W, VALUE_DIM, BLOCK_E, QUERIES, KEYS, PART, TAP_BIAS, BIAS, PRECISION,
        )  # fmt: skip
        dq = tl.dot(dscores.to(matrix.dtype), matrix, dq, input_precision=PRECISION)
    store_tokens(dquery + first_pixel * HEAD_DIM, pixels * HEAD_DIM, exists, dq * scale, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=MIX_SIZES)
def mix_backward_taps(
    grad, query, taps, value, tap_bias, rpb, lse, delta, dtaps, dtap_bias, drpb, scale,
    heads, height, width, dilation_h, dilation_w, share, shares, tiles_h, tiles_w,
    stride_b, stride_h, stride_w, stride_n, value_b, value_h, value_w, value_n,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_E: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PART: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TAP_BIAS: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of PART taps, and of the tables at their places, for `share` tiles of queries of an image and head.

    Sums of taps are written to the slot `(image, share, head)`; sums of the tables to a slot of the program.
    """
    size: tl.constexpr = KERNEL_H * KERNEL_W
    parts: tl.constexpr = (size + PART - 1) // PART
    columns: tl.constexpr = 2 * KERNEL_W - 1
    entries: tl.constexpr = (2 * KERNEL_H - 1) * columns
    slot = tl.program_id(0) // parts
    head = slot % heads
    image = slot // heads // shares
    begin = slot // heads % shares * share
    all_tiles = tl.minimum(dilation_h, height) * tl.minimum(dilation_w, width) * tiles_h * tiles_w
    one = tl.cast(image, tl.int64)
    first_pixel = one * height * width * heads
    first_tap = tl.program_id(0) % parts * PART
    tap = first_tap + tl.arange(0, PART)
    matrix = load_taps(taps + (one * heads + head) * size * HEAD_DIM, tap, size, HEAD_DIM, BLOCK_D)
    sum_taps = tl.zeros([PART, BLOCK_D], tl.float32)
    sum_bias = tl.zeros([PART], tl.float32)
    table = tl.zeros([ROWS, COLUMNS], tl.float32)  # the flattened bias table, padded at its end
    for tile in range(begin, tl.minimum(begin + share, all_tiles)):
        _, first_h, first_w, size_h, size_w, class_h, class_w, _, members_h, members_w = locate(
            tile * heads, heads, height, width, dilation_h, dilation_w, tiles_h, tiles_w
        )
        query_h, query_w, exists = places(0, QUERIES, first_h, first_w, size_h, size_w)
        start_h, extent_h = keys_of(first_h, size_h, members_h, KERNEL_H)
        start_w, extent_w = keys_of(first_w, size_w, members_w, KERNEL_W)
        # In a class with one member less, a tile may be empty. Then it has no query and needs no key.
        extent_h = tl.where((size_h > 0) & (size_w > 0), extent_h, 0)
        row, column = class_h + query_h * dilation_h, class_w + query_w * dilation_w
        pixels = (row * width + column) * heads + head
        query_offsets = row * stride_h + column * stride_w
        q = load_tokens(query + one * stride_b + head * stride_n, query_offsets, HEAD_DIM, BLOCK_D, exists)
        g = load_tokens(grad + first_pixel * VALUE_DIM, pixels * VALUE_DIM, VALUE_DIM, BLOCK_E, exists)
        norm = tl.load(lse + first_pixel + pixels, mask=exists, other=0.0) * LOG2E
        d = tl.load(delta + first_pixel + pixels, mask=exists, other=0.0)
        dscores = score_gradients(
            q, g, matrix, tap, tap_bias + head * size, rpb + head * entries, norm, d,
            value + one * value_b + head * value_n, scale, query_h, query_w, exists, members_h, members_w,
            class_h, class_w, dilation_h, dilation_w, start_h, start_w, extent_h, extent_w, value_h, value_w,
            KERNEL_H, KERNEL_W, VALUE_DIM, BLOCK_E, QUERIES, KEYS, PART, TAP_BIAS, BIAS, PRECISION,
        )  # fmt: skip
        sum_taps = tl.dot(tl.trans(dscores.to(q.dtype)), q, sum_taps, input_precision=PRECISION)
        if TAP_BIAS:
            sum_bias += tl.sum(dscores, 0)
        if BIAS:
            lead_h = query_h - window_start(query_h, members_h, KERNEL_H) - (KERNEL_H - 1)
            lead_w = query_w - window_start(query_w, members_w, KERNEL_W) - (KERNEL_W - 1)
            for i in range((entries + COLUMNS - 1) // COLUMNS):
                # For an entry of the table, each query has at most one place; it is picked and summed over queries.
                entry = i * COLUMNS + tl.arange(0, COLUMNS)
                place_h = lead_h[:, None] + (entry // columns)[None, :]
                place_w = lead_w[:, None] + (entry % columns)[None, :]
                place = place_h * KERNEL_W + place_w - first_tap
                hit = (place_h >= 0) & (place_h < KERNEL_H) & (place_w >= 0) & (place_w < KERNEL_W)
                hit = hit & (place >= 0) & (place < PART)
                picked = tl.gather(dscores, tl.where(hit, place, 0), 1)
                sums = tl.sum(tl.where(hit, picked, 0.0), 0)
                table += tl.where(tl.arange(0, ROWS)[:, None] == i, sums[None, :], 0.0)
    wide = slot.to(tl.int64)
    store_tokens(dtaps + wide * size * HEAD_DIM, tap * HEAD_DIM, tap < size, sum_taps * scale, HEAD_DIM, BLOCK_D)
    if TAP_BIAS:
        tl.store(dtap_bias + wide * size + tap, sum_bias, mask=tap < size)
    if BIAS:
        entry = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        tl.store(drpb + tl.program_id(0).to(tl.int64) * entries + entry, table, mask=entry < entries)


@triton.jit(do_not_specialize=MIX_SIZES)
def mix_backward_value(
    grad, query, taps, tap_bias, rpb, lse, dvalue, scale, heads, height, width, dilation_h, dilation_w,
    tiles_h, tiles_w, stride_b, stride_h, stride_w, stride_n,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_E: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PART: tl.constexpr,
    TAP_BIAS: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of values: a loop over the queries that see any of them, QUERIES at a time.

    Scores of PART places at a time are moved to the keys: all of them would need more registers than threads have.
    """
    size: tl.constexpr = KERNEL_H * KERNEL_W
    head, first_h, first_w, size_h, size_w, class_h, class_w, image, members_h, members_w = locate(
        tl.program_id(0), heads, height, width, dilation_h, dilation_w, tiles_h, tiles_w
    )
    if (size_h <= 0) | (size_w <= 0):
        return
    key_h, key_w, exists = places(0, KEYS, first_h, first_w, size_h, size_w)
    start_h, extent_h = queries_of(first_h, size_h, members_h, KERNEL_H)
    start_w, extent_w = queries_of(first_w, size_w, members_w, KERNEL_W)
    one = tl.cast(image, tl.int64)
    first_pixel = one * height * width * heads
    taps += (one * heads + head) * size * HEAD_DIM
    rpb += head * (2 * KERNEL_H - 1) * (2 * KERNEL_W - 1)
    dv = tl.zeros([KEYS, BLOCK_E], tl.float32)
    for first in range(0, extent_h * extent_w, QUERIES):
        query_h, query_w, some = places(first, QUERIES, start_h, start_w, extent_h, extent_w)
        row, column = class_h + query_h * dilation_h, class_w + query_w * dilation_w
        pixels = (row * width + column) * heads + head
        q = load_tokens(query + one * stride_b + head * stride_n, row * stride_h + column * stride_w, HEAD_DIM, BLOCK_D)
        g = load_tokens(grad + first_pixel * VALUE_DIM, pixels * VALUE_DIM, VALUE_DIM, BLOCK_E)
        norm = tl.load(lse + first_pixel + pixels) * LOG2E
        seen = some[:, None] & sees(
            query_h[:, None], query_w[:, None], key_h[None, :], key_w[None, :],
            members_h, members_w, KERNEL_H, KERNEL_W,
        )  # fmt: skip
        bias = bias_of(
            rpb, query_h[:, None], query_w[:, None], key_h[None, :], key_w[None, :], seen, KERNEL_H, KERNEL_W, BIAS
        )
        place = places_of(query_h, query_w, key_h, key_w, members_h, members_w, KERNEL_H, KERNEL_W)
        scores = bias
        for first_tap in range(0, size, PART):
            tap = first_tap + tl.arange(0, PART)
            matrix = load_taps(taps, tap, size, HEAD_DIM, BLOCK_D)
            by_place = products(q, matrix, tap, tap_bias + head * size, scale, size, TAP_BIAS, PRECISION)
            here = seen & (place >= first_tap) & (place < first_tap + PART)
            scores += tl.where(here, tl.gather(by_place, tl.where(here, place - first_tap, 0), 1), 0.0)
        weights = tl.exp2(scores - norm[:, None])
        dv = tl.dot(tl.trans(weights.to(g.dtype)), g, dv, input_precision=PRECISION)
    row, column = class_h + key_h * dilation_h, class_w + key_w * dilation_w
    pixels = ((row * width + column) * heads + head) * VALUE_DIM
    store_tokens(dvalue + first_pixel * VALUE_DIM, pixels, exists, dv, VALUE_DIM, BLOCK_E)
