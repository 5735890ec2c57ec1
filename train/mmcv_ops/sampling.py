"""Deformable convolutions and multi-scale deformable attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import deform_conv2d

__all__ = [
    "deform_conv_backward_input",
    "deform_conv_backward_parameters",
    "deform_conv_forward",
    "modulated_deform_conv_backward",
    "modulated_deform_conv_forward",
    "ms_deform_attn_backward",
    "ms_deform_attn_forward",
]


def _gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad_output: Tensor) -> tuple[Tensor, ...]:
    """Gradients of `function(*inputs)` with respect to every input, given the gradient of its output.

    Runs the forward pass again: mmcv's autograd functions give their backward pass the inputs, not a graph.
    """
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        output = function(*leaves)
        return torch.autograd.grad(output, leaves, grad_output.to(output.dtype))


def _deform_conv(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, bias: Tensor | None, geometry: Any
) -> Tensor:
    """torchvision's operator; the two libraries order offsets alike (y, x per kernel tap, per offset group)."""
    stride, padding, dilation = geometry
    precise = torch.promote_types(input.dtype, torch.float32)  # torchvision's CPU operator takes no half precision
    tensors = [None if x is None else x.to(precise) for x in (input, offset, weight, bias, mask)]
    x, offset, weight, bias, mask = tensors  # type: ignore[assignment]
    return deform_conv2d(x, offset, weight, bias, stride, padding, dilation, mask)


def _v1_geometry(arguments: dict[str, Any]) -> tuple[tuple[int, int], ...]:
    """Stride, padding and dilation from deform_conv's keywords (dH, dW, padH, ...); sizes follow from the shapes."""
    return tuple((arguments[f"{name}H"], arguments[f"{name}W"]) for name in ("d", "pad", "dilation"))


def _v2_geometry(arguments: dict[str, Any]) -> tuple[tuple[int, int], ...]:
    return tuple((arguments[f"{name}_h"], arguments[f"{name}_w"]) for name in ("stride", "pad", "dilation"))


def deform_conv_forward(
    input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor, **arguments: Any
) -> None:
    """Deformable convolution (arXiv 1703.06211) to `output`; the workspaces `columns` and `ones` stay unused."""
    output.copy_(_deform_conv(input, weight, offset, None, None, _v1_geometry(arguments)))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **arguments: Any,
) -> None:
    geometry = _v1_geometry(arguments)
    grads = _gradients(lambda x, o: _deform_conv(x, weight, o, None, None, geometry), [input, offset], grad_output)
    grad_input.copy_(grads[0])
    grad_offset.copy_(grads[1])


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    scale: float,
    **arguments: Any,
) -> None:
    """Add `scale` times the weight's gradient to `grad_weight`, which the caller zeroed."""
    geometry = _v1_geometry(arguments)
    weight = torch.zeros_like(grad_weight)  # the convolution is linear in its weight: the values do not matter
    (grad,) = _gradients(lambda w: _deform_conv(input, w, offset, None, None, geometry), [weight], grad_output)
    grad_weight += scale * grad


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    with_bias: bool,
    **arguments: Any,
) -> None:
    """Modulated deformable convolution (DCNv2, arXiv 1811.11168) to `output`."""
    geometry = _v2_geometry(arguments)
    output.copy_(_deform_conv(input, weight, offset, mask, bias if with_bias else None, geometry))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    with_bias: bool,
    **arguments: Any,
) -> None:
    geometry = _v2_geometry(arguments)
    grads = _gradients(
        lambda x, w, o, m: _deform_conv(x, w, o, m, None, geometry), [input, weight, offset, mask], grad_output
    )
    for target, grad in zip((grad_input, grad_weight, grad_offset, grad_mask), grads, strict=True):
        target.copy_(grad)
    if with_bias:
        grad_bias.copy_(grad_output.sum((0, 2, 3)))


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Multi-scale deformable attention (arXiv 2010.04159) with `grid_sample`, as in mmcv's CPU code."""
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    shapes = value_spatial_shapes.tolist()
    return multi_scale_deformable_attn_pytorch(value, shapes, sampling_locations, attention_weights)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    grads = _gradients(
        lambda v, loc, w: ms_deform_attn_forward(v, value_spatial_shapes, value_level_start_index, loc, w, im2col_step),
        [value, sampling_locations, attention_weights],
        grad_output,
    )
    for target, grad in zip((grad_value, grad_sampling_loc, grad_attn_weight), grads, strict=True):
        target.copy_(grad)
