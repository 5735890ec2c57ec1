"""Some of our layers, written as in their papers' code, with our layers' weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from hybridzoo.layers import DeformableAttention, DeformableMerging, RankAugmentedAttention
from hybridzoo.layers.rotary import rotate


class PlainDeformableAttention(nn.Module):
    """In NCHW: the bias is sampled at the displacement of every pair of query and key, and scores are materialised."""

    def __init__(self, ours: DeformableAttention) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, x: Tensor) -> Tensor:
        o, (batch, height, width, dim) = self.ours, x.shape
        image = x.permute(0, 3, 1, 2).contiguous()
        query = pointwise(o.query, image)
        places = o.places(query.permute(0, 2, 3, 1)).flatten(0, 1)  # (batch * groups, rows, columns, 2)
        maps = image.reshape(batch * o.groups, dim // o.groups, height, width)
        sampled = F.grid_sample(maps, places[..., (1, 0)].to(x.dtype), align_corners=True).reshape(batch, dim, 1, -1)
        heads, keys = o.num_heads, sampled.shape[3]
        q = query.reshape(batch * heads, dim // heads, height * width)
        k, v = (pointwise(layer, sampled).reshape(batch * heads, dim // heads, keys) for layer in (o.key, o.value))
        scores = torch.einsum("bcm,bcn->bmn", q, k) * (dim // heads) ** -0.5
        rows, columns = (self._line(side, places) for side in (height, width))
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).reshape(1, height * width, 1, 2)
        displacement = (grid - places.reshape(batch * o.groups, 1, keys, 2)) * 0.5
        table = o.bias.table.reshape(1, o.groups, heads // o.groups, *o.bias.table.shape[1:])
        table = table.expand(batch, -1, -1, -1, -1).reshape(batch * o.groups, *table.shape[2:])
        bias = F.grid_sample(table, displacement[..., (1, 0)].to(table.dtype), align_corners=True)
        weights = (scores + bias.reshape(batch * heads, height * width, keys)).softmax(2)
        out = torch.einsum("bmn,bcn->bcm", weights, v).reshape(batch, dim, height, width)
        return pointwise(o.proj, out).permute(0, 2, 3, 1)

    def _line(self, count: int, like: Tensor) -> Tensor:
        """Coordinates of tokens: -1 at the first to 1 at the last; in the 2022 networks, centres of equal parts."""
        points = torch.arange(count, dtype=like.dtype, device=like.device)
        return points / (count - 1) * 2 - 1 if self.ours.offset_range is None else (points + 0.5) / count * 2 - 1


def pointwise(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer over channels as a 1x1 convolution."""
    return F.conv2d(x, layer.weight[:, :, None, None], layer.bias)


class TorchvisionMerging(nn.Module):
    """Deformable token merging with torchvision's version of the operator that the authors' code compiles for CUDA."""

    def __init__(self, ours: DeformableMerging) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, x: Tensor) -> Tensor:
        o, x = self.ours, x.permute(0, 3, 1, 2)
        x = deform_conv2d(x, o.offset(x), o.conv.weight, o.conv.bias, stride=2)
        return o.act(o.norm(x)).permute(0, 2, 3, 1)


class PlainRankAugmentedAttention(nn.Module):
    """RAVLT's linear attention with the paper's factors (number of tokens), and its convolution on NCHW copies."""

    def __init__(self, ours: RankAugmentedAttention) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, x: Tensor) -> Tensor:
        o, (batch, height, width, dim) = self.ours, x.shape
        heads, tokens = o.num_heads, height * width
        image = x.permute(0, 3, 1, 2).contiguous()
        qkvg = pointwise(o.qkvg, image)
        q, k, v, gate = qkvg.chunk(4, 1)
        local = o.lepe(v.contiguous())
        q, k, v = (t.reshape(batch, heads, dim // heads, tokens).transpose(2, 3) for t in (q, k, v))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        wanted = q.mean(2, keepdim=True)
        k = k * (wanted @ k.transpose(2, 3) * (dim // heads) ** -0.5).softmax(3).transpose(2, 3) * tokens
        normaliser = 1 / (q @ k.mean(2, keepdim=True).transpose(2, 3) + 1e-6)
        rotation = o.rotary(height, width, x.dtype, x.device)
        q, k = rotate(q, rotation), rotate(k, rotation)
        state = (k.transpose(2, 3) * tokens**-0.5) @ (v * tokens**-0.5)
        out = (q @ state * normaliser).transpose(2, 3).reshape(batch, dim, height, width)
        return pointwise(o.proj, (out + local) * gate).permute(0, 2, 3, 1)
