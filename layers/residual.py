"""A residual branch with stochastic depth."""

from __future__ import annotations

from timm.layers import DropPath
from torch import Tensor, nn


class Residual(nn.Module):
    """`x + branch(x)`; training drops the branch of whole images at the rate `drop_path`."""

    def __init__(self, branch: nn.Module, drop_path: float = 0.0) -> None:
        super().__init__()
        self.branch = branch
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.branch(x))
