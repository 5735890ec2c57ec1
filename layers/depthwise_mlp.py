"""An MLP that looks at neighbours: a depthwise convolution at its widest point (LITv2, DAT++, RAVLT)."""

from __future__ import annotations

from torch import Tensor, nn


class DepthwiseMlp(nn.Module):
    """Linear, depthwise 3x3 convolution and GELU, linear; `(batch, height, width, dim)` in and out.

    The convolution pads with zeros, which tells tokens how near the edge they are.

    Args:
        dim: channels.
        hidden_dim: channels in between.
        residual: the convolution's result is added to its input, else it takes its place.
        act_first: GELU comes before the convolution and its residual, else after them.
    """

    def __init__(self, dim: int, hidden_dim: int, *, residual: bool = False, act_first: bool = False) -> None:
        super().__init__()
        self.residual = residual
        self.act_first = act_first
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.conv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = self._mix(self.act(x)) if self.act_first else self.act(self._mix(x))
        return self.fc2(x)

    def _mix(self, x: Tensor) -> Tensor:
        mixed = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + mixed if self.residual else mixed
