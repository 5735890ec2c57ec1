"""The initialisation that most of the families share; what it leaves out keeps PyTorch's."""

from __future__ import annotations

from timm.layers import trunc_normal_
from torch import nn


def init_linear(module: nn.Module) -> None:
    """For `model.apply`: `init_normal` of linear layers."""
    if isinstance(module, nn.Linear):
        init_normal(module)


def init_normal(layer: nn.Linear | nn.Conv2d) -> None:
    """Weights normal with deviation 0.02, biases zero."""
    trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
