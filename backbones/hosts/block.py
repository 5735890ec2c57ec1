"""What the four hosts have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.layers import DropPath, trunc_normal_
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from hybridzoo import checkpoints
from hybridzoo.layers.mlp import Mlp

ALL = 1000  # blocks of a stage that carry the family's attention: more than any stage has

Attention = Callable[[int, int, int, int], nn.Module]
"""A family's attention for `(stage, dim, num_heads, side)`, `side` in tokens of the map at the published size."""


class Block(nn.Module):
    """Attention, MLP; pre-norm residuals.

    Args:
        dim: channels.
        attn: module from normed input to its update.
        mlp_ratio: hidden width of the MLP in multiples of `dim`.
        drop_path: probability of dropping an update, per image.
        eps: of both layer norms.
    """

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def attend(self, x: Tensor) -> Tensor:
        return self.attn(self.norm1(x))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attend(x))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def init_weights(module: nn.Module) -> None:
    """The hosts' initialisation; convolutions keep PyTorch's."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def default_cfgs(family: str) -> Any:
    """A family's cards as timm default configurations, whatever the host."""
    names = dict(first_conv="stem.proj", classifier="head.fc")
    pyramids, plain = (checkpoints.timm_cfgs(family, **names, reduction=r) for r in (32, 16))
    return generate_default_cfgs({n: (plain if "_deit_" in n else pyramids)[n] for n in pyramids})
