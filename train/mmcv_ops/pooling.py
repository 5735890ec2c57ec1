"""RoI Align by torchvision. RoIs are (K, 5): batch index, x1, y1, x2, y2 in image pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridzoo.train.mmcv_ops.missing import not_provided

__all__ = ["roi_align_backward", "roi_align_forward"]

_AVERAGE = 1  # mmcv's pool_mode


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))  # torchvision's CPU operators take no half precision


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Pool the averages of `input` (B, C, H, W) to `output` (K, C, h, w); `argmax_y` and `argmax_x` stay unused."""
    if pool_mode != _AVERAGE:
        raise not_provided("roi_align with pool_mode='max'")
    maps = _precise(input)
    size = aligned_height, aligned_width
    output.copy_(
        torch.ops.torchvision.roi_align(maps, rois.to(maps.dtype), spatial_scale, *size, sampling_ratio, aligned)
    )


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    grad = _precise(grad_output)
    sizes = aligned_height, aligned_width, *grad_input.shape
    grad_input += torch.ops.torchvision._roi_align_backward(
        grad, rois.to(grad.dtype), spatial_scale, *sizes, sampling_ratio, aligned
    )
