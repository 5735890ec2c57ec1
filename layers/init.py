"""The initialisation that most families share; other parameters keep PyTorch's."""

from __future__ import annotations

import timm.layers
from torch import Tensor, nn


def trunc_normal_(tensor: Tensor, std: float) -> None:
    """Normal with deviation `std`, cut at -2 and 2; does nothing on the meta device, which has no values.

    There PyTorch's version would take longer than everything else in a network.
    """
    if not tensor.is_meta:
        timm.layers.trunc_normal_(tensor, std=std)


def init_linear(module: nn.Module) -> None:
    """For `model.apply`: `init_normal` of linear layers."""
    if isinstance(module, nn.Linear):
        init_normal(module)


def init_normal(layer: nn.Linear | nn.Conv2d) -> None:
    """Weights normal with deviation 0.02, biases zero."""
    trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
