"""The MLP of a transformer block."""

from __future__ import annotations

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridzoo.layers.slicing import by_images, lean


class GELU(nn.Module):
    """The exact `F.gelu`, in place where no gradient needs the input: for what a layer has just made."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.gelu_(x) if lean(x) else F.gelu(x)


class Mlp(timm.layers.Mlp):
    """timm's `Mlp` with the exact GELU, on `(..., dim)`; evaluation on a CPU takes a few tokens at a time.

    The hidden tokens of a whole batch fit into no cache, and fresh memory for them costs as much as the products.

    Args:
        dim: channels.
        hidden_dim: channels between the two linear layers.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__(dim, hidden_dim, act_layer=GELU)
        self.hidden_dim = hidden_dim

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        return by_images(super().forward, tokens, self.hidden_dim, self.training).view(x.shape)
