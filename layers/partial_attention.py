"""PATNet's token mixers and spatial gate: a cheap attention over most channels, a convolution over the others.

Papers: arXiv 2503.03148 (PATNet) and 2502.01303 (PartialNet). Maps are NCHW, any height and width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from hybridzoo.layers.heads import merge_heads, softmax_attention
from hybridzoo.layers.relative_position import gather_bias

BUCKETS = 81  # entries of a distance table; the first 40 are never used
NEAR, FAR, FARTHEST = 20, 40, 160  # distances up to NEAR have their own entry; FARTHEST falls into the last, NEAR + FAR


@register_notrace_module
class PartialChannelAttention(nn.Module):
    """PAT_ch: 3x3 convolution of the first channels, a gate per channel and batch norm for the rest.

    The gate reads mean and standard deviation of every channel ("Gaussian" channel attention). One image a device has
    no batch statistics of gates: such a training step normalises the gate by the running ones.

    Args:
        dim: channels.
        conv_dim: how many of them are convolved.
    """

    def __init__(self, dim: int, conv_dim: int) -> None:
        super().__init__()
        rest = dim - conv_dim
        self.split = (conv_dim, rest)
        self.conv = nn.Conv2d(conv_dim, conv_dim, 3, padding=1, bias=False)
        self.gate = nn.Linear(2 * rest, rest, bias=False)
        self.gate_norm = nn.BatchNorm1d(rest)
        self.norm = nn.BatchNorm2d(rest)

    def forward(self, x: Tensor) -> Tensor:
        local, rest = x.split(self.split, 1)
        mean, std = mean_std(rest)
        gate = F.hardsigmoid(self._normalise(self.gate(torch.cat((mean, std), 1).to(x.dtype))))
        return torch.cat((self.conv(local), self.norm(rest * gate[:, :, None, None])), 1)

    def _normalise(self, gate: Tensor) -> Tensor:
        norm = self.gate_norm
        if norm.training and gate.shape[0] == 1:
            return F.batch_norm(gate, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        return norm(gate)


@register_notrace_module
class PartialAttention(nn.Module):
    """PAT_sf: 3x3 convolution of the first channels, softmax attention over all pixels for the rest.

    Args:
        dim: channels.
        conv_dim: how many of them are convolved.
        num_heads: of the attention; they share the other `dim - conv_dim` channels.
        attn_drop: dropout of the attention matrix in training.
        proj_drop: dropout after the projection in training.

    Raises:
        ValueError: the attended channels do not divide into the heads.
    """

    def __init__(self, dim: int, conv_dim: int, num_heads: int, attn_drop: float = 0.0, proj_drop: float = 0.0) -> None:
        super().__init__()
        rest = dim - conv_dim
        if rest % num_heads:
            raise ValueError(f"num_heads must divide the {rest} attended channels; got {num_heads}")
        self.split = (conv_dim, rest)
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.conv = nn.Conv2d(conv_dim, conv_dim, 3, padding=1, bias=False)
        self.norm = nn.LayerNorm(rest, eps=1e-6)
        self.qkv = nn.Linear(rest, 3 * rest, bias=False)
        self.bias = DistanceBias(num_heads)
        self.proj = nn.Linear(rest, rest)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        local, rest = x.split(self.split, 1)
        size = (x.shape[2], x.shape[3])
        tokens = self.norm(rest.flatten(2).transpose(1, 2))
        query, key, value = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        drop = self.attn_drop if self.training else 0.0
        out = softmax_attention(query, key, value, self.bias(size).to(query.dtype)[None], dropout=drop)
        out = self.proj_drop(self.proj(merge_heads(out)))
        return torch.cat((self.conv(local), out.transpose(1, 2).unflatten(2, size)), 1)


class DistanceBias(nn.Module):
    """A learned number a head for every rounded Euclidean distance: iRPE (arXiv 2107.14222), bias mode, on keys.

    Distances up to 20 pixels have their own entry; farther ones share entries logarithmically, from 160 on the last.
    (At 224 pixels only the first nine are ever trained: a map of 7 x 7.)

    Args:
        num_heads: attention heads.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(num_heads, BUCKETS))

    def forward(self, size: tuple[int, int]) -> Tensor:
        """Bias `(heads, tokens, tokens)`, query by key, of a map of `size` (rows, columns)."""
        return gather_bias(self.table[:, distance_bucket(size, self.table.device)], size)


def distance_bucket(size: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Entry of the table for every offset on a map of `size`: `(2 * rows - 1, 2 * columns - 1)`, 0 in the middle."""
    rows, columns = (torch.arange(1 - side, side, device=device).square() for side in size)
    distance = (rows[:, None] + columns).to(torch.float32).sqrt().round()
    beyond = distance.clamp(min=NEAR).div(NEAR).log() / math.log(FARTHEST / NEAR)
    shared = (NEAR + (FAR - NEAR) * beyond).round().clamp(max=FAR)
    return FAR + torch.where(distance <= NEAR, distance, shared).long()


class SpatialGate(nn.Module):
    """PAT_sp: gates the first half of the channels by one map, mixes the second half by a 1x1 convolution.

    Args:
        dim: channels.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.split = (dim - dim // 2, dim // 2)
        gated, mixed = self.split
        self.gate = nn.Conv2d(gated, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(gated)
        self.conv_norm = nn.BatchNorm2d(mixed)
        self.conv = nn.Conv2d(mixed, mixed, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gated, mixed = x.split(self.split, 1)
        gated = self.norm(gated * F.hardsigmoid(self.gate(gated)))
        return torch.cat((gated, self.conv(self.conv_norm(mixed))), 1)


@register_notrace_module
class DynamicPartialConv(nn.Module):
    """DPConv (PartialNet): a 3x3 convolution that learns how many channels it needs.

    `log2(dim)` gates, each on or off by its sign, set the number of groups, `2 ** (gates that are on)`. As published,
    training and evaluation compute different functions: training convolves all channels in that many groups (a weight
    mask, the Kronecker product of 2x2 identities and ones); evaluation convolves the first `dim / groups` channels
    densely and passes the others on. Gradients reach the gates straight through the sign. The paper's penalties on
    order and number of the gates are not included; no published configuration uses this layer.

    Evaluation masks the full convolution, which traces and exports.

    Args:
        dim: channels, a power of two.

    Raises:
        ValueError: another number of channels.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 2 or dim & (dim - 1):
            raise ValueError(f"dim must be a power of two for a dynamic partial convolution; got {dim}")
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        sign = torch.randint(2, (dim.bit_length() - 1,)) * 2 - 1
        # Undecided: the first steps choose. (Published as 1e-8, which is 0 in float16, so that all gates were off.)
        self.gate = nn.Parameter(2.0**-14 * sign)

    def forward(self, x: Tensor) -> Tensor:
        on = (self.gate > 0).to(self.gate.dtype)
        if self.training:
            through = self.gate.clamp(-1, 1) / 2
            return F.conv2d(x, self.conv.weight * group_mask(on + through - through.detach()), padding=1)
        convolved = torch.arange(x.shape[1], device=x.device) < x.shape[1] * torch.exp2(-on.sum())
        weight = self.conv.weight * (convolved[:, None] & convolved)[:, :, None, None]
        return torch.where(convolved[:, None, None], F.conv2d(x, weight, padding=1), x)


def group_mask(gates: Tensor) -> Tensor:
    """Mask `(dim, dim, 1, 1)` of a grouped convolution's weight from `log2(dim)` gates, 1 for on and 0 for off."""
    mask, same = gates.new_ones(1, 1), torch.eye(2, device=gates.device, dtype=gates.dtype)
    for gate in gates:
        mask = torch.kron(mask, gate * same + (1 - gate))
    return mask[:, :, None, None]


def mean_std(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation `(batch, channels)` of every channel of an NCHW map.

    A constant channel has deviation 0 and gradient 0 there; a single pixel deviates by 0. In float32 at least.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    std, mean = torch.std_mean(x, (2, 3), correction=int(x.shape[2] * x.shape[3] > 1))
    return mean, std
