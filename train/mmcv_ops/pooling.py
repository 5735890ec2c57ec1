"""RoI Align, RoI pooling and border alignment. RoIs are (K, 5): batch index, x1, y1, x2, y2 in image pixels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hybridzoo.train.mmcv_ops._gradient import gradients

__all__ = [
    "border_align_backward",
    "border_align_forward",
    "roi_align_backward",
    "roi_align_forward",
    "roi_pool_backward",
    "roi_pool_forward",
]

_MAX, _AVERAGE = 0, 1  # mmcv's pool_mode


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))  # torchvision's CPU operators take no half precision


def _bilinear(planes: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Values of `planes` (..., H, W) at points y, x (..., P): RoI Align's rule, 0 beyond one pixel outside the map.

    Points up to one pixel outside read the border, unlike `grid_sample`, which fades there.
    """
    height, width = planes.shape[-2:]
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    top, left = y.floor().clamp(max=max(height - 2, 0)), x.floor().clamp(max=max(width - 2, 0))
    down, right = y - top, x - left

    def pixel(row: Tensor, column: Tensor) -> Tensor:
        index = row.clamp(max=height - 1).long() * width + column.clamp(max=width - 1).long()
        return planes.flatten(-2).gather(-1, index.expand(*planes.shape[:-2], index.size(-1)))

    upper = (1 - right) * pixel(top, left) + right * pixel(top, left + 1)
    lower = (1 - right) * pixel(top + 1, left) + right * pixel(top + 1, left + 1)
    return ((1 - down) * upper + down * lower) * inside


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
    """Pool `input` (B, C, H, W) to `output` (K, C, h, w); in max mode also write where each maximum was sampled."""
    maps, boxes = _precise(input), rois.to(_precise(input).dtype)
    if pool_mode == _AVERAGE:
        output.copy_(
            torch.ops.torchvision.roi_align(
                maps, boxes, spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned
            )
        )
        return
    channels = input.size(1)
    for k, (index, *corners) in enumerate(boxes.tolist()):
        x1, y1, x2, y2 = (corner * spatial_scale - 0.5 * aligned for corner in corners)
        box_h, box_w = (y2 - y1, x2 - x1) if aligned else (max(y2 - y1, 1.0), max(x2 - x1, 1.0))
        rows = sampling_ratio if sampling_ratio > 0 else math.ceil(box_h / aligned_height)
        columns = sampling_ratio if sampling_ratio > 0 else math.ceil(box_w / aligned_width)
        if rows <= 0 or columns <= 0:
            continue  # an empty RoI pools to 0
        # Samples lie at the centres of a rows x columns grid in each of the h x w bins.
        y, x = (
            low + (torch.arange(count, dtype=maps.dtype, device=maps.device) + 0.5) * extent / count
            for low, extent, count in ((y1, box_h, aligned_height * rows), (x1, box_w, aligned_width * columns))
        )
        y, x = (grid.flatten() for grid in torch.meshgrid(y, x, indexing="ij"))
        bins = (channels, aligned_height, rows, aligned_width, columns)
        values = _bilinear(maps[int(index)], y, x).view(bins).transpose(2, 3).flatten(3)
        output[k], best = values.max(-1)
        for points, argmax in ((y, argmax_y), (x, argmax_x)):
            grid = points.view(1, *bins[1:]).transpose(2, 3).flatten(3).expand_as(values)
            argmax[k] = grid.gather(-1, best.unsqueeze(-1)).squeeze(-1)


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
    if pool_mode == _AVERAGE:
        grad_input += torch.ops.torchvision._roi_align_backward(
            grad,
            rois.to(grad.dtype),
            spatial_scale,
            aligned_height,
            aligned_width,
            *grad_input.shape,
            sampling_ratio,
            aligned,
        )
        return
    zero = torch.zeros_like(grad_input[0], dtype=grad.dtype)  # sampling is linear: its gradient needs no input values
    for k, index in enumerate(rois[:, 0].long().tolist()):
        y, x = argmax_y[k].flatten(1).to(grad.dtype), argmax_x[k].flatten(1).to(grad.dtype)
        (slope,) = gradients(lambda planes, y=y, x=x: _bilinear(planes, y, x), [zero], grad[k].flatten(1))
        grad_input[index] += slope


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Maximum over each bin's whole pixels to `output` (K, C, h, w), and its index y * W + x to `argmax`; -1 if empty.

    A bin reaches from floor(start) to ceil(end) of its unrounded borders, and x2, y2 count as inside the box.
    torchvision rounds the box first, a different function.
    """
    height, width = input.shape[-2:]

    def bins(low: float, high: float, count: int, size: int) -> list[tuple[int, int]]:
        start, step = low * spatial_scale, (high + 1 - low) * spatial_scale / count
        edges = ((math.floor(start + i * step), math.ceil(start + (i + 1) * step)) for i in range(count))
        return [(min(max(a, 0), size), min(max(b, 0), size)) for a, b in edges]

    for k, (index, x1, y1, x2, y2) in enumerate(rois.double().tolist()):
        if x2 + 1 <= x1 or y2 + 1 <= y1:
            continue
        plane = input[int(index)]
        columns = bins(x1, x2, pooled_width, width)
        for i, (top, bottom) in enumerate(bins(y1, y2, pooled_height, height)):
            if bottom <= top:
                argmax[k, :, i] = -1
                continue
            strip, row = plane[:, top:bottom].max(1)  # rows first, then columns: h + w reductions instead of h * w
            for j, (left, right) in enumerate(columns):
                if right <= left:
                    argmax[k, :, i, j] = -1
                    continue
                output[k, :, i, j], column = strip[:, left:right].max(1)
                column = column + left
                argmax[k, :, i, j] = ((row.gather(1, column[:, None])[:, 0] + top) * width + column).int()


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    channels, height, width = grad_input.shape[1:]
    plane = rois[:, 0].long()[:, None] * channels + torch.arange(channels, device=rois.device)  # (K, C)
    index = plane[:, :, None, None] * (height * width) + argmax.clamp(min=0)
    total = torch.zeros(grad_input.numel(), dtype=_precise(grad_output).dtype, device=grad_input.device)
    total.index_add_(0, index.flatten(), (_precise(grad_output) * (argmax >= 0)).flatten())
    grad_input += total.view_as(grad_input)


def _border_samples(input: Tensor, boxes: Tensor, pool_size: int) -> Tensor:
    """Samples along the four sides of boxes (B, N, 4): (B, C / 4, N, 4, pool_size + 1) from maps (B, C, H, W).

    The channels come in quarters for the top, left, bottom and right side. Top and left start at (x1, y1), bottom and
    right run backwards from (x2, y2).
    """
    batch, channels, height, width = input.shape
    steps = torch.linspace(0, 1, pool_size + 1, dtype=boxes.dtype, device=boxes.device)
    x1, y1, x2, y2 = boxes.unsqueeze(-1).unbind(2)  # (B, N, 1)
    along_x, along_y = (x2 - x1) * steps, (y2 - y1) * steps
    still = torch.zeros_like(along_x)
    x = torch.stack([x1 + along_x, x1 + still, x2 - along_x, x2 + still], 1)  # (B, 4, N, P)
    y = torch.stack([y1 + still, y1 + along_y, y2 + still, y2 - along_y], 1)
    planes = input.view(batch, 4, channels // 4, height, width)
    points = _bilinear(planes, y.flatten(2).unsqueeze(2), x.flatten(2).unsqueeze(2))
    return points.unflatten(-1, (boxes.size(1), pool_size + 1)).permute(0, 2, 3, 1, 4)


def border_align_forward(input: Tensor, boxes: Tensor, output: Tensor, argmax_idx: Tensor, pool_size: int) -> None:
    """Maximum along each side to `output` (B, C / 4, N, 4), the sample's index to `argmax_idx`."""
    values, best = _border_samples(_precise(input), _precise(boxes), pool_size).max(-1)
    output.copy_(values)
    argmax_idx.copy_(best)


def border_align_backward(
    grad_output: Tensor, boxes: Tensor, argmax_idx: Tensor, grad_input: Tensor, pool_size: int
) -> None:
    def chosen(planes: Tensor) -> Tensor:
        samples = _border_samples(planes, _precise(boxes), pool_size)
        return samples.gather(-1, argmax_idx.long().unsqueeze(-1)).squeeze(-1)

    zero = torch.zeros_like(_precise(grad_input))
    (grad,) = gradients(chosen, [zero], _precise(grad_output))
    grad_input += grad
