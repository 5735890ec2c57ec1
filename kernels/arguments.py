"""Argument checks that the operators and their layers share, and the choice of implementation.

Every message names the argument, the value that was given, and which values are valid. A value that is not a tensor or
a number where one is needed raises `TypeError`; every other error is a `ValueError`. Sizes may be symbolic
(`torch.SymInt`), so no check compares two of them.
"""

from __future__ import annotations

import importlib.util
import math
import numbers
import operator
import os
from typing import Any

import torch
from torch import Tensor

IMPLEMENTATIONS = ("auto", "triton", "torch")
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None  # does not import Triton, which would be slow
PAIRS, WHOLE = (tuple, list), (int, torch.SymInt)  # Python would build a union of types again in every call
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def whole(value: Any) -> int | None:
    """`value` if it is a positive whole number (numpy's and symbolic numbers too), otherwise None."""
    if isinstance(value, bool):
        return None
    if not isinstance(value, WHOLE):
        try:
            value = operator.index(value)
        except TypeError:
            return None
    return value if value >= 1 else None


def positive(name: str, value: Any) -> int:
    """`value`, checked to be a positive whole number."""
    number = whole(value)
    if number is None:
        raise ValueError(f"{name} must be a positive whole number; got {value!r}")
    return number


def odd(name: str, value: Any) -> int:
    """`value`, checked to be a positive odd number."""
    number = positive(name, value)
    if number % 2 == 0:
        raise ValueError(f"{name} must be odd, so that a window has a middle; got {value!r}")
    return number


def pair(name: str, value: Any, axes: str = "rows, columns") -> tuple[int, int]:
    """`value` for each axis: one positive whole number for both axes, or a tuple or list of two."""
    first, second = value if isinstance(value, PAIRS) and len(value) == 2 else (value, value)
    rows, columns = whole(first), whole(second)
    if rows is None or columns is None:
        raise ValueError(f"{name} must be a positive whole number or a pair ({axes}) of them; got {value!r}")
    return rows, columns


def window(name: str, value: Any) -> tuple[int, int]:
    """Like `pair`; both numbers must be odd."""
    rows, columns = pair(name, value)
    if rows % 2 == 0 or columns % 2 == 0:
        raise ValueError(f"{name} must be odd, so that a window has a middle; got {value!r}")
    return rows, columns


def channels(dim: Any, num_heads: Any) -> None:
    """`dim`, checked to be a multiple of `num_heads`."""
    if (heads := whole(num_heads)) is None or (total := whole(dim)) is None or total % heads:
        raise ValueError(f"dim must be a positive multiple of num_heads; got dim={dim!r}, num_heads={num_heads!r}")


def factor(name: str, value: Any, default: float) -> float:
    """`value`, checked to be a finite real number; `default` for None."""
    if value is None:
        return default
    if isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a number, got a tensor, which would receive no gradient. Multiply query by the tensor and"
            f" pass {name}=1"
        )
    symbolic = isinstance(value, torch.SymInt | torch.SymFloat)
    if isinstance(value, bool) or not (symbolic or isinstance(value, numbers.Real)):
        raise TypeError(f"{name} must be a number, or None for the default; got {value!r}")
    if symbolic or torch.compiler.is_compiling():  # a compiler may pass a symbol as an ordinary number
        return value
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite; got {value!r}")
    return float(value)


def tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")


def floating(name: str, value: Tensor) -> None:
    if value.dtype not in DTYPES:
        raise ValueError(
            f"{name} must be a floating-point tensor, float16, bfloat16, float32 or float64; got {value.dtype}"
        )


def token_map(name: str, value: Any) -> None:
    """Check that `value` is a map of tokens. Only its batch may be empty."""
    tensor(name, value)
    if value.ndim != 5:
        raise ValueError(f"{name} must have shape (batch, height, width, heads, head_dim); got {tuple(value.shape)}")
    floating(name, value)
    if any(size == 0 for size in value.shape[1:]):
        raise ValueError(f"{name} must have at least one row, column, head and channel; got {tuple(value.shape)}")


def alike(name: str, value: Any, query: Tensor) -> None:
    """Check that `value` is a map with the shape, dtype and device of `query`."""
    tensor(name, value)
    if value.shape != query.shape:
        raise ValueError(f"{name} must have the shape of query, {tuple(query.shape)}; got {tuple(value.shape)}")
    same_kind(name, value, query)


def same_kind(name: str, value: Tensor, query: Tensor) -> None:
    """Check that `value` has the dtype and device of `query`."""
    if value.dtype != query.dtype or value.device != query.device:
        raise ValueError(
            f"{name} must share dtype and device with query ({query.dtype}, {query.device});"
            f" got {value.dtype}, {value.device}"
        )


def table(name: str, value: Any, query: Tensor, axes: str, shape: tuple[int, ...]) -> None:
    """Check that `value` has `shape` and any floating dtype; `axes` names the axes for the message."""
    tensor(name, value)
    if value.shape != shape:
        raise ValueError(f"{name} must have shape ({axes}) = {shape}; got {tuple(value.shape)}")
    if value.dtype not in DTYPES or value.device != query.device:
        raise ValueError(f"{name} must be floating-point, on {query.device}; got {value.dtype}, {value.device}")


@torch.compiler.assume_constant_result  # PyTorch 2.11 replaces `is_exporting` by True in everything it compiles
def exporting() -> bool:
    """Whether a program is being exported. It must run without hybridzoo, so it may not contain our operators."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()  # also by ONNX's exporters, the new and the old one


def open_map(query: Tensor) -> bool:
    """Whether a program is being exported whose map has a dynamic height or width."""
    return any(isinstance(side, torch.SymInt) for side in query.shape[1:3])


def implementation(impl: Any, query: Tensor, limit: str | None = None, *, widths: tuple[int, int] = (16, 128)) -> str:
    """The implementation for a call, `"triton"` or `"torch"`.

    Args:
        impl: what the caller asked for: `"auto"`, `"triton"` or `"torch"`.
        query: the map that the operator works on.
        limit: a further reason why the operator's Triton kernels cannot run the call; None if there is no reason.
        widths: the smallest and the largest head_dim that its Triton kernels support.

    Raises:
        ValueError: `impl` is not one of the three, or it is `"triton"` and Triton cannot run the call. An explicit
            choice is never replaced by another one.
    """
    if not isinstance(impl, str) or impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}; got {impl!r}")
    if impl == "torch" or (impl == "auto" and not query.is_cuda):
        return "torch"
    reason = _triton_cannot(query, widths) or limit
    if impl == "triton" and reason:
        raise ValueError(f"impl='triton' cannot run this call: {reason}; use impl='torch' or 'auto'")
    return "torch" if reason else "triton"


def _triton_cannot(query: Tensor, widths: tuple[int, int]) -> str | None:
    """The reason why no Triton kernel can run a call on this map, or None if one can."""
    if not TRITON_INSTALLED:
        return "Triton is not installed"
    if exporting():
        return "an exported program may contain only PyTorch's own operators"
    if not query.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the map is on {query.device.type}, not on CUDA, and TRITON_INTERPRET=1 is not set"
    from hybridzoo.kernels import triton_common  # imported only when used, because Triton is slow to import

    return triton_common.unsupported(query, widths)
