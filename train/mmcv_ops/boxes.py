"""Non-maximum suppression and box overlaps. Boxes are (N, 4) x1, y1, x2, y2; `offset` is 1 where x2 is inclusive."""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor

__all__ = ["bbox_overlaps", "nms"]


def _exclusive(boxes: Tensor, offset: int) -> Tensor:
    """Boxes whose width is x2 - x1, in at least float32: half precision cannot hold a pixel coordinate above 2048."""
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    return boxes + boxes.new_tensor([0, 0, offset, offset]) if offset else boxes


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the kept boxes, best score first; a box is removed if its IoU with a kept box exceeds the
    threshold."""
    boxes = _exclusive(boxes, offset)
    return torchvision.ops.nms(boxes, scores.to(boxes.dtype), iou_threshold)


def bbox_overlaps(bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int) -> None:
    """Write IoU (mode 0) or intersection over the first box's area (mode 1) to `ious`: (N, M), or (N,) if aligned."""
    first, second = _exclusive(bboxes1, offset), _exclusive(bboxes2, offset)
    if not aligned:
        first, second = first[:, None], second[None]
    sides = torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2])
    inter = sides.clamp(min=0).prod(-1)
    area1, area2 = ((b[..., 2:] - b[..., :2]).prod(-1) for b in (first, second))
    denominator = area1 + area2 - inter if mode == 0 else area1.expand_as(inter)
    ious.copy_(torch.where(denominator > 0, inter / denominator, 0))  # two empty boxes overlap by 0, not NaN
