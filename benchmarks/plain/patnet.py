"""PATNet as its papers describe it, one PyTorch call after the other, under the published names of parameters."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from hybridzoo.backbones.patnet import VARIANTS, PATNetConfig
from hybridzoo.checkpoints import convert


class ChannelGate(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.cfc1 = nn.Conv2d(dim, dim, (1, 2), bias=False)
        self.bn = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        statistics = torch.stack((flat.mean(2), flat.std(2)), -1)
        return x * F.hardsigmoid(self.bn(self.cfc1(statistics.unsqueeze(2))))


class Table(nn.Module):
    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.lookup_table_bias = nn.Parameter(torch.zeros(num_heads, 81))

    def forward(self, height: int, width: int) -> Tensor:
        rows = torch.arange(height, device=self.lookup_table_bias.device).repeat_interleave(width)
        columns = torch.arange(width, device=self.lookup_table_bias.device).repeat(height)
        distance = ((rows[:, None] - rows).square() + (columns[:, None] - columns).square()).float().sqrt().round()
        far = (20 + 20 * (distance.clamp(min=1) / 20).log() / math.log(8)).round().clamp(max=40)
        return self.lookup_table_bias[:, (40 + torch.where(distance <= 20, distance, far)).long()]


class PixelAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.rpe_k = Table(num_heads)

    def forward(self, x: Tensor) -> Tensor:
        batch, dim, height, width = x.shape
        qkv = self.qkv(x.flatten(2).transpose(1, 2)).view(batch, height * width, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        logits = (q * (dim // self.num_heads) ** -0.5) @ k.transpose(2, 3) + self.rpe_k(height, width)
        out = (logits.softmax(-1) @ v).transpose(1, 2).reshape(batch, height * width, dim)
        return self.proj(out).transpose(1, 2).reshape(x.shape)


class Mixer(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.split = (dim // 4, dim - dim // 4)
        rest = self.split[1]
        self.partial_conv3 = nn.Conv2d(dim // 4, dim // 4, 3, padding=1, bias=False)
        self.attn: nn.Module = PixelAttention(rest, heads) if heads else ChannelGate(rest)
        self.norm: nn.Module = LayerNorm2d(rest, eps=1e-6) if heads else nn.BatchNorm2d(rest)
        self.norm_first = heads > 0

    def forward(self, x: Tensor) -> Tensor:
        local, rest = torch.split(x, self.split, 1)
        rest = self.attn(self.norm(rest)) if self.norm_first else self.norm(self.attn(rest))
        return torch.cat((self.partial_conv3(local), rest), 1)


class SpatialGate(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.split = (dim - dim // 2, dim // 2)
        self.conv = nn.Conv2d(dim // 2, dim // 2, 1, bias=False)
        self.conv_attn = nn.Conv2d(self.split[0], 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(self.split[0])
        self.norm2 = nn.BatchNorm2d(dim // 2)

    def forward(self, x: Tensor) -> Tensor:
        gated, mixed = torch.split(x, self.split, 1)
        gated = self.norm(gated * F.hardsigmoid(self.conv_attn(gated)))
        return torch.cat((gated, self.conv(self.norm2(mixed))), 1)


class Block(nn.Module):
    def __init__(self, dim: int, cfg: PATNetConfig, heads: int) -> None:
        super().__init__()
        self.two_residuals = heads > 0
        self.spatial_mixing = Mixer(dim, heads)
        act = nn.GELU() if cfg.act == "gelu" else nn.ReLU(inplace=True)
        layers = [nn.Conv2d(dim, 2 * dim, 1, bias=False), nn.BatchNorm2d(2 * dim), act]
        layers += [nn.Conv2d(2 * dim, dim, 1, bias=False), *([SpatialGate(dim)] if cfg.spatial_gate else [])]
        self.mlp = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.spatial_mixing(x)
        if self.two_residuals:
            x = mixed = x + mixed
        return x + self.mlp(mixed)


class Reduce(nn.Module):
    def __init__(self, in_dim: int, dim: int, size: int, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Conv2d(in_dim, dim, size, size, bias=False))
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.get_submodule(self.name)(x))


class Stage(nn.Module):
    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class PlainPATNet(nn.Module):
    def __init__(self, cfg: PATNetConfig, num_classes: int = 1000) -> None:
        super().__init__()
        self.patch_embed = Reduce(3, cfg.embed_dim, 4, "proj")
        stages: list[nn.Module] = []
        for i, depth in enumerate(cfg.depths):
            dim = cfg.embed_dim * 2**i
            if i:
                stages.append(Reduce(dim // 2, dim, 2, "reduction"))
            heads = cfg.num_heads if i == len(cfg.depths) - 1 else 0
            stages.append(Stage([Block(dim, cfg, heads) for _ in range(depth)]))
        self.stages = nn.Sequential(*stages)
        act = nn.GELU() if cfg.act == "gelu" else nn.ReLU(inplace=True)
        self.avgpool_pre_head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(dim, 1280, 1, bias=False), act)
        self.head = nn.Linear(1280, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.avgpool_pre_head(self.stages(self.patch_embed(x))).flatten(1))


def beside(ours: nn.Module, name: str) -> PlainPATNet:
    """The plain network `name`; ours is given its weights."""
    plain = PlainPATNet(VARIANTS[name])
    ours.load_state_dict(convert(plain.state_dict(), name))
    return plain.train(ours.training)
