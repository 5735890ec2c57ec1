"""Non-maximum suppression and box overlaps. Boxes are (N, 4) x1, y1, x2, y2; `offset` is 1 where x2 is inclusive."""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor

__all__ = ["bbox_overlaps", "nms", "nms_match", "softnms"]


def _exclusive(boxes: Tensor, offset: int) -> Tensor:
    """Boxes whose width is x2 - x1, in at least float32: half precision cannot hold a pixel coordinate above 2048."""
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    return boxes + boxes.new_tensor([0, 0, offset, offset]) if offset else boxes


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the kept boxes, best score first; a box goes when its IoU with a kept one exceeds the threshold."""
    boxes = _exclusive(boxes, offset)
    return torchvision.ops.nms(boxes, scores.to(boxes.dtype), iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Write the kept boxes and their decayed scores to `dets` (N, 5), in the order chosen, and return their indices.

    Method 0 drops what overlaps by the threshold or more, 1 scales it by 1 - IoU, 2 scales everything by
    exp(-IoU^2 / sigma). Scores that fall below `min_score` drop out.
    """
    iou = torchvision.ops.box_iou(_exclusive(boxes, offset), _exclusive(boxes, offset))
    if method == 2:
        factors = torch.exp(-iou.square() / sigma)
    else:
        factors = torch.where(iou >= iou_threshold, torch.zeros_like(iou) if method == 0 else 1 - iou, 1.0)
    scores = scores.clone()
    alive = torch.ones_like(scores, dtype=torch.bool)
    chosen: list[int] = []
    while alive.any():
        best = int(scores.masked_fill(~alive, -torch.inf).argmax())
        dets[len(chosen), :4], dets[len(chosen), 4] = boxes[best], scores[best]
        chosen.append(best)
        alive[best] = False
        scores = torch.where(alive, scores * factors[best], scores)
        alive &= scores >= min_score
    return torch.tensor(chosen, dtype=torch.long, device=boxes.device)


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Groups of box indices: a kept box first, then those it suppressed (IoU at or above the threshold), by score."""
    iou = torchvision.ops.box_iou(dets[:, :4], dets[:, :4])
    order = dets[:, 4].argsort(descending=True).tolist()
    groups: list[list[int]] = []
    while order:
        kept, rest = order[0], order[1:]
        hits = (iou[kept, rest] >= iou_threshold).tolist()
        groups.append([kept] + [other for other, hit in zip(rest, hits, strict=True) if hit])
        order = [other for other, hit in zip(rest, hits, strict=True) if not hit]
    return groups


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
