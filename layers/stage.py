"""One resolution of a pyramid: an optional downsampling, then blocks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from timm.models import checkpoint_seq
from torch import Tensor, nn


class Stage(nn.Module):
    """`downsample`, then `blocks` one after the other, each recomputed in the backward pass if asked.

    Args:
        blocks: modules from map to map.
        downsample: module that brings the previous stage's map here; `None` in the first stage.

    Attributes:
        grad_checkpointing: keep only the blocks' inputs for the backward pass (less memory, a second forward).
    """

    def __init__(self, blocks: Iterable[nn.Module], downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.downsample = nn.Identity() if downsample is None else downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and torch.is_grad_enabled() and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)
