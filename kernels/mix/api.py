"""The public operator of dynamic convolution: neighborhood attention whose keys are the places of the window.

Layout, neighborhoods and border rule are those of `na2d`. Only the scores differ: an image has one vector (a
*tap*) for every place of the window, row by row. The score of a key is the dot product of the query with the tap of the
key's place in the window. At a border, where the window is shifted inward, places keep their taps: the window's first
token always has the first tap.

OverLoCK (Lou and Yu, CVPR 2025, arXiv 2502.20087), section 3.3: "context-mixing dynamic kernels".
"""

from __future__ import annotations

from torch import Tensor

from hybridzoo.kernels import arguments
from hybridzoo.kernels.mix import any_size, operators, torch_impl
from hybridzoo.kernels.mix.given import Mix
from hybridzoo.kernels.neighborhood.api import limit
from hybridzoo.kernels.neighborhood.given import Window
from hybridzoo.kernels.operators_common import full_precision

TRITON_WIDTHS = (1, 32)  # smallest and largest width of a head, for queries and for values


def neighborhood_mix2d(
    query: Tensor,
    taps: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    *,
    tap_bias: Tensor | None = None,
    rpb: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Average the values of every token's window with weights that the token computes from the taps of its image.

    `out[i] = softmax_j(scale * query[i] . taps[t] + tap_bias[t] + rpb[j - i]) value[j]`, per head, where `j` runs over
    the neighborhood of `i` as in `na2d`, and `t` is the place of `j` in it. Differentiable once, in reverse mode, with
    respect to all five tensors. Gradients are summed in a fixed order, so two runs give the same bits.

    Args:
        query: `(batch, height, width, heads, head_dim)`, any strides, height and width; the batch may be empty.
        taps: `(batch, heads, rows * columns, head_dim)`, a vector for every place of the window, row by row. If a
            dilation group has fewer members than the window, the last places along that axis are not used.
        value: `(batch, height, width, heads, value_dim)`.
        kernel_size: size of the window in tokens, `(rows, columns)` or one number for both; odd.
        dilation: step between the window's tokens, `(rows, columns)` or one number for both; 1 means no dilation.
        tap_bias: `(heads, rows * columns)`, any floating dtype, added to the scores by place. Default None.
        rpb: relative position bias `(heads, 2 * rows - 1, 2 * columns - 1)`, any floating dtype, indexed by key minus
            query plus `kernel - 1`. Default None.
        scale: factor on the dot products, default `head_dim ** -0.5`.
        impl: `"triton"` (CUDA; on other devices only with `TRITON_INTERPRET=1`), `"torch"` (any device) or `"auto"`:
            Triton on CUDA if it supports the call, otherwise torch. With `"triton"`, a call that Triton cannot run
            raises, for example in `torch.export`.

    Returns:
        `(batch, height, width, heads, value_dim)`, contiguous, in the dtype of `query`.

    Raises:
        ValueError: an argument is not valid, or `impl="triton"` cannot run this call; the message names the reason.
        TypeError: an argument that must be a tensor or a number is of another type.
        NotImplementedError: a second or a forward-mode derivative is requested.

    Example:
        >>> import torch
        >>> from hybridzoo.kernels import neighborhood_mix2d
        >>> query, value = torch.randn(2, 2, 30, 41, 4, 16)
        >>> taps = torch.randn(2, 4, 13 * 13, 16)
        >>> neighborhood_mix2d(query, taps, value, kernel_size=13).shape
        torch.Size([2, 30, 41, 4, 16])
    """
    arguments.token_map("query", query)
    kernel = arguments.window("kernel_size", kernel_size)
    steps = arguments.pair("dilation", dilation)
    batch, heads, places = query.shape[0], query.shape[3], kernel[0] * kernel[1]
    _shaped("taps", taps, query, "batch, heads, rows * columns, head_dim", (batch, heads, places, query.shape[4]))
    width = value.shape[4] if isinstance(value, Tensor) and value.ndim == 5 and value.shape[4] else 1
    _shaped("value", value, query, "batch, height, width, heads, value_dim", (*query.shape[:4], width))
    if tap_bias is not None:
        arguments.table("tap_bias", tap_bias, query, "heads, rows * columns", (heads, places))
    if rpb is not None:
        shape = (heads, 2 * kernel[0] - 1, 2 * kernel[1] - 1)
        arguments.table("rpb", rpb, query, "heads, 2 * rows - 1, 2 * columns - 1", shape)
    window = Window(kernel, steps, arguments.factor("scale", scale, query.shape[4] ** -0.5))
    impl = arguments.implementation(impl, query, limit(window) or _too_wide(value), widths=TRITON_WIDTHS)
    if arguments.exporting():
        forward = any_size.forward if arguments.open_map(query) else torch_impl.exportable_forward
        with full_precision(query):
            return forward(Mix(query, taps, value, tap_bias, rpb), window)
    return operators.mix(query, taps, value, tap_bias, rpb, *window, impl)[0]


def _shaped(name: str, value: Tensor, query: Tensor, axes: str, shape: tuple[int, ...]) -> None:
    """Check that `value` has `shape` and the dtype and device of `query`; `axes` names the axes for the message."""
    arguments.tensor(name, value)
    if value.shape != shape:
        raise ValueError(f"{name} must have shape ({axes}) = {shape}; got {tuple(value.shape)}")
    arguments.same_kind(name, value, query)


def _too_wide(value: Tensor) -> str | None:
    """The reason why the Triton kernels do not support such values, or None if they do."""
    if value.shape[4] > TRITON_WIDTHS[1]:
        return f"value_dim {value.shape[4]} does not lie between {TRITON_WIDTHS[0]} and {TRITON_WIDTHS[1]}"
    return None
