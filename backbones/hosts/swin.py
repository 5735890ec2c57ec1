"""Swin: a pyramid whose own attention is softmax in shifted windows.

Paper: "Swin Transformer", Liu et al., ICCV 2021, arXiv 2103.14030.

image (B, 3, H, W) -> maps (B, dims[i], H/s, W/s), s = 4, 8, 16, 32, rounded up -> logits; NHWC inside.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from hybridzoo.backbones.hosts.common import ALL, Attention
from hybridzoo.backbones.hosts.pyramid import STRIDES, Pyramid, doubled
from hybridzoo.kernels.open_sizes import parts
from hybridzoo.layers import ShiftedWindowAttention, TransformerBlock
from hybridzoo.layers.memory import channels_last


@dataclasses.dataclass(frozen=True)
class SwinConfig:
    """A variant; `img_size` is the (square) image size of the tables; windows have a 32nd of it."""

    dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    linear: tuple[int, ...] = (ALL, ALL, ALL, 0)  # blocks at the start of each stage with the family's attention
    img_size: int = 224

    @property
    def dims(self) -> tuple[int, ...]:
        return doubled(self.dim, self.depths)


@register_notrace_module
class PatchEmbed(nn.Module):
    """Image, extended by zeros to a multiple of 4 -> `(B, H/4, W/4, dim)`."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, STRIDES[0], stride=STRIDES[0])
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (parts(side, STRIDES[0]) for side in x.shape[2:])
        x = F.pad(x, (0, columns * STRIDES[0] - x.shape[3], 0, rows * STRIDES[0] - x.shape[2]))
        x = self.proj(channels_last(x))
        return self.norm(x.permute(0, 2, 3, 1).contiguous())


@register_notrace_module
class PatchMerging(nn.Module):
    """`(B, H, W, dim)`, extended by zeros to even sides -> `(B, H/2, W/2, 2 * dim)`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (parts(side, 2) for side in x.shape[1:3])
        x = F.pad(x, (0, 0, 0, columns * 2 - x.shape[2], 0, rows * 2 - x.shape[1]))
        x = x.unflatten(2, (columns, 2)).unflatten(1, (rows, 2))  # (B, H/2, row, W/2, column, dim)
        return self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))


class Swin(Pyramid):
    """Swin; arguments: see `Pyramid`."""

    def make_stem(self, cfg: SwinConfig, in_chans: int) -> nn.Module:
        return PatchEmbed(in_chans, cfg.dim)

    def make_block(self, cfg: SwinConfig, attention: Attention, stage: int, index: int, drop_path: float) -> nn.Module:
        dim, heads, window = cfg.dims[stage], cfg.num_heads[stage], cfg.img_size // STRIDES[-1]
        attn = (
            attention(stage, dim, heads, cfg.img_size // STRIDES[stage])
            if index < cfg.linear[stage]
            # Every second block of the stage, the family's included, is a shifted one.
            else ShiftedWindowAttention(dim, heads, window, window // 2 if index % 2 else 0)
        )
        return TransformerBlock(dim, attn, drop_path=drop_path)

    def make_downsampling(self, cfg: SwinConfig, stage: int) -> nn.Module:
        return PatchMerging(cfg.dims[stage - 1])

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("bias.table")}
