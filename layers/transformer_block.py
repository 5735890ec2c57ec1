"""The transformer block of most families, with any attention."""

from __future__ import annotations

from typing import Any

from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor, nn

from hybridzoo.layers.conv_norm_act import ActLayer


class TransformerBlock(nn.Module):
    """Attention, then an MLP, on `(..., dim)`: pre-norm residuals with layer scale and stochastic depth.

    Args:
        dim: channels.
        attn: module from the normed input, and all further arguments of `forward`, to its update.
        mlp_ratio: hidden width of the MLP in multiples of `dim`.
        eps: of both layer norms.
        layer_scale: initial value of a learned factor per channel on both updates; 0 or `None` for none.
        drop_path: probability of dropping an update, per image.
        act_layer: makes the MLP's activation, the exact GELU by default.
        mlp: replaces the MLP; then `mlp_ratio` and `act_layer` have no effect.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float = 4,
        *,
        eps: float = 1e-5,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        act_layer: ActLayer = nn.GELU,
        mlp: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = attn
        self.scale1 = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        if mlp is None:
            mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer)  # type: ignore[arg-type]  # not a class alone
        self.mlp = mlp
        self.scale2 = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = x + self.drop_path(self.scale1(self.attn(self.norm1(x), *args, **kwargs)))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))
