"""Dynamic depthwise convolution on the GPU: which kernels run, on which tiles. See `triton_kernels`."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from hybridzoo.kernels.depthwise import triton_kernels
from hybridzoo.kernels.triton_common import Launch

PIXELS = {"convolve": 32, "backward_kernels": 16}  # of a program's tile
CHANNELS = 64  # at most
PROGRAMS = 4096  # of `backward_kernels`, about: images are cut into parts until there are as many
OPTIONS: dict[str, Any] = dict(num_warps=4, num_stages=1, enable_fp_fusion=True)


def forward(x: Tensor, kernels: Tensor, bias: Tensor | None) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        with torch.cuda.device_of(x):
            forward_launch(x, kernels, bias, out).run()
    return out


def backward(grad: Tensor, x: Tensor, kernels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of maps, kernels and bias."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not dx.numel():
        return dx, kernels.new_empty(kernels.shape), kernels.new_empty(kernels.shape[:2])
    with torch.cuda.device_of(x):
        launches, partial = backward_launches(grad, x, kernels, dx)
        for one in launches:
            one.run()
    sums = partial.sum(1).to(kernels.dtype)
    # Never views of it: an operator's results may not share memory.
    return dx, sums[:, :9].mT.clone(memory_format=torch.contiguous_format), sums[:, 9].clone()


def forward_launch(x: Tensor, kernels: Tensor, bias: Tensor | None, out: Tensor) -> Launch:
    return _convolve(x, kernels, bias, out, flip=False)


def backward_launches(grad: Tensor, x: Tensor, kernels: Tensor, dx: Tensor) -> tuple[list[Launch], Tensor]:
    """The kernels in any order, and the parts, `(batch, parts, 10, channels)`, of the sums of kernels and bias."""
    grad, x = grad.contiguous(), _dense_channels(x)
    tiling, groups = _tiling("backward_kernels", x)
    programs = x.shape[0] * groups * 3
    parts = min(tiling["tiles"], max(1, PROGRAMS // programs))
    partial = torch.empty(x.shape[0], parts, 10, x.shape[3], dtype=torch.float32, device=x.device)
    arguments = dict(grad=grad, x=x, partial=partial, parts=parts) | tiling
    sums = Launch(triton_kernels.backward_kernels, programs * parts, arguments, OPTIONS)
    return [_convolve(grad, kernels, None, dx, flip=True), sums], partial


def _convolve(x: Tensor, kernels: Tensor, bias: Tensor | None, out: Tensor, flip: bool) -> Launch:
    x, kernels = _dense_channels(x), kernels.contiguous()
    tiling, groups = _tiling("convolve", x)
    shift = kernels if bias is None else bias.contiguous()  # a pointer that nobody reads
    arguments = dict(x=x, kernels=kernels, bias=shift, out=out, BIAS=bias is not None, FLIP=flip) | tiling
    return Launch(triton_kernels.convolve, x.shape[0] * groups * tiling["tiles"], arguments, OPTIONS)


def _tiling(kernel: str, x: Tensor) -> tuple[dict[str, int], int]:
    """Sizes and strides for the kernel; groups of channels."""
    _, height, width, channels = x.shape
    block = min(CHANNELS, triton.next_power_of_2(channels))
    if channels % block and channels % (block // 2) == 0:
        block //= 2  # 96 channels are three blocks of 32, not two of 64
    pixels = PIXELS[kernel] * (CHANNELS // block)
    strides = dict(zip(("stride_b", "stride_h", "stride_w"), x.stride(), strict=False))
    sizes = dict(height=height, width=width, channels=channels, tiles=triton.cdiv(height * width, pixels))
    return sizes | strides | dict(PIXELS=pixels, CHANNELS=block), triton.cdiv(channels, block)


def _dense_channels(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()
