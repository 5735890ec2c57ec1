"""Dynamic depthwise convolution in Triton: one pass over a channels-last map, forward and for each gradient.

A program holds a tile of PIXELS pixels (row by row) and CHANNELS channels. Caches serve the nine reads of a pixel.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Sizes change in multi-scale training, so the kernel is not compiled again for each of them.
SIZES = ["height", "width", "tiles"]


@triton.jit
def _neighbours(tensor, pixel, channel, known, down, right, height, width, stride_h, stride_w):
    """`[PIXELS, CHANNELS]` in float32: the value `down` rows below and `right` columns right of every pixel, or 0."""
    row, column = pixel // width + down, pixel % width + right
    on_map = (pixel < height * width) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    pointers = tensor + (row * stride_h + column * stride_w)[:, None] + channel[None, :]
    return tl.load(pointers, mask=on_map[:, None] & known[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=SIZES)
def convolve(
    x, kernels, bias, out, height, width, channels, tiles, stride_b, stride_h, stride_w,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, BIAS: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    """A tile of the result. With FLIP, kernels are rotated by 180 degrees, which gives the gradient of the map."""
    groups = tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0)
    group, tile, image = program % groups, program // groups % tiles, (program // groups // tiles).to(tl.int64)
    pixel = tile * PIXELS + tl.arange(0, PIXELS)
    channel = group * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    weights = kernels + (image * channels + channel) * 9
    x += image * stride_b
    if BIAS:
        shift = tl.load(bias + image * channels + channel, mask=known, other=0.0).to(tl.float32)
    else:
        shift = tl.zeros([CHANNELS], tl.float32)
    total = tl.zeros([PIXELS, CHANNELS], tl.float32) + shift[None, :]
    for tap in tl.static_range(9):
        near = _neighbours(x, pixel, channel, known, tap // 3 - 1, tap % 3 - 1, height, width, stride_h, stride_w)
        weight = tl.load(weights + (8 - tap if FLIP else tap), mask=known, other=0.0).to(tl.float32)
        total += near * weight[None, :]
    places = out + (image * height * width + pixel)[:, None] * channels + channel[None, :]
    tl.store(places, total.to(out.dtype.element_ty), mask=(pixel < height * width)[:, None] & known[None, :])


@triton.jit(do_not_specialize=[*SIZES, "parts"])
def backward_kernels(
    grad, x, partial, height, width, channels, tiles, parts, stride_b, stride_h, stride_w,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums of gradient times map for one row (three values) of the kernels, over a part of an image's tiles.

    They are written to `partial[image, part]`, `(10, channels)`: nine values of the kernels and, from the program of
    the middle row, the sum of the gradient itself, which is the gradient of the bias.
    """
    groups = tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0)
    group, row, part = program % groups, program // groups % 3, program // groups // 3 % parts
    image = (program // groups // 3 // parts).to(tl.int64)
    channel = group * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    x += image * stride_b
    grad += image * height * width * channels
    left = tl.zeros([PIXELS, CHANNELS], tl.float32)
    middle, right, alone = left, left, left
    for tile in range(part, tiles, parts):
        pixel = tile * PIXELS + tl.arange(0, PIXELS)
        there = (pixel < height * width)[:, None] & known[None, :]
        slope = tl.load(grad + pixel[:, None] * channels + channel[None, :], mask=there, other=0.0).to(tl.float32)
        left += slope * _neighbours(x, pixel, channel, known, row - 1, -1, height, width, stride_h, stride_w)
        middle += slope * _neighbours(x, pixel, channel, known, row - 1, 0, height, width, stride_h, stride_w)
        right += slope * _neighbours(x, pixel, channel, known, row - 1, 1, height, width, stride_h, stride_w)
        alone += slope
    sums = partial + (image * parts + part) * 10 * channels + channel
    tl.store(sums + row * 3 * channels, tl.sum(left, 0), mask=known)
    tl.store(sums + (row * 3 + 1) * channels, tl.sum(middle, 0), mask=known)
    tl.store(sums + (row * 3 + 2) * channels, tl.sum(right, 0), mask=known)
    if row == 1:
        tl.store(sums + 9 * channels, tl.sum(alone, 0), mask=known)
