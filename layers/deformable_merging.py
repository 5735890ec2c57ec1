"""Deformable token merging: four tokens become one, and the network chooses which (LIT, arXiv 2105.14217)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn


@register_notrace_module
class DeformableMerging(nn.Module):
    """Deformable 2x2 convolution of stride 2, batch norm, GELU.

    `(batch, height, width, dim)` -> `(batch, height // 2, width // 2, out_dim)`. Where offsets are zero, as they start,
    the convolution is an ordinary one; on maps of odd size no anchor lies on the last row or column, but offsets reach
    it.

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
        x = x.permute(0, 3, 1, 2)
        return self.act(self.norm(self.conv(deform(x, self.offset(x))))).permute(0, 2, 3, 1).contiguous()


def deform(x: Tensor, offset: Tensor) -> Tensor:
    """Move the pixels that a 2x2 convolution of stride 2 reads; that convolution then is a deformable one.

    The two together are `torchvision.ops.deform_conv2d`, which tracers and exporters do not know. PyTorch's bilinear
    `grid_sample` is twice as fast on a CPU, three times with gradients.

    Args:
        x: map `(batch, channels, height, width)`.
        offset: `(batch, 8, height // 2, width // 2)`: for every patch's upper left, upper right, lower left and lower
            right pixel how far down, then how far to the right it is read, in pixels. Beyond the map all is zero.

    Returns:
        `(batch, channels, height // 2 * 2, width // 2 * 2)`.
    """
    height, width = x.shape[2:]
    exact = torch.promote_types(x.dtype, torch.float32)  # half precision cannot tell pixels of a large map apart
    by_pixel = offset.to(exact).unflatten(1, (2, 2, 2)).permute(3, 0, 4, 1, 5, 2)
    down, right = by_pixel.flatten(4, 5).flatten(2, 3).unbind(0)
    down = down + torch.arange(height // 2 * 2, dtype=exact, device=x.device)[:, None]
    right = right + torch.arange(width // 2 * 2, dtype=exact, device=x.device)
    grid = torch.stack([(2 * right + 1) / width - 1, (2 * down + 1) / height - 1], dim=-1)  # as `grid_sample` counts
    return F.grid_sample(x.to(exact), grid, align_corners=False).to(x.dtype)
