"""Resizing and pooling of maps as products with small matrices: exact, and with the same gradient bits on every run.

PyTorch's own bilinear resize and adaptive pooling sum their CUDA gradients in a random order of threads, and
ONNX has no adaptive pooling whose cells differ.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridzoo.kernels import arguments
from hybridzoo.kernels.open_sizes import is_open, surely
from hybridzoo.layers.precision import without_autocast


def resize_map(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of the last two axes (half-pixel centres, no antialiasing), of learned tables of any rank.

    Autocast is off inside, so that tables are not rounded to bfloat16.

    Args:
        x: `(..., height, width)`.
        size: new `(height, width)`; `x` itself is returned if it has that size already.

    Returns:
        `(..., *size)` in the dtype of `x`.
    """
    height, width = x.shape[-2:]
    with without_autocast(x):
        if not surely(height == size[0]):
            x = (x.transpose(-2, -1) @ _linear(height, size[0], x)).transpose(-2, -1)
        if not surely(width == size[1]):
            x = x @ _linear(width, size[1], x)
    return x


def adaptive_pool(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Adaptive average pooling of a channels-last map `(batch, height, width, dim)` to `(batch, *size, dim)`.

    As `torch.nn.AdaptiveAvgPool2d`: cell `i` of `g` along an axis of `n` tokens averages tokens `floor(i * n / g)` to
    `ceil((i + 1) * n / g)`, so cells overlap where `g` does not divide `n` and repeat where it exceeds `n`.
    """
    _, height, width, dim = x.shape
    if surely(height == size[0]) and surely(width == size[1]):
        return x
    rows = _bins(height, size[0], x)
    columns = rows if surely(height == width) and surely(size[0] == size[1]) else _bins(width, size[1], x)
    return columns @ (rows @ x.flatten(2)).unflatten(2, (width, dim))


def mean_pool(x: Tensor, kernel: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Average pooling of a map `(batch, dim, height, width)` without padding, as `torch.nn.AvgPool2d`.

    Programs with open sizes may have windows that follow from them.
    """
    if not is_open(*kernel, *stride):
        return F.avg_pool2d(x, kernel, stride)
    (height, width), (rows, columns) = x.shape[2:], kernel
    x = _means((height - rows) // stride[0] + 1, stride[0], rows, height, x) @ x
    return x @ _means((width - columns) // stride[1] + 1, stride[1], columns, width, x).t()


def _linear(old: int, new: int, like: Tensor) -> Tensor:
    """Matrix `(old, new)` of linear interpolation: its result for the identity."""
    identity = torch.eye(old, dtype=like.dtype, device=like.device)
    return F.interpolate(identity[None], size=new, mode="linear")[0]


def _bins(old: int, new: int, like: Tensor) -> Tensor:
    """Matrix `(new, old)` of adaptive average pooling: its result for the identity."""
    if not (torch.compiler.is_compiling() or arguments.exporting()):
        identity = torch.eye(old, dtype=like.dtype, device=like.device)
        return F.adaptive_avg_pool1d(identity[None], new)[0].T
    # Compilers make one kernel of the definition, for all sizes; ONNX has no such pooling. A cell averages the tokens
    # that it overlaps. On an axis of length `old * new`, tokens begin at multiples of `new`, cells at those of `old`.
    token, cell = torch.arange(old, device=like.device) * new, torch.arange(new, device=like.device) * old
    ahead = token - cell[:, None]
    overlaps = ((ahead > -new) & (ahead < old)).to(like.dtype)
    return overlaps / overlaps.sum(1, keepdim=True)


def _means(count: int, stride: int, kernel: int, old: int, like: Tensor) -> Tensor:
    """Matrix `(count, old)` of means of `kernel` tokens, `stride` apart."""
    start = torch.arange(count, device=like.device)[:, None] * stride
    token = torch.arange(old, device=like.device)
    return ((token >= start) & (token < start + kernel)).to(like.dtype) / kernel
