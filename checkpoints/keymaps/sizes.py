"""Resizes position tables to another image size, in the same way as the authors did for fine-tuning.

Relative position tables are not resized here: their layers resize them when they load weights.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_AXIS = re.compile(r"\.(ah|aw|ha|wa)_bias$")  # agent attention's: (heads, agents, rows or columns)
_POSITIONS = re.compile(r"\.pos_embed$")  # DeiT's and PVT's: (1, tokens of a square map, after a class token, dim)


def fit(state_dict: Mapping[str, Tensor], network: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Resize the position tables to the sizes of a network; all other tensors stay unchanged.

    Args:
        state_dict: under our names.
        network: the network's own state dict.
    """
    fitted = dict(state_dict)
    for key, tensor in state_dict.items():
        size = network[key].shape if key in network else tensor.shape
        if tensor.ndim == 2 and size == (*tensor.shape, 1, 1):  # the linear layer of timm's heads without pooling
            fitted[key] = tensor[:, :, None, None]
        if size == tensor.shape or tensor.ndim != 3 or len(size) != 3:
            continue
        if _AXIS.search(key) and size[:2] == tensor.shape[:2]:
            fitted[key] = F.interpolate(tensor, size[2], mode="linear", align_corners=False)
        elif _POSITIONS.search(key) and size[2] == tensor.shape[2]:
            fitted[key] = _resized(tensor, size[1])
    return fitted


def takes(network: nn.Module, name: str, value: Tensor) -> bool:
    """Whether the layer of a parameter can load this tensor of another shape: tried on a copy of the layer."""
    owner, _, local = name.rpartition(".")
    try:
        layer = network.get_submodule(owner)
        if type(layer)._load_from_state_dict is nn.Module._load_from_state_dict:
            return False
        copy.deepcopy(layer).load_state_dict({local: value}, strict=False)
    except (AttributeError, RuntimeError):
        return False
    return True


def _resized(tensor: Tensor, tokens: int) -> Tensor:
    """Resize the position embeddings of a square map (bicubic); that of a class token stays unchanged."""
    side, new = int(tensor.shape[1] ** 0.5), int(tokens**0.5)
    classes = tensor.shape[1] - side * side
    if classes != tokens - new * new:
        return tensor
    grid = tensor[:, classes:].transpose(1, 2).unflatten(2, (side, side))
    grid = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
    return torch.cat([tensor[:, :classes], grid.flatten(2).transpose(1, 2)], dim=1)
