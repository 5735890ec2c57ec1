"""PATNet's mixers and gates without norms: their linear parts are folded into the convolutions around them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_linear_bn_eval

from hybridzoo.layers.inference.fusing import swaps
from hybridzoo.layers.inference.norms import scale_shift
from hybridzoo.layers.partial_attention import (
    DynamicPartialConv,
    PartialAttention,
    PartialChannelAttention,
    SpatialGate,
    mean_std,
)
from hybridzoo.layers.precision import without_autocast


class FusedPartialChannelAttention(nn.Module):
    """`PartialChannelAttention` without norms: `gate_norm` is folded into the gate, `norm` into the next
    convolution."""

    def __init__(self, mixer: PartialChannelAttention) -> None:
        super().__init__()
        self.split = mixer.split
        self.conv = mixer.conv
        self.gate = fuse_linear_bn_eval(mixer.gate, mixer.gate_norm)

    def forward(self, x: Tensor) -> Tensor:
        local, rest = x.split(self.split, 1)
        gate = F.hardsigmoid(self.gate(torch.cat(_mean_std(rest), 1).to(x.dtype)))
        # Applied to the whole map, which keeps its memory order; the result for the first channels is overwritten.
        out = x * F.pad(gate, (self.split[0], 0))[:, :, None, None]
        out[:, : self.split[0]] = self.conv(local)
        return out


def fold_channel_attention(
    mixer: PartialChannelAttention, following: nn.Conv2d
) -> tuple[FusedPartialChannelAttention, nn.Conv2d]:
    """The mixer without norms, and the 1x1 convolution after it with the second norm."""
    scale, shift = scale_shift(mixer.norm)
    keep, rest = following.weight.flatten(1).split(mixer.split, 1)
    bias = rest @ shift + _bias(following)
    return FusedPartialChannelAttention(mixer), _pointwise(torch.cat((keep, rest * scale), 1), bias)


class FusedSpatialGate(nn.Module):
    """The rest of `SpatialGate`: `(B, dim + 1, H, W)` -> `(B, dim, H, W)`; the last channel is the gate.

    Overwrites its input, which is a convolution's result.
    """

    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        self.shift = nn.Parameter(shift[:, None, None].clone())

    def forward(self, x: Tensor) -> Tensor:
        gated = self.shift.shape[0]
        gated, _, gate = x.split((gated, x.shape[1] - gated - 1, 1), 1)
        gated.mul_(F.hardsigmoid(gate)).add_(self.shift)
        return x[:, :-1]


def fold_spatial_gate(gate: SpatialGate, previous: nn.Conv2d) -> tuple[nn.Conv2d, FusedSpatialGate]:
    """The 1x1 convolution before the gate, with one more output, and the rest of the gate after it.

    All linear maps are folded into the convolution: its extra output is the gate before the hard sigmoid.
    """
    scale, shift = scale_shift(gate.norm)
    conv_scale, conv_shift = scale_shift(gate.conv_norm)
    to_gate, conv = gate.gate.weight.flatten(1), gate.conv.weight.flatten(1)
    conv_bias, conv = conv @ conv_shift, conv * conv_scale
    gated, mixed = previous.weight.flatten(1).split(gate.split, 0)
    gated_bias, mixed_bias = _bias(previous).split(gate.split, 0)
    weight = torch.cat((gated * scale[:, None], conv @ mixed, to_gate @ gated))
    bias = torch.cat((gated_bias * scale, conv @ mixed_bias + conv_bias, to_gate @ gated_bias))
    return _pointwise(weight, bias), FusedSpatialGate(shift)


class FusedPartialConv(nn.Module):
    """`DynamicPartialConv` with the channels that evaluation convolves, and without the gates that chose them."""

    def __init__(self, mixer: DynamicPartialConv) -> None:
        super().__init__()
        live = mixer.conv.out_channels >> int((mixer.gate > 0).sum())
        weight = mixer.conv.weight.detach()[:live, :live].clone()
        self.conv = nn.Conv2d(live, live, 3, padding=1, bias=False, device="meta")
        self.conv.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        live = self.conv.out_channels
        return torch.cat((self.conv(x[:, :live]), x[:, live:]), 1)


def _mean_std(x: Tensor) -> tuple[Tensor, Tensor]:
    """`mean_std`; on a CPU by products with ones, which are several times as fast over maps with channels last."""
    if x.device.type != "cpu":
        return mean_std(x)
    pixels = x.shape[2] * x.shape[3]
    tokens = x.flatten(2).transpose(1, 2).to(torch.promote_types(x.dtype, torch.float32))
    with without_autocast(x):
        ones = tokens.new_ones(1, 1, 1).expand(x.shape[0], 1, pixels)
        mean = ones @ tokens / pixels
        std = (ones @ (tokens - mean).square() / max(pixels - 1, 1)).sqrt()
    return mean[:, 0], std[:, 0]


def _bias(conv: nn.Conv2d) -> Tensor:
    """The bias of a convolution, which may have none, or one from a folded norm."""
    return conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias


def _pointwise(weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """1x1 convolution with this weight `(out, in)` and bias."""
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1, device="meta")
    conv.weight, conv.bias = nn.Parameter(weight[:, :, None, None]), nn.Parameter(bias)
    return conv.eval()


@swaps(PartialAttention)
def _(attention: PartialAttention) -> nn.Module:
    attention.attn_drop = 0.0  # in training only
    return attention
