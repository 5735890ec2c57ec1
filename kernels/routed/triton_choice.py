"""Routed attention in Triton: the choice of regions. Two launches, all in float32.

Query and key are read once, in BiFormer-S at 224 pixels and batch 128 103 MB and 34 us at stage 1 (see
`triton_listed`). The products need less than a thousandth of those of the attention.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridzoo.kernels.routed.triton_tokens import SIZES, beyond_of, locate, tile_of


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
