"""Focal loss (Lin et al., arXiv 1708.02002). Targets are class indices; class C of C means background."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

__all__ = ["sigmoid_focal_loss_backward", "sigmoid_focal_loss_forward"]


def _class_weight(weight: Tensor, target: Tensor, classes: int) -> Tensor:
    """Each row's weight: `weight[target]`; 1 for background rows, which have no entry, and without weights."""
    if weight.numel() == 0:
        return torch.ones((), device=target.device)
    known = (target >= 0) & (target < classes)
    return torch.where(known, weight[target.clamp(0, classes - 1)], 1.0)


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Per-class losses of logits (N, C) to `output` (N, C)."""
    classes = input.size(1)
    one_hot = F.one_hot(target, classes + 1)[:, :classes].to(_precise(input))
    loss = sigmoid_focal_loss(input.to(one_hot.dtype), one_hot, alpha=alpha, gamma=gamma, reduction="none")
    output.copy_(loss * _class_weight(weight, target, classes).unsqueeze(-1))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Gradient with respect to the logits, to `grad_input` (N, C).

    In closed form: autograd would differentiate (1 - p)^gamma, which is infinite at p = 1 for gamma < 1.
    """
    classes = input.size(1)
    positive = F.one_hot(target, classes + 1)[:, :classes].bool()
    toward = torch.where(positive, input, -input).to(_precise(input))  # large where the prediction is right
    p, log_p, miss = toward.sigmoid(), F.logsigmoid(toward), (-toward).sigmoid()
    slope = miss.pow(gamma) * (gamma * p * log_p - miss)
    slope = torch.where(positive, alpha * slope, (alpha - 1) * slope)
    grad_input.copy_(slope * _class_weight(weight, target, classes).unsqueeze(-1))


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
