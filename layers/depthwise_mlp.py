"""An MLP with a depthwise convolution between its linear layers (LITv2, DAT++, RAVLT)."""

from __future__ import annotations

from torch import Tensor, nn


class DepthwiseMlp(nn.Module):
    """Linear, depthwise 3x3 convolution and GELU, linear; `(batch, height, width, dim)` in and out.

    The zero padding of the convolution gives tokens information about their position.

    Args:
        dim: channels.
        hidden_dim: channels in between.
        residual: add the convolution's result to its input, instead of replacing it.
        act_first: GELU before the convolution and its residual, instead of after them.
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
