"""Resizing and pooling of maps as products with small matrices: exact, and with the same gradient bits on every run.

PyTorch's own bilinear resize and adaptive pooling add up their CUDA gradients in whatever order threads arrive. On a
CPU they do not, and are several times as fast.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridzoo.layers.slicing import transformed

KEPT_MATRICES = 1024  # of a few kilobytes each; a GPU needs longer to launch what makes one than to multiply by it

_kept: dict[tuple[object, ...], Tensor] = {}


def resize_map(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of the last two axes (half-pixel centres, no antialiasing), of learned tables of any rank.

    Under autocast computed in float64, so that no table is rounded to bfloat16 on its way.

    Args:
        x: `(..., height, width)`.
        size: new `(height, width)`; `x` itself is returned if it has that size already.

    Returns:
        `(..., *size)` in the dtype of `x`.
    """
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    kind = x.device.type
    wide = x.double() if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind) else x
    return (_interpolated if _eager_on_cpu(x) else _resized_by_products)(wide, size).to(x.dtype)


def _interpolated(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x.reshape(1, -1, *x.shape[-2:]), size, mode="bilinear").view(*x.shape[:-2], *size)


def _resized_by_products(x: Tensor, size: tuple[int, int]) -> Tensor:
    for axis, side in zip((-2, -1), size, strict=True):
        if x.shape[axis] != side:
            matrix = _linear(x.shape[axis], side, x)
            x = matrix @ x if axis == -2 else x @ matrix.t()
    return x


def adaptive_pool(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Adaptive average pooling of a channels-last map `(batch, height, width, dim)` to `(batch, *size, dim)`.

    As `torch.nn.AdaptiveAvgPool2d`: cell `i` of `g` along an axis of `n` tokens averages tokens `floor(i * n / g)` to
    `ceil((i + 1) * n / g)`, so cells overlap where `g` does not divide `n` and repeat where it exceeds `n`.
    """
    # ONNX has no such pooling unless cells are alike.
    if _eager_on_cpu(x):
        return F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)
    return _pool_by_products(x, size)


def _pool_by_products(x: Tensor, size: tuple[int, int]) -> Tensor:
    _, height, width, dim = x.shape
    if height != size[0]:
        x = (_bins(height, size[0], x) @ x.flatten(2)).unflatten(2, (width, dim))
    if width != size[1]:
        x = _bins(width, size[1], x) @ x
    return x


def _eager_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and not (torch.compiler.is_compiling() or torch.jit.is_tracing())


def _linear(old: int, new: int, like: Tensor) -> Tensor:
    """Matrix `(new, old)` of linear interpolation: a hat around each new centre, as wide as two old tokens."""

    def make() -> Tensor:
        centre = (torch.arange(new, dtype=like.dtype, device=like.device) + 0.5) * (old / new) - 0.5
        token = torch.arange(old, dtype=like.dtype, device=like.device)
        return (1 - (centre.clamp(0, old - 1)[:, None] - token).abs()).clamp(min=0)

    return _once(("linear", old, new), make, like)


def _bins(old: int, new: int, like: Tensor) -> Tensor:
    """Matrix `(new, old)` of adaptive average pooling."""

    def make() -> Tensor:
        cell = torch.arange(new, device=like.device)[:, None]
        start, stop = cell * old // new, ((cell + 1) * old + new - 1) // new
        token = torch.arange(old, device=like.device)
        return ((token >= start) & (token < stop)).to(like.dtype) / (stop - start).to(like.dtype)

    return _once(("bins", old, new), make, like)


def _once(key: tuple[object, ...], make: Callable[[], Tensor], like: Tensor) -> Tensor:
    """`make()`, a constant of dtype and device of `like`, or what that was before. Compilers fold it by themselves."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return make()
    key = (*key, like.dtype, like.device)
    matrix = _kept.get(key)
    if matrix is None:
        with torch.inference_mode(False):
            matrix = make()
        # What a mode or a transform of PyTorch's puts in its place (fake tensors) ends with that.
        if type(matrix) is Tensor and not transformed(matrix):
            if len(_kept) >= KEPT_MATRICES:
                _kept.clear()
            _kept[key] = matrix
    return matrix
