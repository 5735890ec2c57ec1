"""FasterViT as it was published."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainFasterViT(nn.Module):
    """FasterViT as it was published, in our parameters: NCHW, positions anew in every pass, explicit softmax."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        model = self.model
        x = plain_conv(model.stem.conv2, plain_conv(model.stem.conv1, x, F.relu), F.relu)
        for stage in model.stages[:2]:
            x = stage.downsample(x)
            for block in stage.blocks:
                x = x + plain_conv(block.conv2, plain_conv(block.conv1, x, F.gelu))
        for stage in model.stages[2:]:
            x = self.attention_stage(stage, stage.downsample(x))
        return model.forward_head(model.norm(x))

    def attention_stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        batch, dim, height, width = x.shape
        w = stage.window[0]
        x = F.pad(x, (0, -width % w, 0, -height % w))
        rows, columns = x.shape[2] // w, x.shape[3] // w
        ct = None
        if stage.carrier_tokens is not None:
            ct = stage.carrier_tokens(x)
            ct = ct.reshape(batch, rows, 2, columns, 2, dim).transpose(2, 3).reshape(batch, -1, dim)
        x = x.view(batch, dim, rows, w, columns, w).permute(0, 2, 4, 3, 5, 1).reshape(-1, w * w, dim)
        for block in stage.blocks:
            x = x + embedding(block.pos_embed, (w, w))
            if ct is not None:
                size = (2 * rows, 2 * columns)
                ct = ct.view(batch, rows, columns, 2, 2, dim).transpose(2, 3).reshape(batch, -1, dim)
                ct = layer(block.carriers, ct + embedding(block.carrier_pos_embed, size), size, 0)
                ct = ct.view(batch, rows, 2, columns, 2, dim).transpose(2, 3).reshape(-1, 4, dim)
                x = torch.cat([ct, x], dim=1)
            x = layer(block.tokens, x, (w, w), 0 if ct is None else 4)
            if ct is not None:
                ct, x = x.split([4, w * w], dim=1)
                ct = ct.reshape(batch, -1, dim)
        x = x.view(batch, rows, columns, w, w, dim).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(batch, dim, rows * w, columns * w)[:, :, :height, :width].contiguous()


def plain_conv(module: nn.Module, x: Tensor, act: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    x = module.norm(module.conv(x))
    return x if act is None else act(x)


def embedding(module: nn.Module, size: tuple[int, int]) -> Tensor:
    like = module.mlp.fc1.weight
    axes = [(torch.arange(n, dtype=like.dtype, device=like.device) - n // 2) / (n // 2) for n in size]
    return module.mlp(torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)).flatten(0, 1)


def layer(branches: nn.Module, x: Tensor, size: tuple[int, int], extra: int) -> Tensor:
    x = x + attention(branches.attn, branches.norm1(x), size, extra)
    return x + branches.mlp(branches.norm2(x))


def attention(module: nn.Module, x: Tensor, size: tuple[int, int], extra: int) -> Tensor:
    batch, tokens, dim = x.shape
    q, k, v = module.qkv(x).view(batch, tokens, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    axes = []
    for n in size:
        offset = torch.arange(1 - n, n, device=x.device, dtype=x.dtype) * 8 / (n - 1)
        axes.append(offset.sign() * torch.log2(offset.abs() + 1) / 3)
    table = module.bias.mlp(torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)).flatten(0, 1)
    place = torch.stack(torch.meshgrid(*(torch.arange(n, device=x.device) for n in size), indexing="ij")).flatten(1)
    offset = place[:, :, None] - place[:, None]
    index = (offset[0] + size[0] - 1) * (2 * size[1] - 1) + offset[1] + size[1] - 1
    bias = F.pad(16 * torch.sigmoid(table[index].permute(2, 0, 1)), (extra, 0, extra, 0))
    weights = (q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1)
    return module.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, dim))
