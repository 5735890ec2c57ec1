"""PATNet's token mixers and spatial gate: a cheap attention over most channels, a convolution over the others.

Papers: arXiv 2503.03148 (PATNet) and 2502.01303 (PartialNet). Maps are NCHW, any height and width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_linear_bn_eval

from hybridzoo.layers.eval_cache import EvalCache
from hybridzoo.layers.heads import merge_heads, softmax_attention
from hybridzoo.layers.linear import Linear
from hybridzoo.layers.linear_attention import without_autocast
from hybridzoo.layers.relative_position import gather_bias
from hybridzoo.layers.slicing import recorded

BUCKETS = 81  # entries of a distance table; the first 40 are never used
NEAR, FAR, FARTHEST = 20, 40, 160  # distances up to NEAR have their own entry; FARTHEST falls into the last, NEAR + FAR


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
        self.gate_norm: nn.Module = nn.BatchNorm1d(rest)
        self.norm: nn.Module = nn.BatchNorm2d(rest)

    def forward(self, x: Tensor) -> Tensor:
        local, rest = x.split(self.split, 1)
        gate = F.hardsigmoid(self._normalise(self.gate(torch.cat(mean_std(rest), 1).to(x.dtype))))
        if self.norm.training or recorded(x):
            return torch.cat((self.conv(local), self.norm(rest * gate[:, :, None, None])), 1)
        # Gate and norm are one scale and one shift a channel; what that makes of the first channels is written over.
        first = (self.split[0], 0)
        if self.folded:
            out = x * F.pad(gate, first)[:, :, None, None].to(x.dtype)
        else:
            scale, shift = (F.pad(part, first)[..., None, None].to(x.dtype) for part in _scale_shift(self.norm, gate))
            out = torch.addcmul(shift, x, scale)
        out[:, : self.split[0]] = self.conv(local)
        return out

    def _normalise(self, gate: Tensor) -> Tensor:
        norm = self.gate_norm
        if norm.training and gate.shape[0] == 1 and isinstance(norm, nn.BatchNorm1d):
            return F.batch_norm(gate, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        return norm(gate)

    @property
    def folded(self) -> bool:
        return isinstance(self.norm, nn.Identity)

    def fold(self, following: nn.Conv2d) -> nn.Conv2d:
        """Fold both norms away, in place, and return `following` (1x1) with the second one in it."""
        assert isinstance(self.gate_norm, nn.BatchNorm1d)
        self.gate = fuse_linear_bn_eval(self.gate.eval(), self.gate_norm.eval())
        self.gate_norm = nn.Identity()
        scale, shift = _scale_shift(self.norm)
        self.norm = nn.Identity()
        keep, rest = following.weight.detach().flatten(1).split(self.split, 1)
        return _pointwise(torch.cat((keep, rest * scale), 1), rest @ shift + _bias(following))


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
        self.qkv = Linear(rest, 3 * rest, bias=False)
        self.bias = DistanceBias(num_heads)
        self.proj = Linear(rest, rest)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        local, rest = x.split(self.split, 1)
        size = (x.shape[2], x.shape[3])
        tokens = self.norm(rest.flatten(2).transpose(1, 2))
        query, key, value = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        drop = self.attn_drop if self.training else 0.0
        bias = self.bias(size).to(query.dtype)[None]  # 4D, or a CPU takes the slow path
        out = softmax_attention(query, key, value, bias, dropout=drop)
        out = self.proj_drop(self.proj(merge_heads(out)))
        return torch.cat((self.conv(local), out.transpose(1, 2).unflatten(2, size)), 1)


class DistanceBias(EvalCache):
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
        return self.cached(size, lambda: gather_bias(self.table[:, distance_bucket(size, self.table.device)], size))


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

    def fold(self, previous: nn.Conv2d) -> tuple[nn.Conv2d, FoldedSpatialGate]:
        """`previous` (1x1) with one more output, and what is left of the gate after it.

        Every linear map here moves into `previous`: its extra output is the gate before the hard sigmoid.
        """
        scale, shift = _scale_shift(self.norm)
        conv_scale, conv_shift = _scale_shift(self.conv_norm)
        gate, conv = self.gate.weight.detach().flatten(1), self.conv.weight.detach().flatten(1)
        conv_bias, conv = conv @ conv_shift, conv * conv_scale
        gated, mixed = previous.weight.detach().flatten(1).split(self.split, 0)
        gated_bias, mixed_bias = _bias(previous).split(self.split, 0)
        weight = torch.cat((gated * scale[:, None], conv @ mixed, gate @ gated))
        bias = torch.cat((gated_bias * scale, conv @ mixed_bias + conv_bias, gate @ gated_bias))
        return _pointwise(weight, bias), FoldedSpatialGate(shift)


class FoldedSpatialGate(nn.Module):
    """What folding leaves of `SpatialGate`: `(B, dim + 1, H, W)` -> `(B, dim, H, W)`; the last channel is the gate.

    The input is overwritten where no gradient needs it.
    """

    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        self.shift = nn.Parameter(shift[:, None, None].clone())

    def forward(self, x: Tensor) -> Tensor:
        gated = self.shift.shape[0]
        gated, mixed, gate = x.split((gated, x.shape[1] - gated - 1, 1), 1)
        if recorded(x):
            return torch.cat((torch.addcmul(self.shift, gated, F.hardsigmoid(gate)), mixed), 1)
        gated.mul_(F.hardsigmoid(gate)).add_(self.shift)
        return x[:, :-1]


class DynamicPartialConv(nn.Module):
    """DPConv (PartialNet): a 3x3 convolution that learns how many channels it needs.

    `log2(dim)` gates, each on or off by its sign, set the number of groups, `2 ** (gates that are on)`. As published,
    training and evaluation compute different functions: training convolves all channels in that many groups (a weight
    mask, the Kronecker product of 2x2 identities and ones); evaluation convolves the first `dim / groups` channels
    densely and passes the others on. Gradients reach the gates straight through the sign. The paper's penalties on
    order and number of the gates are not included; no published configuration uses this layer.

    Before `fuse()` evaluation masks the full convolution, which traces and exports; after it only the channels that
    count are convolved.

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
        self.gate: nn.Parameter | None = nn.Parameter(2.0**-14 * sign)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            live = self.conv.out_channels
            return torch.cat((self.conv(x[:, :live]), x[:, live:]), 1)
        on = (self.gate > 0).to(self.gate.dtype)
        if self.training:
            through = self.gate.clamp(-1, 1) / 2
            return F.conv2d(x, self.conv.weight * group_mask(on + through - through.detach()), padding=1)
        convolved = torch.arange(x.shape[1], device=x.device) < x.shape[1] * torch.exp2(-on.sum())
        weight = self.conv.weight * (convolved[:, None] & convolved)[:, :, None, None]
        return torch.where(convolved[:, None, None], F.conv2d(x, weight, padding=1), x)

    def fuse(self) -> DynamicPartialConv:
        """Keep the channels that evaluation convolves and forget the gates, in place."""
        if self.gate is not None:
            live = self.conv.out_channels >> int((self.gate > 0).sum())
            weight = self.conv.weight.detach()[:live, :live].clone()
            self.conv = nn.Conv2d(live, live, 3, padding=1, bias=False, device="meta")
            self.conv.weight = nn.Parameter(weight)
            self.gate = None
        return self


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
    pixels = x.shape[2] * x.shape[3]
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.device.type != "cpu":  # one pass; on a CPU it is five times slower than these two
        std, mean = torch.std_mean(x, (2, 3), correction=int(pixels > 1))
        return mean, std
    tokens = x.flatten(2).mT
    with without_autocast(x):  # sums as products with ones: the fastest over maps with channels last
        ones = tokens.new_ones(1, 1, 1).expand(x.shape[0], 1, pixels)
        mean = ones @ tokens / pixels
        centred = tokens - mean
        total = ones @ (centred.square() if torch.is_grad_enabled() else centred.square_())
    # Below the mean's own rounding error a channel is constant; the root's gradient would be infinite there.
    constant = total <= pixels * (4 * torch.finfo(x.dtype).eps * mean).square()
    std = (total.masked_fill(constant, 1) / max(pixels - 1, 1)).sqrt().masked_fill(constant, 0)
    return mean[:, 0], std[:, 0]


def _scale_shift(norm: nn.Module, gate: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Scale and shift of what a batch norm does in evaluation to its input times `gate`."""
    assert isinstance(norm, _BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.detach() * (norm.running_var + norm.eps).rsqrt()
    return gate * scale, norm.bias.detach() - norm.running_mean * scale


def _bias(conv: nn.Conv2d) -> Tensor:
    """Of a convolution that may have none: nothing, or what a norm folded before left there."""
    return conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()


def _pointwise(weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """1x1 convolution with this weight `(out, in)` and bias."""
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        conv.weight.copy_(weight[:, :, None, None])
        assert conv.bias is not None
        conv.bias.copy_(bias)
    return conv
