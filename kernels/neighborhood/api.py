"""The public operator: shapes, argument checks, choice of implementation.

Layout of every map: `(batch, height, width, heads, head_dim)`, any strides. Such tensors may be views into one packed
qkv projection; no copy is needed to call the function.

Which keys a query sees, per axis (the two-dimensional neighborhood is the product of the two axes):

* dilation `d` splits the axis into `d` groups by position modulo `d`; a query sees keys of its own group only;
* within its group it sees the `kernel` members centred on itself. Near an end the window is *shifted inward*, never
  truncated: the first query sees the first `kernel` members;
* where a group has fewer members than `kernel`, the window is the whole group.

Neighborhood Attention Transformer (Hassani et al., CVPR 2023, arXiv 2204.07143), section 3.1, with the relative
position bias of its section 3.3; dilation from arXiv 2209.15001.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from hybridzoo.kernels.neighborhood import operators, torch_impl

IMPLEMENTATIONS = ("auto", "triton", "torch")
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None  # does not import it: that would be slow


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    *,
    rpb: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Softmax attention of every token to the `kernel_size` window of tokens around it.

    `out[i] = softmax_j(scale * query[i] . key[j] + rpb[j - i]) value[j]`, per head, with `j` running over the
    neighborhood of `i` (see the module's docstring) and `j - i` counted in steps of the dilation. Differentiable in
    `query`, `key`, `value` and `rpb`; gradients are summed in a fixed order, so two runs give the same bits.

    Args:
        query, key, value: `(batch, height, width, heads, head_dim)`, one dtype and device, any height and width.
        kernel_size: window in tokens, `(rows, columns)` or one number for both; odd.
        dilation: step between the window's tokens, `(rows, columns)` or one number for both; 1 is none.
        rpb: relative position bias `(heads, 2 * rows - 1, 2 * columns - 1)`, any floating dtype, indexed by key minus
            query plus `kernel - 1`; added after scaling. (Swin's tables have the opposite sign.) Default none.
        scale: factor on the dot products, default `head_dim ** -0.5`.
        impl: `"triton"` (CUDA; elsewhere only under `TRITON_INTERPRET=1`), `"torch"` (any device) or `"auto"`, which
            takes Triton on CUDA where it supports the call, else torch. An explicit choice never falls back.

    Returns:
        `(batch, height, width, heads, head_dim)`, contiguous, in the dtype of `query`.

    Raises:
        ValueError: an argument does not fit, or `impl="triton"` cannot run this call; the message names the reason.

    Example:
        >>> import torch
        >>> from hybridzoo.kernels import na2d
        >>> q, k, v = torch.randn(3, 2, 30, 41, 4, 32)
        >>> rpb = torch.zeros(4, 13, 13, requires_grad=True)
        >>> na2d(q, k, v, kernel_size=7, dilation=2, rpb=rpb).shape
        torch.Size([2, 30, 41, 4, 32])
    """
    _check_query(query)
    _check_same("key", key, query)
    _check_same("value", value, query)
    kernel = _pair("kernel_size", kernel_size)
    steps = _pair("dilation", dilation)
    if not all(k % 2 for k in kernel):
        raise ValueError(f"kernel_size must be odd, so that a window has a middle; got {kernel_size}")
    if rpb is not None:
        _check_rpb(rpb, query, kernel)
    if scale is None:
        scale = query.shape[4] ** -0.5
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}; got {impl!r}")
    if impl == "triton" and (reason := _triton_cannot(query, kernel, steps)):
        raise ValueError(f"impl='triton' cannot run this call: {reason}; use impl='torch' or 'auto'")
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        # An exported program must run where hybridzoo is not installed: plain PyTorch operators, no node of ours.
        return torch_impl.exportable_forward(query, key, value, rpb, kernel, steps, scale)
    if impl == "auto":
        impl = "triton" if query.is_cuda and _triton_cannot(query, kernel, steps) is None else "torch"
    return operators.na2d(query, key, value, rpb, kernel, steps, scale, impl)[0]


def _triton_cannot(query: Tensor, kernel: tuple[int, int], dilation: tuple[int, int]) -> str | None:
    """Why Triton cannot run this call; None if it can."""
    if not TRITON_INSTALLED:
        return "Triton is not installed"
    if not query.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"query is on {query.device.type}, not on CUDA, and TRITON_INTERPRET=1 is not set"
    from hybridzoo.kernels.neighborhood import triton_impl  # only when used: Triton is slow to import

    return triton_impl.unsupported(query, kernel, dilation)


def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """`value` per axis (rows, columns), checked to be two positive whole numbers."""
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(isinstance(n, int) and n >= 1 for n in pair):
        raise ValueError(f"{name} must be a positive whole number or a pair (rows, columns) of them; got {value!r}")
    return pair[0], pair[1]


def _check_query(query: Tensor) -> None:
    if query.ndim != 5:
        raise ValueError(f"query must have shape (batch, height, width, heads, head_dim); got {tuple(query.shape)}")
    if not query.is_floating_point():
        raise ValueError(f"query must be a floating-point tensor; got {query.dtype}")
    if not (query.shape[1] and query.shape[2]):
        raise ValueError(f"query must have at least one row and one column; got {tuple(query.shape)}")


def _check_same(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.shape != query.shape:
        raise ValueError(f"{name} must have the shape of query, {tuple(query.shape)}; got {tuple(tensor.shape)}")
    if tensor.dtype != query.dtype or tensor.device != query.device:
        raise ValueError(
            f"{name} must share dtype and device with query ({query.dtype}, {query.device});"
            f" got {tensor.dtype}, {tensor.device}"
        )


def _check_rpb(rpb: Tensor, query: Tensor, kernel: tuple[int, int]) -> None:
    shape = (query.shape[3], 2 * kernel[0] - 1, 2 * kernel[1] - 1)
    if rpb.shape != shape:
        raise ValueError(
            f"rpb must have shape (heads, 2 * rows - 1, 2 * columns - 1) = {shape}; got {tuple(rpb.shape)}"
        )
    if not rpb.is_floating_point() or rpb.device != query.device:
        raise ValueError(f"rpb must be floating-point, on {query.device}; got {rpb.dtype}, {rpb.device}")
