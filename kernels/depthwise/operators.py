"""Dynamic depthwise convolution in Triton as two `torch.library` operators: one node per direction."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridzoo.kernels.operators_common import differentiable, differentiable_once, operator


@operator
def dynamic_depthwise_conv2d(x: Tensor, kernels: Tensor, bias: Tensor | None) -> Tensor:
    from hybridzoo.kernels.depthwise import triton_impl  # imported only when used, because Triton is slow to import

    return triton_impl.forward(x, kernels, bias)


@operator
def dynamic_depthwise_conv2d_backward(grad: Tensor, x: Tensor, kernels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of maps, kernels and bias."""
    from hybridzoo.kernels.depthwise import triton_impl

    return triton_impl.backward(grad, x, kernels)


@torch.library.register_fake("hybridzoo::dynamic_depthwise_conv2d")
def _(x, kernels, bias):
    return x.new_empty(x.shape)


@torch.library.register_fake("hybridzoo::dynamic_depthwise_conv2d_backward")
def _(grad, x, kernels):
    return x.new_empty(x.shape), kernels.new_empty(kernels.shape), kernels.new_empty(kernels.shape[:2])


def _save(ctx, inputs, output):
    x, kernels, bias = inputs
    ctx.save_for_backward(x, kernels)
    ctx.with_bias = bias is not None


def _differentiate(ctx, grad):
    dx, dkernels, dbias = _backward(grad, *ctx.saved_tensors)
    return dx, dkernels, dbias if ctx.with_bias else None


_backward = differentiable_once(dynamic_depthwise_conv2d_backward, "dynamic_depthwise_conv2d")
convolve = differentiable(dynamic_depthwise_conv2d, "dynamic_depthwise_conv2d", _save, _differentiate)
