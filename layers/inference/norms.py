"""Batch norms and identities fold into the linear layer or convolution before or after them; dropout goes."""

from __future__ import annotations

import copy
from typing import Any, TypeGuard, TypeVar, get_args

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from hybridzoo.layers.conv_norm_act import ConvNormAct
from hybridzoo.layers.deformable_merging import DeformableMerging
from hybridzoo.layers.depthwise_mlp import DepthwiseMlp
from hybridzoo.layers.head import PooledHead
from hybridzoo.layers.inference.fusing import folds, swaps
from hybridzoo.layers.mbconv import MBConv

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.SyncBatchNorm


def folds_away(norm: nn.Module) -> TypeGuard[BatchNorm]:
    """Whether evaluation multiplies by fixed numbers: a batch norm of PyTorch's that uses its running statistics.

    Libraries' subclasses may compute something else.
    """
    return type(norm) in get_args(BatchNorm) and norm.running_mean is not None


class FixedNorm(nn.Module):
    """A batch norm that no layer takes up: by its running statistics, also after `train()` of a part of the network."""

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, norm: BatchNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        for name in ("running_mean", "running_var", "weight", "bias"):
            tensor = getattr(norm, name)
            self.register_buffer(name, None if tensor is None else tensor.detach())

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


@swaps(nn.BatchNorm1d)
@swaps(nn.BatchNorm2d)
@swaps(nn.SyncBatchNorm)
def _(norm: nn.Module) -> nn.Module:
    return FixedNorm(norm) if folds_away(norm) else norm


@swaps(nn.Dropout)
@swaps(DropPath)
def _(dropout: nn.Module) -> nn.Module:
    return nn.Identity()


@folds(ConvNormAct)
def _(block: ConvNormAct) -> None:
    if folds_away(block.norm):
        block.conv = fuse_conv_bn_eval(block.conv, block.norm)
        block.norm = nn.Identity()


@folds(MBConv)
def _(block: MBConv) -> None:
    if folds_away(block.pre_norm):
        block.expand.conv = fuse_norm_layer_eval(block.pre_norm, block.expand.conv)
        block.pre_norm = nn.Identity()


@folds(PooledHead)
def _(head: PooledHead) -> None:
    if folds_away(head.after) and isinstance(head.fc, nn.Linear):
        head.fc = fuse_norm_layer_eval(head.after, head.fc)
        head.after = nn.Identity()


@folds(DeformableMerging)
def _(merging: Any) -> None:
    if folds_away(merging.norm):
        merging.conv = fuse_conv_bn_eval(merging.conv, merging.norm)
        merging.norm = nn.Identity()


@folds(DepthwiseMlp)
def _(mlp: DepthwiseMlp) -> None:
    if mlp.residual:
        add_identity(mlp.conv)
        mlp.residual = False


def add_identity(conv: nn.Conv2d) -> None:
    """Change a depthwise convolution of odd size so that it adds its input to its result."""
    rows, columns = conv.weight.shape[2:]
    conv.weight[:, :, rows // 2, columns // 2] += 1


@torch.no_grad()
def fuse_norm_layer_eval(norm: BatchNorm, layer: Layer) -> Layer:
    """A layer that computes `layer(norm(x))` with the norm's running statistics: linear, or a 1x1 convolution.

    Exact because there is no padding between the two. PyTorch has the other order, `torch.nn.utils.fusion`.
    """
    scale, shift = scale_shift(norm)
    fused = copy.deepcopy(layer)
    weight = layer.weight.flatten(1)
    bias = weight @ shift
    fused.weight.copy_((weight * scale).view_as(layer.weight))
    fused.bias = nn.Parameter(bias if layer.bias is None else bias + layer.bias)
    return fused


def scale_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """A batch norm's factor and summand in evaluation, for each channel."""
    assert isinstance(norm, BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    shift = -norm.running_mean * scale
    return (scale * norm.weight, shift * norm.weight + norm.bias) if norm.affine else (scale, shift)
