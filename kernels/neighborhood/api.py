"""The public operator: shapes, argument checks, choice of implementation.

Layout of every map: `(batch, height, width, heads, head_dim)`, any strides. Such tensors may be views of one packed qkv
projection; no copy is needed to call the function.

Which keys a query sees, per axis (the two-dimensional neighborhood is the product of the two axes):

* dilation `d` splits the axis into `d` groups by position modulo `d`; a query sees only keys of its own group;
* in its group, it sees the `kernel` members centered on itself. Near an end the window is *shifted inward*, never
  truncated: the first query sees the first `kernel` members;
* if a group has fewer members than `kernel`, the window is the whole group.

Neighborhood Attention Transformer (Hassani et al., CVPR 2023, arXiv 2204.07143), section 3.1, with the relative
position bias of its section 3.3; dilation from arXiv 2209.15001.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hybridzoo.kernels import arguments
from hybridzoo.kernels.neighborhood import any_size, beyond, operators, torch_impl
from hybridzoo.kernels.neighborhood.given import Maps, Window
from hybridzoo.kernels.operators_common import full_precision

TRITON_KERNELS = (3, 13)  # smallest and largest window that the Triton kernels support


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    *,
    rpb: Tensor | None = None,
    fill: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Softmax attention of every token to the `kernel_size` window of tokens around it.

    `out[i] = softmax_j(scale * query[i] . key[j] + rpb[j - i]) value[j]`, per head, where `j` runs over the
    neighborhood of `i` (see the module's docstring) and `j - i` is counted in steps of the dilation. Differentiable
    once, in reverse mode, with respect to `query`, `key`, `value`, `rpb` and `fill`. Gradients are summed in a fixed
    order, so two runs give the same bits.

    Args:
        query, key, value: `(batch, height, width, heads, head_dim)`, one dtype and device, any height and width; the
            batch may be empty. In an exported program, batch, height and width may be dynamic.
        kernel_size: size of the window in tokens, `(rows, columns)` or one number for both; odd.
        dilation: step between the window's tokens, `(rows, columns)` or one number for both; 1 means no dilation.
        rpb: relative position bias `(heads, 2 * rows - 1, 2 * columns - 1)`, any floating dtype, indexed by key minus
            query plus `kernel - 1`; added after scaling. (Swin's tables have the opposite sign.) Default None.
        fill: `(2, heads, head_dim)`, any floating dtype: key and value of the tokens that extend a small map at its
            bottom and right. An axis with fewer than `kernel_size * dilation` tokens is extended to this number, so
            that every window is whole. These tokens are attended to like the others, but never created: the cost is
            that of the map. Default None: there are no such tokens. If no axis is extended, `fill` is not used and its
            gradient is `None`.
        scale: factor on the dot products, default `head_dim ** -0.5`.
        impl: `"triton"` (CUDA; on other devices only with `TRITON_INTERPRET=1`), `"torch"` (any device) or `"auto"`:
            Triton on CUDA if it supports the call, otherwise torch. With `"triton"`, a call that Triton cannot run
            raises, for example in `torch.export`.

    Returns:
        `(batch, height, width, heads, head_dim)`, contiguous, in the dtype of `query`.

    Raises:
        ValueError: an argument is not valid, or `impl="triton"` cannot run this call; the message names the reason.
        TypeError: an argument that must be a tensor or a number is of another type.
        NotImplementedError: a second or a forward-mode derivative is requested.

    Example:
        >>> import torch
        >>> from hybridzoo.kernels import na2d
        >>> q, k, v = torch.randn(3, 2, 30, 41, 4, 32)
        >>> rpb = torch.zeros(4, 13, 13, requires_grad=True)
        >>> na2d(q, k, v, kernel_size=7, dilation=2, rpb=rpb).shape
        torch.Size([2, 30, 41, 4, 32])
    """
    arguments.token_map("query", query)
    arguments.alike("key", key, query)
    arguments.alike("value", value, query)
    window = _window(query, kernel_size, dilation, rpb, fill, scale)
    impl = arguments.implementation(impl, query, limit(window))
    if arguments.exporting() and arguments.open_map(query):
        with full_precision(query):
            return any_size.forward(query, key, value, rpb, fill, *window)
    extends = fill is not None and beyond.reaches((query.shape[1], query.shape[2]), window)
    if arguments.exporting():
        with full_precision(query):
            out, lse = torch_impl.exportable_forward(Maps(query, key, value), rpb, window, extends)
    else:
        out, lse = operators.attend(query, key, value, rpb, *window, impl, extends)
    if fill is None or lse is None or not extends:
        return out
    return beyond.merge(out, lse, query, rpb, fill, window)


def na2d_packed(
    qkv: Tensor,
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    *,
    rpb: Tensor | None = None,
    fill: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """`na2d(*qkv.unbind(3), ...)`, but faster in training: query, key and value come from one projection.

    The backward pass writes the gradients of query, key and value into one tensor. With three tensors, autograd copies
    their gradients into one: it reads and writes six maps, in addition to the eight of the backward pass.

    Args:
        qkv: `(batch, height, width, 3, heads, head_dim)`.
        kernel_size, dilation, rpb, fill, scale, impl: see `na2d`.

    Returns:
        `(batch, height, width, heads, head_dim)`, contiguous, in the dtype of `qkv`.

    Raises:
        ValueError, TypeError, NotImplementedError: see `na2d`.

    Example:
        >>> import torch
        >>> from hybridzoo.kernels import na2d_packed
        >>> qkv = torch.nn.Linear(64, 3 * 64)(torch.randn(2, 30, 41, 64))
        >>> na2d_packed(qkv.unflatten(-1, (3, 2, 32)), kernel_size=7).shape
        torch.Size([2, 30, 41, 2, 32])
    """
    arguments.tensor("qkv", qkv)
    if qkv.ndim != 6 or qkv.shape[3] != 3:
        raise ValueError(f"qkv must have shape (batch, height, width, 3, heads, head_dim); got {tuple(qkv.shape)}")
    query = qkv.select(3, 0)  # key and value have the same shape, dtype and strides
    arguments.token_map("qkv", query)
    window = _window(query, kernel_size, dilation, rpb, fill, scale)
    if arguments.exporting() or (fill is not None and beyond.reaches((query.shape[1], query.shape[2]), window)):
        query, key, value = qkv.unbind(3)
        rest: dict[str, Any] = dict(rpb=rpb, fill=fill, scale=scale, impl=impl)  # in a trace, window.scale is a tensor
        return na2d(query, key, value, window.kernel, window.dilation, **rest)
    impl = arguments.implementation(impl, query, limit(window))
    return operators.attend(qkv, None, None, rpb, *window, impl, False)[0]


def _window(
    query: Tensor,
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int],
    rpb: Tensor | None,
    fill: Tensor | None,
    scale: float | None,
) -> Window:
    """Check the arguments and the tables, and return the window."""
    kernel = arguments.window("kernel_size", kernel_size)
    steps = arguments.pair("dilation", dilation)
    if rpb is not None:
        shape = (query.shape[3], 2 * kernel[0] - 1, 2 * kernel[1] - 1)
        arguments.table("rpb", rpb, query, "heads, 2 * rows - 1, 2 * columns - 1", shape)
    if fill is not None:
        arguments.table("fill", fill, query, "2, heads, head_dim", (2, *query.shape[3:]))
    return Window(kernel, steps, arguments.factor("scale", scale, query.shape[4] ** -0.5))


def limit(window: Window) -> str | None:
    """The reason why the Triton kernels do not support such a window, or None if they do."""
    smallest, largest = TRITON_KERNELS
    if all(smallest <= k <= largest for k in window.kernel):
        return None
    return f"kernel_size {window.kernel} does not lie between {smallest} and {largest}"
