"""BiFormer's layer as published: padded before the projection, partitioned throughout, keys and values gathered."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridzoo.kernels.routed.grid import Grid
from hybridzoo.layers import BiLevelRoutingAttention
from hybridzoo.train.bench.routed_forms import attend, merge, partition


class PlainBiLevelRoutingAttention(BiLevelRoutingAttention):
    """The layer as published for BiFormer-T, -S and -B."""

    def forward(self, x: Tensor) -> Tensor:
        height, width, dim = x.shape[1:]
        regions, size = self.region_grid(height, width)
        grid = Grid(*regions, *size)
        below, right = grid.beyond(x)
        x = F.pad(x, (0, 0, 0, right, 0, below))
        query, both = self.qkv(partition(x, grid)).split([dim, 2 * dim], dim=-1)
        with torch.no_grad():
            logits = query.mean(2) * self.scale @ both[..., :dim].mean(2).transpose(1, 2)
            routes = logits.topk(min(self.topk, grid.regions), dim=-1).indices
        out = merge(attend(query, both, routes, self.num_heads, self.scale), grid)
        local = self.lepe(merge(both[..., dim:], grid).permute(0, 3, 1, 2).contiguous())
        return self.proj(out + local.permute(0, 2, 3, 1))[:, :height, :width]


def make_plain(model: nn.Module) -> nn.Module:
    """Give `model` plain routed layers, in place."""
    for module in model.modules():
        if type(module) is BiLevelRoutingAttention:
            module.__class__ = PlainBiLevelRoutingAttention
    return model
