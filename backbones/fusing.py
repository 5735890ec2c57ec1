"""Rules that fuse the families' own blocks for inference, see `hybridzoo.layers.inference`."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from hybridzoo.backbones import ascan, dinat_isotropic, fastervit, maxvit, overlock, patnet, ravlt
from hybridzoo.backbones.hosts import cswin
from hybridzoo.layers.conv_norm_act import ConvNormAct
from hybridzoo.layers.inference.attention import part
from hybridzoo.layers.inference.fusing import Fixed, folds, swaps
from hybridzoo.layers.inference.norms import add_identity, folds_away, fuse_norm_layer_eval
from hybridzoo.layers.inference.packed import FewImages
from hybridzoo.layers.inference.partial import FusedPartialConv, fold_channel_attention, fold_spatial_gate
from hybridzoo.layers.partial_attention import DynamicPartialConv, PartialChannelAttention, SpatialGate
from hybridzoo.layers.rotary import Rotary2d
from hybridzoo.layers.windows import attend, from_windows, padding_mask, to_windows

swaps(ascan.PositionBias)(Fixed)
swaps(dinat_isotropic.MapBias)(Fixed)
swaps(Rotary2d)(Fixed)


@folds(patnet.Block)
def _(block: patnet.Block) -> None:
    """Fold the mixer's norms and the spatial gate's linear maps into the MLP's convolutions."""
    mixer, mlp = cast(Any, block.mixer), cast(Any, block.mlp)
    if isinstance(mixer, PartialChannelAttention) and folds_away(mixer.norm) and folds_away(mixer.gate_norm):
        block.mixer, mlp.expand.conv = fold_channel_attention(mixer, mlp.expand.conv)
    elif isinstance(mixer, DynamicPartialConv):
        block.mixer = FusedPartialConv(mixer)
    if isinstance(mlp.gate, SpatialGate) and folds_away(mlp.gate.norm) and folds_away(mlp.gate.conv_norm):
        gate: Any
        mlp.project, gate = fold_spatial_gate(mlp.gate, mlp.project)
        mlp.gate = gate


@folds(ravlt.Block)
def _(block: ravlt.Block) -> None:
    """Fold layer scales into the last linear layers of attention and MLP."""
    attn, mlp = cast(Any, block.attn), cast(Any, block.mlp)
    for linear, name in ((attn.proj, "scale1"), (mlp.fc2, "scale2")):
        gamma: Tensor = getattr(block, name).gamma
        linear.weight.mul_(gamma[:, None])
        linear.bias.mul_(gamma)
        setattr(block, name, nn.Identity())


@folds(overlock.RepConvBlock)
def _fold_depthwise(block: Any) -> None:
    """Fold branches, norms and identities into the parallel depthwise convolutions."""
    convs = (part for part in block.large.modules() if isinstance(part, ConvNormAct))
    if folds_away(block.large_norm) and all(folds_away(conv.norm) for conv in convs):
        block.large, block.large_norm = fuse_conv_bn_eval(block.large.merge(), block.large_norm), nn.Identity()
    for owner, name in ((block, "dwconv"), (block, "dwconv1"), (block, "dwconv2"), (block.mlp, "local")):
        if hasattr(owner, name):
            conv = getattr(owner, name).conv
            add_identity(conv)
            setattr(owner, name, conv)


@folds(overlock.FocusBlock)
def _(block: Any) -> None:
    _fold_depthwise(block)
    if folds_away(block.out_norm):
        block.out_project, block.out_norm = fuse_norm_layer_eval(block.out_norm, block.out_project), nn.Identity()


@swaps(cswin.StripeAttention)
class FusedStripeAttention(nn.Module):
    """`StripeAttention` that cuts the map before the projection, whose output is three times as large."""

    def __init__(self, layer: cswin.StripeAttention) -> None:
        super().__init__()
        self.stripe, self.num_heads = layer.stripe, layer.num_heads
        self.lepe, self.proj = layer.lepe, layer.proj
        dim, count = layer.proj.in_features, len(layer.lepe)
        width = dim // count
        self.qkv: Any = nn.ModuleList(
            nn.ModuleList(part(layer.qkv, start, start + width) for start in range(i * width, 3 * dim, dim))
            for i in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.cat([self._branch(x, i, w) for i, w in enumerate(cswin.stripes(x, self.stripe))], -1))

    def _branch(self, x: Tensor, i: int, window: tuple[int, int]) -> Tensor:
        _, height, width, _ = x.shape
        windows = to_windows(x, window)
        tokens = windows.flatten(3, 4).flatten(0, 2)
        projections: Any = self.qkv[i]
        query, key, value = (projection(tokens) for projection in projections)
        mask = padding_mask(height, width, window, device=x.device)
        if mask is not None:  # padding is projected to the bias, but the convolution needs zeros
            value = value * mask.repeat(x.shape[0], 1)[..., None]
        local = self.lepe[i](value.unflatten(1, window).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)
        out = attend(query, key, value, self.num_heads, mask=mask) + local
        return from_windows(out.view(*windows.shape[:-1], out.shape[-1]), height, width)


@swaps(maxvit.Stem, on_cpu=True)
@swaps(fastervit.Stem, on_cpu=True)
def _(stem: nn.Module) -> nn.Module:
    hidden, channels = next(stem.parameters()).shape[:2]
    return FewImages(stem, hidden / (4 * channels))  # at half the resolution


@swaps(maxvit.Block, on_cpu=True)
def _(block: maxvit.Block) -> nn.Module:
    hidden, channels = next(block.conv.expand.parameters()).shape[:2]
    return FewImages(block, hidden / channels)  # MBConv widens before it strides


@swaps(fastervit.ConvBlock, on_cpu=True)
def _(block: fastervit.ConvBlock) -> nn.Module:
    return FewImages(block, 1)


@swaps(fastervit.AttentionStage, on_cpu=True)
def _(stage: fastervit.AttentionStage) -> nn.Module:
    return FewImages(stage, 2 * fastervit.MLP_RATIO / 4)  # twice the channels on a quarter of the tokens
