"""Dynamic depthwise convolution on the GPU: which kernels run, on which tiles. See `triton_kernels`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hybridzoo.kernels import tuning
from hybridzoo.kernels.depthwise import triton_kernels
from hybridzoo.kernels.triton_common import Launch, Recipe
from hybridzoo.kernels.tuning import Config

PIXELS = {"convolve": 32, "backward_kernels": 16}  # pixels of a program's tile
CHANNELS = 64  # most channels of a tile
PROGRAMS = 4096  # images are cut into parts until `backward_kernels` has about so many programs
CONFIG = Config(0, 0, warps=4, stages=1)  # the block sizes are the constants above


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
    # Copies, not views of `partial`: the results of an operator must not share memory.
    return dx, sums[:, :9].mT.clone(memory_format=torch.contiguous_format), sums[:, 9].clone()


def forward_launch(x: Tensor, kernels: Tensor, bias: Tensor | None, out: Tensor) -> Launch:
    return _convolve(x, kernels, bias, out, flip=False)


def backward_launches(grad: Tensor, x: Tensor, kernels: Tensor, dx: Tensor) -> tuple[list[Launch], Tensor]:
    """The kernels, and the partial sums `(batch, parts, 10, channels)` of the gradients of kernels and bias."""
    grad, x = grad.contiguous(), _dense_channels(x)
    sums = _sums(tuple(x.shape), x.stride(), x.device)
    partial = torch.empty(x.shape[0], sums.arguments["parts"], 10, x.shape[3], dtype=torch.float32, device=x.device)
    launch = sums.launch(dict(grad=grad, x=x, partial=partial))
    return [_convolve(grad, kernels, None, dx, flip=True), launch], partial


def _convolve(x: Tensor, kernels: Tensor, bias: Tensor | None, out: Tensor, flip: bool) -> Launch:
    x, kernels = _dense_channels(x), kernels.contiguous()
    shift = kernels if bias is None else bias.contiguous()  # without bias, a placeholder that is not read
    recipe = _convolution(tuple(x.shape), x.stride(), x.device, bias is not None, flip)
    return recipe.launch(dict(x=x, kernels=kernels, bias=shift, out=out))


@tuning.plan
def _convolution(
    shape: tuple[int, ...], strides: tuple[int, ...], device: torch.device, bias: bool, flip: bool
) -> Recipe:
    tiling, groups = _tiling("convolve", shape, strides)
    programs = shape[0] * groups * tiling["tiles"]
    return Recipe.of(triton_kernels.convolve, programs, tiling | dict(BIAS=bias, FLIP=flip), CONFIG)


@tuning.plan
def _sums(shape: tuple[int, ...], strides: tuple[int, ...], device: torch.device) -> Recipe:
    tiling, groups = _tiling("backward_kernels", shape, strides)
    programs = shape[0] * groups * 3
    parts = min(tiling["tiles"], max(1, PROGRAMS // programs))
    return Recipe.of(triton_kernels.backward_kernels, programs * parts, tiling | dict(parts=parts), CONFIG)


def _tiling(kernel: str, shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[dict[str, int], int]:
    """Sizes and strides for the kernel, and the number of channel blocks."""
    _, height, width, channels = shape
    block = min(CHANNELS, triton.next_power_of_2(channels))
    if channels % block and channels % (block // 2) == 0:
        block //= 2  # 96 channels make three blocks of 32, not two of 64
    pixels = PIXELS[kernel] * (CHANNELS // block)
    steps = dict(zip(("stride_b", "stride_h", "stride_w"), strides, strict=False))
    sizes = dict(height=height, width=width, channels=channels, tiles=triton.cdiv(height * width, pixels))
    return sizes | steps | dict(PIXELS=pixels, CHANNELS=block), triton.cdiv(channels, block)


def _dense_channels(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()
