"""The initialisation that most of the families share; what it leaves out keeps PyTorch's."""

from __future__ import annotations

import timm.layers
from torch import Tensor, nn


def trunc_normal_(tensor: Tensor, std: float) -> None:
    """Normal with deviation `std`, cut at -2 and 2; on the meta device, where values do not exist, nothing.

    There PyTorch would take longer for the arithmetic than for all else of a network.
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
