"""NAT and DiNAT with every query's neighbours gathered."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hybridzoo.layers import NeighborhoodAttention2d
from hybridzoo.train.bench.forms import na2d_gather


class PlainNeighborhoodAttention2d(NeighborhoodAttention2d):
    """The tables of places are made once for a size. The window has to fit into the map."""

    attends: dict[Any, Any]

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(3)
        attend = self.attends.get((height, width))
        if attend is None:
            dilation = self.dilation[0] if self.dilation else 1
            attend = na2d_gather((height, width), self.kernel_size[0], dilation, x.device)
            self.attends[height, width] = attend
        assert self.rpb is not None
        return self.proj(attend(query, key, value, self.rpb.to(query.dtype)).flatten(3))


def make_plain(model: nn.Module) -> nn.Module:
    """Give `model` plain layers, in place."""
    for module in model.modules():
        if type(module) is NeighborhoodAttention2d:
            module.__class__ = PlainNeighborhoodAttention2d
            module.attends = {}
    return model
