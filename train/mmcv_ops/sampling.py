"""Deformable convolutions and attention, CARAFE upsampling, masked convolution and PSA masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

from hybridzoo.train.mmcv_ops._gradient import gradients

__all__ = [
    "carafe_backward",
    "carafe_forward",
    "carafe_naive_backward",
    "carafe_naive_forward",
    "deform_conv_backward_input",
    "deform_conv_backward_parameters",
    "deform_conv_forward",
    "masked_col2im_forward",
    "masked_im2col_forward",
    "modulated_deform_conv_backward",
    "modulated_deform_conv_forward",
    "ms_deform_attn_backward",
    "ms_deform_attn_forward",
    "psamask_backward",
    "psamask_forward",
]


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
    """Stride, padding and dilation out of deform_conv's keywords (dH, dW, padH, ...); sizes follow from the shapes."""
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
    grads = gradients(lambda x, o: _deform_conv(x, weight, o, None, None, geometry), [input, offset], grad_output)
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
    (grad,) = gradients(lambda w: _deform_conv(input, w, offset, None, None, geometry), [weight], grad_output)
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
    grads = gradients(
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
    """Multi-scale deformable attention (arXiv 2010.04159) by `grid_sample`, as mmcv itself does it on a CPU."""
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
    grads = gradients(
        lambda v, loc, w: ms_deform_attn_forward(v, value_spatial_shapes, value_level_start_index, loc, w, im2col_step),
        [value, sampling_locations, attention_weights],
        grad_output,
    )
    for target, grad in zip((grad_value, grad_sampling_loc, grad_attn_weight), grads, strict=True):
        target.copy_(grad)


def _carafe(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int) -> Tensor:
    """(B, C, H, W) and masks (B, groups * k * k, sH, sW) -> (B, C, sH, sW), CARAFE (arXiv 1905.02188)."""
    batch, channels, height, width = features.shape
    taps, s = kernel_size**2, scale_factor
    windows = F.unfold(features, kernel_size, padding=kernel_size // 2)
    windows = windows.view(batch, group_size, channels // group_size, taps, height, width)
    masks = masks.view(batch, group_size, taps, height, s, width, s)
    return torch.einsum("bgcthw,bgthiwj->bgchiwj", windows, masks).reshape(batch, channels, height * s, width * s)


def carafe_naive_forward(features: Tensor, masks: Tensor, output: Tensor, **sizes: int) -> None:
    output.copy_(_carafe(features, masks, **sizes))


def carafe_naive_backward(
    grad_output: Tensor, features: Tensor, masks: Tensor, grad_input: Tensor, grad_masks: Tensor, **sizes: int
) -> None:
    grads = gradients(lambda f, m: _carafe(f, m, **sizes), [features, masks], grad_output)
    grad_input.copy_(grads[0])
    grad_masks.copy_(grads[1])


def carafe_forward(
    features: Tensor,
    masks: Tensor,
    rfeatures: Tensor,
    routput: Tensor,
    rmasks: Tensor,
    output: Tensor,
    **sizes: int,
) -> None:
    """`routput` and `rmasks` are workspaces; `rfeatures` is all that backward gets to see of the features."""
    rfeatures.copy_(features)
    output.copy_(_carafe(features, masks, **sizes))


def carafe_backward(
    grad_output: Tensor,
    rfeatures: Tensor,
    masks: Tensor,
    rgrad_output: Tensor,
    rgrad_input_hs: Tensor,
    rgrad_input: Tensor,
    rgrad_masks: Tensor,
    grad_input: Tensor,
    grad_masks: Tensor,
    **sizes: int,
) -> None:
    carafe_naive_backward(grad_output, rfeatures, masks, grad_input, grad_masks, **sizes)


def masked_im2col_forward(
    features: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    data_col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Windows of `features` (1, C, H, W) at the M given output positions to `data_col` (C * kh * kw, M)."""
    padded = F.pad(features[0], (pad_w, pad_w, pad_h, pad_h))
    windows = padded.unfold(1, kernel_h, 1).unfold(2, kernel_w, 1)[:, mask_h_idx, mask_w_idx]  # (C, M, kh, kw)
    data_col.copy_(windows.permute(0, 2, 3, 1).reshape(data_col.shape))


def masked_col2im_forward(
    columns: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, output: Tensor, height: int, width: int, channels: int
) -> None:
    """Columns (C, M) to their positions in `output` (1, C, H, W); the rest stays as it is (zero)."""
    output[0, :, mask_h_idx, mask_w_idx] = columns


def _psamask(masks: Tensor, psa_type: int, h_mask: int, w_mask: int, half_h_mask: int, half_w_mask: int) -> Tensor:
    """Lay each position's own mask (B, h_mask * w_mask, H, W) over the map around it: (B, H * W, H, W), 0 elsewhere.

    Distribute (type 1): channel = the position that owns the mask, map = where it acts. Collect (0): the reverse.
    """
    height, width = masks.shape[-2:]
    y, x = torch.arange(height, device=masks.device), torch.arange(width, device=masks.device)
    row = (y - y[:, None] + half_h_mask)[:, None, :, None]  # (owner y, 1, target y, 1)
    column = (x - x[:, None] + half_w_mask)[None, :, None, :]
    inside = (row >= 0) & (row < h_mask) & (column >= 0) & (column < w_mask)
    index = (row * w_mask + column).where(inside, 0).view(height * width, height * width)
    spread = masks.flatten(2).transpose(1, 2).gather(2, index.expand(masks.size(0), -1, -1))  # (B, owner, target)
    spread = spread * inside.view_as(index)
    return (spread if psa_type else spread.transpose(1, 2)).reshape(masks.size(0), height * width, height, width)


def psamask_forward(
    input: Tensor, output: Tensor, psa_type: int, num_: int, h_feature: int, w_feature: int, **mask_size: int
) -> None:
    output.copy_(_psamask(input, psa_type, **mask_size))


def psamask_backward(
    grad_output: Tensor, grad_input: Tensor, psa_type: int, num_: int, h_feature: int, w_feature: int, **mask_size: int
) -> None:
    (grad,) = gradients(lambda m: _psamask(m, psa_type, **mask_size), [torch.zeros_like(grad_input)], grad_output)
    grad_input.copy_(grad)
