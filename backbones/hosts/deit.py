"""DeiT: a plain transformer on 16 x 16 patches with a class token.

Paper: "Training data-efficient image transformers", Touvron et al., ICML 2021, arXiv 2012.12877.

image (B, 3, H, W) -> tokens (B, 1 + H/16 * W/16, dim), class token first -> logits. Its blocks are grouped into
`len(depths)` stages of one resolution, whose patch tokens are the maps `(B, dim, H/16, W/16)` for dense use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from timm.layers import calculate_drop_path_rates, global_pool_nlc, register_notrace_module
from torch import Tensor, nn

from hybridzoo.backbones.base import Backbone
from hybridzoo.backbones.hosts.common import ALL, Attention
from hybridzoo.layers import Stage, TransformerBlock
from hybridzoo.layers.heads import merge_heads, softmax_attention
from hybridzoo.layers.init import init_linear, trunc_normal_
from hybridzoo.layers.resize import resize_map

PATCH = 16
POOLS = ("", "token", "avg", "avgmax", "max")


@dataclasses.dataclass(frozen=True)
class DeiTConfig:
    """A variant; `img_size` is the (square) size that position tables are made for."""

    dim: int
    num_heads: int
    depths: tuple[int, ...] = (3, 3, 3, 3)
    linear: tuple[int, ...] = (ALL,) * 4  # blocks at the start of each stage with the family's attention
    img_size: int = 224


class Tokens(NamedTuple):
    """The state between blocks: tokens, class token first, and the size of the map of the others."""

    x: Tensor
    size: tuple[int, int]

    def as_map(self) -> Tensor:
        """Patch tokens as an NCHW map."""
        return self.x[:, 1:].transpose(1, 2).unflatten(2, self.size)


@register_notrace_module
class SoftmaxAttention(nn.Module):
    """Ordinary multi-head attention; `size` is not needed."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(merge_heads(softmax_attention(query, key, value)))


class TokenBlock(TransformerBlock):
    """The block for tokens with the size of their map."""

    def forward(self, tokens: Any) -> Any:  # type: ignore[override]  # nothing else for the attention
        return Tokens(super().forward(tokens.x, tokens.size), tokens.size)


@register_notrace_module
class PatchTokens(nn.Module):
    """Image -> tokens: patches (incomplete ones are cut off), class token, position embedding of any size."""

    def __init__(self, in_chans: int, dim: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.proj = nn.Conv2d(in_chans, dim, PATCH, stride=PATCH)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + side * side, dim))
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, image: Tensor) -> Tokens:
        x = self.proj(image)
        size = (x.shape[2], x.shape[3])
        of_class, of_patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        grid = of_patches.transpose(1, 2).unflatten(2, (self.side, self.side))
        patches = (x + resize_map(grid, size)).flatten(2).transpose(1, 2)
        return Tokens(torch.cat([(self.cls_token + of_class).expand(x.shape[0], -1, -1), patches], dim=1), size)


class TokenHead(nn.Module):
    """Pool tokens, dropout, linear classifier.

    Args:
        dim: channels.
        num_classes: 0 for none.
        pool_type: `"token"` (the class token), `"avg"`, `"max"`, `"avgmax"` of the others, or `""` for no pooling.
        drop_rate: of the dropout.

    Raises:
        ValueError: unknown `pool_type`.
    """

    def __init__(self, dim: int, num_classes: int, pool_type: str, drop_rate: float) -> None:
        super().__init__()
        self.dim = dim
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, pool_type)

    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        if pool_type is not None:
            if pool_type not in POOLS:
                raise ValueError(f"global_pool must be one of {', '.join(map(repr, POOLS))}; got {pool_type!r}")
            self.pool_type = pool_type
        self.fc: nn.Module = nn.Linear(self.dim, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(global_pool_nlc(x, self.pool_type))
        return x if pre_logits else self.fc(x)


class DeiT(Backbone):
    """DeiT for images of any size from 16 x 16 pixels; `forward_features` returns tokens, as timm's transformers do.

    Args:
        cfg: the variant; its fields are also arguments of `timm.create_model`.
        attention: the family's attention on `(B, N, dim)` tokens, class token first, and the size of their map.
        in_chans: channels of the image.
        num_classes: 0 for pooled features.
        global_pool: `"token"`, `"avg"`, `"max"`, `"avgmax"` or `""` for none.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
    """

    stages_give_maps = False  # but `Tokens`

    def __init__(
        self,
        cfg: DeiTConfig,
        attention: Attention,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = cfg.dim
        self.set_feature_info([cfg.dim] * len(cfg.depths), [PATCH] * len(cfg.depths))
        rates: Iterator[Any] = iter(calculate_drop_path_rates(drop_path_rate, sum(cfg.depths)))
        side = cfg.img_size // PATCH
        self.stem = PatchTokens(in_chans, cfg.dim, side)
        stages = []
        for i, depth in enumerate(cfg.depths):
            blocks = []
            for j in range(depth):
                family = j < cfg.linear[i]
                attn = (
                    attention(i, cfg.dim, cfg.num_heads, side) if family else SoftmaxAttention(cfg.dim, cfg.num_heads)
                )
                blocks.append(TokenBlock(cfg.dim, attn, eps=1e-6, drop_path=next(rates)))
            stages.append(Stage(blocks))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(cfg.dim, eps=1e-6)
        self.head = TokenHead(cfg.dim, num_classes, global_pool, drop_rate)
        self.apply(init_linear)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"stem.cls_token", "stem.pos_embed"}

    def _to_nchw(self, x: Any, norm: bool = False) -> Tensor:
        return (Tokens(self.norm(x.x), x.size) if norm else x).as_map()

    def _final(self, x: Any) -> Tensor:
        return self.norm(x.x)
