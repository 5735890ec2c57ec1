"""The public operator: shapes, argument checks, choice of implementation.

InLine attention (Han et al., NeurIPS 2024, arXiv 2412.06590) adds such a convolution of its values ("local residual").
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridzoo.kernels import arguments
from hybridzoo.kernels.depthwise import operators, torch_impl


def dynamic_depthwise_conv2d(x: Tensor, kernels: Tensor, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """3x3 cross-correlation with zero padding; each channel of each image has its own kernel and bias.

    Differentiable with respect to all tensors. Triton's result is differentiable once, in reverse mode; sums are taken
    in float32 and in a fixed order, so two runs give the same bits.

    Args:
        x: channels-last maps `(batch, height, width, channels)`, any strides; the batch may be empty.
        kernels: `(batch, channels, 9)`, row by row; any floating dtype, rounded to that of `x`.
        bias: `(batch, channels)`, any floating dtype, rounded to that of `x`, added to every pixel; default None.
        impl: `"triton"` (CUDA; on other devices only with `TRITON_INTERPRET=1`), `"torch"` (any device) or `"auto"`:
            Triton on CUDA if it supports the call, otherwise torch. Under a compiler, `"auto"` uses torch, as nine
            products that the compiler fuses. With `"triton"`, a call that Triton cannot run raises.

    Returns:
        `(batch, height, width, channels)` in the dtype of `x`.

    Raises:
        ValueError: an argument is not valid, or `impl="triton"` cannot run this call; the message names the reason.
        TypeError: an argument is not a tensor.
        NotImplementedError: a second or a forward-mode derivative of Triton's result is requested.

    Example:
        >>> import torch
        >>> from hybridzoo.kernels import dynamic_depthwise_conv2d
        >>> maps, kernels = torch.randn(2, 14, 14, 64), torch.randn(2, 64, 9)
        >>> dynamic_depthwise_conv2d(maps, kernels).shape
        torch.Size([2, 14, 14, 64])
    """
    arguments.tensor("x", x)
    if x.ndim != 4 or any(size == 0 for size in x.shape[1:]):
        raise ValueError(
            f"x must have shape (batch, height, width, channels), and only the batch may be empty; got {tuple(x.shape)}"
        )
    arguments.floating("x", x)
    batch, _, _, channels = x.shape
    arguments.table("kernels", kernels, x, "batch, channels, 9", (batch, channels, 9))
    kernels = kernels.to(x.dtype)
    if bias is not None:
        arguments.table("bias", bias, x, "batch, channels", (batch, channels))
        bias = bias.to(x.dtype)
    by_compiler = torch.compiler.is_compiling() or torch.jit.is_tracing()
    impl = arguments.implementation("torch" if impl == "auto" and by_compiler else impl, x)
    if impl == "triton":
        return operators.convolve(x, kernels, bias)
    return torch_impl.forward(x, kernels, bias, by_compiler)
