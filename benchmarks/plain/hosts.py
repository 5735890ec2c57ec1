"""Agent and InLine attention and their hosts: what the papers say, line by line, over PyTorch's own layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridzoo.backbones.hosts.cswin import Merge, StripeAttention
from hybridzoo.backbones.hosts.cswin import Stem as CSwinStem
from hybridzoo.backbones.hosts.pvt import PatchEmbed as PVTEmbed
from hybridzoo.backbones.hosts.swin import PatchEmbed as SwinEmbed
from hybridzoo.backbones.hosts.swin import PatchMerging, ShiftedWindowAttention
from hybridzoo.layers import AgentAttention, InLineAttention


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


class PlainAgent(nn.Module):
    """Tables re-made and repeated for every image, both maps formed, NCHW copies for pooling and convolution."""

    def __init__(self, ours: AgentAttention) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if x.ndim == 4:
            return self(x.flatten(1, 2), x.shape[1:3]).view(x.shape)
        o, (batch, tokens, dim), heads, first = self.ours, x.shape, self.ours.num_heads, int(self.ours.class_token)
        q, k, v = o.qkv(x).chunk(3, -1)
        as_map = lambda t: t[:, first:].transpose(1, 2).reshape(batch, dim, *size)  # noqa: E731
        agent = split_heads(F.adaptive_avg_pool2d(as_map(q), o.grid).flatten(2).transpose(1, 2), heads)
        q, k, value = (split_heads(t, heads) for t in (q, k, v))
        scale = (dim // heads) ** -0.5
        gather = F.interpolate(o.an_bias, size, mode="bilinear") + o.ah_bias[..., None] + o.aw_bias[:, :, None]
        spread = F.interpolate(o.na_bias, size, mode="bilinear") + o.ha_bias[..., None] + o.wa_bias[:, :, None]
        gather, spread = gather.flatten(2), spread.flatten(2).transpose(1, 2)
        if first:
            gather, spread = torch.cat([o.ac_bias[..., None], gather], 2), torch.cat([o.ca_bias[:, None], spread], 1)
        gather, spread = gather.repeat(batch, 1, 1, 1), spread.repeat(batch, 1, 1, 1)
        agent_value = ((agent * scale) @ k.transpose(2, 3) + gather).softmax(-1) @ value
        out = ((q * scale) @ agent.transpose(2, 3) + spread).softmax(-1) @ agent_value
        out = out.transpose(1, 2).reshape(batch, tokens, dim)
        local = o.dwc(as_map(v)).flatten(2).transpose(1, 2)
        out = torch.cat([out[:, :1], out[:, 1:] + local], 1) if first else out + local
        return o.proj(out)


class PlainInLine(nn.Module):
    """The published evaluation order, and one convolution of batch x channels groups."""

    def __init__(self, ours: InLineAttention) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, x: Tensor, size: tuple[int, int] | None = None, *, summary: Tensor | None = None) -> Tensor:
        if x.ndim == 4:
            return self(x.flatten(1, 2), x.shape[1:3], summary=summary).view(x.shape)
        o, (batch, tokens, dim), heads, first = self.ours, x.shape, self.ours.num_heads, int(self.ours.class_token)
        q, k, v = o.qkv(x).chunk(3, -1)
        maps = v[:, first:].transpose(1, 2).reshape(batch, dim, *size)
        q, k, value = (split_heads(t, heads) for t in (q, k, v))
        scale = (dim // heads) ** -0.5
        root = (scale / tokens) ** 0.5
        share = 1 - scale * q @ k.mean(2, keepdim=True).transpose(2, 3)
        out = q @ ((k * root).transpose(2, 3) @ (value * root)) + share * value.mean(2, keepdim=True)
        out = out.transpose(1, 2).reshape(batch, tokens, dim)
        kernels = o.residual((x.mean(1) if summary is None else summary)[..., None]).reshape(batch * dim, 1, 3, 3)
        local = F.conv2d(maps.reshape(1, batch * dim, *size), kernels, padding=1, groups=batch * dim)
        local = local.view(batch, dim, *size)
        if o.dwc is not None:
            local = local + o.dwc(maps)
        local = local.flatten(2).transpose(1, 2)
        out = torch.cat([out[:, :1], out[:, 1:] + local], 1) if first else out + local
        return o.proj(out)


class PlainWindow(nn.Module):
    """Swin's window attention with its softmax written out; sides that windows divide."""

    def __init__(self, ours: ShiftedWindowAttention) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, x: Tensor) -> Tensor:
        o, (batch, height, width, dim), w = self.ours, x.shape, self.ours.window
        shift = o.shift if height > w else 0
        x = torch.roll(x, (-shift, -shift), (1, 2))
        windows = x.reshape(batch, height // w, w, width // w, w, dim).transpose(2, 3).reshape(-1, w * w, dim)
        q, k, v = (split_heads(t, o.num_heads) for t in o.qkv(windows).chunk(3, -1))
        scores = (q * (dim // o.num_heads) ** -0.5) @ k.transpose(2, 3) + o.bias((w, w))
        if shift:
            wrapped = torch.arange(height, device=x.device) >= height - shift
            label = (2 * wrapped[:, None] + 1 * wrapped).reshape(height // w, w, width // w, w).transpose(1, 2)
            label = label.reshape(-1, w * w)
            mask = (label[:, None] != label[:, :, None]) * -100.0
            scores = (scores.unflatten(0, (batch, -1)) + mask[None, :, None]).flatten(0, 1)
        out = o.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, w * w, dim))
        out = out.reshape(batch, height // w, width // w, w, w, dim).transpose(2, 3).reshape(batch, height, width, dim)
        return torch.roll(out, (shift, shift), (1, 2))


class PlainStripes(nn.Module):
    """CSwin's stripes with their softmax written out and LePE in NCHW; sides that stripes divide."""

    def __init__(self, ours: StripeAttention) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, x: Tensor) -> Tensor:
        o, (batch, height, width, dim) = self.ours, x.shape
        parts = len(o.lepe)
        qkv = o.qkv(x.flatten(1, 2)).reshape(batch, height * width, 3, dim).permute(2, 0, 1, 3)
        outs = []
        for i, (lepe, part) in enumerate(zip(o.lepe, qkv.chunk(parts, -1), strict=True)):
            h, w = (height, o.stripe or width) if i == 0 else (o.stripe, width)
            windows = part.reshape(3, batch, height // h, h, width // w, w, dim // parts).transpose(3, 4)
            q, k, v = windows.reshape(3, -1, h * w, dim // parts).unbind(0)
            local = lepe(v.transpose(1, 2).reshape(-1, dim // parts, h, w)).flatten(2).transpose(1, 2)
            q, k, v = (split_heads(t, o.num_heads) for t in (q, k, v))
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
            out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(local.shape) + local
            out = out.reshape(batch, height // h, width // w, h, w, dim // parts).transpose(2, 3)
            outs.append(out.reshape(batch, height, width, dim // parts))
        return o.proj(torch.cat(outs, -1))


class PlainEmbedding(nn.Module):
    """Stems and CSwin's and PVT's merging: tokens are laid out as a map for the convolution, and back."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, x: Tensor) -> Tensor:
        conv = getattr(self.ours, "conv", None) or self.ours.proj
        if x.shape[1] != conv.in_channels:  # a map of tokens, no image
            x = x.permute(0, 3, 1, 2).contiguous()
        x = conv(x)
        size = x.shape[2:]
        x = self.ours.norm(x.flatten(2).transpose(1, 2).contiguous())
        if isinstance(self.ours, PVTEmbed):
            table = self.ours.pos_embed
            assert table.shape[1] == x.shape[1], "made for the published size"
            x = x + table
        return x.unflatten(1, size)


class PlainMerging(nn.Module):
    """Swin's: every fourth token, four times, side by side; even sides."""

    def __init__(self, ours: PatchMerging) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, x: Tensor) -> Tensor:
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.ours.reduction(self.ours.norm(torch.cat(corners, -1)))


PLAIN: dict[type, Callable[[Any], nn.Module]] = {
    AgentAttention: PlainAgent,
    InLineAttention: PlainInLine,
    ShiftedWindowAttention: PlainWindow,
    StripeAttention: PlainStripes,
    CSwinStem: PlainEmbedding,
    Merge: PlainEmbedding,
    SwinEmbed: PlainEmbedding,
    PVTEmbed: PlainEmbedding,
    PatchMerging: PlainMerging,
}


def plain(model: nn.Module) -> nn.Module:
    """A copy of the network with every part of it that is ours written plainly.

    What is PyTorch's stays: layer norms, heads, DeiT's stem and its own softmax attention.
    """
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if type(module) in PLAIN:
            model.set_submodule(name, PLAIN[type(module)](module))
    return model
