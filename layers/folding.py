"""Folding for inference: what evaluation can merge into a neighbour is merged, and the model computes the same.

One mechanism for all families: a layer that can fold itself has a method `fuse()`, which works in place, may be called
twice, and leaves evaluation's results as they were; `fuse(model)` calls it everywhere. `ConvNormAct` folds its batch
norm into its convolution; a family's own layers may fold more.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

Model = TypeVar("Model", bound=nn.Module)
Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


def fuse(model: Model) -> Model:
    """Fold all that can be folded, in place, and switch to evaluation; returns the model.

    The folded weights are no longer those of a checkpoint, and training them is another function: fold a
    `copy.deepcopy` where the model is still needed. Works for models around ours too (`features_only`, segmentors).
    """
    model.eval()
    for module in list(model.modules()):  # a list: folding replaces modules
        if module is not model and callable(fold := getattr(module, "fuse", None)):
            fold()
    return model


@torch.no_grad()
def fuse_norm_layer_eval(norm: _BatchNorm, layer: Layer) -> Layer:
    """A layer that computes `layer(norm(x))` with the norm's running statistics: linear, or a 1x1 convolution.

    Exact because no padding comes between the two. PyTorch has the other order, `torch.nn.utils.fusion`.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    shift = -norm.running_mean * scale
    if norm.affine:
        scale, shift = scale * norm.weight, shift * norm.weight + norm.bias
    fused = copy.deepcopy(layer)
    weight = layer.weight.flatten(1)
    bias = weight @ shift
    fused.weight.copy_((weight * scale).view_as(layer.weight))
    fused.bias = nn.Parameter(bias if layer.bias is None else bias + layer.bias)
    return fused
