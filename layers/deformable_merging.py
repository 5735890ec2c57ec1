"""Deformable token merging: four tokens become one; the network predicts where they are read (LIT, arXiv
2105.14217)."""

from __future__ import annotations

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from hybridzoo.layers.sampling import sample_map


@register_notrace_module
class DeformableMerging(nn.Module):
    """Deformable 2x2 convolution of stride 2, batch norm, GELU.

    `(batch, height, width, dim)` -> `(batch, height // 2, width // 2, out_dim)`. With zero offsets, as initialised, it
    is an ordinary convolution. On maps of odd size, no anchor is on the last row or column, but offsets can reach it.

    Args:
        dim: channels of the input.
        out_dim: channels of the output.
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.offset = nn.Conv2d(dim, 8, 2, stride=2)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)  # type: ignore[arg-type]  # has one
        self.conv = nn.Conv2d(dim, out_dim, 2, stride=2)
        self.norm = nn.BatchNorm2d(out_dim)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        offset = self.offset(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = deform(x, offset).permute(0, 3, 1, 2)
        return self.act(self.norm(self.conv(x))).permute(0, 2, 3, 1).contiguous()


def deform(x: Tensor, offset: Tensor) -> Tensor:
    """Move the pixels that a 2x2 convolution of stride 2 reads, which makes it a deformable convolution.

    Both together equal `torchvision.ops.deform_conv2d`, which tracers and exporters do not support, and which takes 1.5
    to 2 times as long on a CPU.

    Args:
        x: map `(batch, height, width, dim)`, two pixels or more along each axis.
        offset: `(batch, height // 2, width // 2, 8)`: for every patch's upper left, upper right, lower left and lower
            right pixel how far down, then how far to the right it is read, in pixels. The map is zero outside.

    Returns:
        `(batch, height // 2 * 2, width // 2 * 2, dim)`.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    # From patches and their pixels to rows and columns.
    by_pixel = offset.to(exact).unflatten(3, (2, 2, 2)).permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)
    down, right = by_pixel.unbind(-1)
    size = down.shape[1:]
    rows, columns = (torch.arange(side, dtype=exact, device=x.device) for side in size)
    down = (down + rows[:, None]) / (x.shape[1] - 1) * 2 - 1
    right = (right + columns) / (x.shape[2] - 1) * 2 - 1
    return sample_map(x, torch.stack((down, right), dim=-1).flatten(1, 2)[:, None]).unflatten(1, size)
