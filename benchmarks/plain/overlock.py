"""OverLoCK with the kernels of all tokens and all windows of values written out, in the published order."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hybridzoo.layers import ContextMixing
from hybridzoo.layers.context_mixing import at_least
from hybridzoo.layers.resize import adaptive_pool, resize_map
from hybridzoo.train.bench.forms import tables


class PlainContextMixing(ContextMixing):
    """A token's likeness to every cell of the context, then the matrix that makes a kernel of the likenesses."""

    def forward(self, x: Tensor, context: Tensor, value: Tensor) -> Tensor:
        size = (x.shape[2], x.shape[3])
        enlarged = at_least(size, self.kernels[1])
        if enlarged != size:
            x, context, value = (resize_map(t, enlarged) for t in (x, context, value))
        query = self.query(x).flatten(2).unflatten(1, (self.num_heads, -1)) * self.scale  # (B, heads, d, tokens)
        cells = adaptive_pool(context.permute(0, 2, 3, 1), (self.regions, self.regions)).permute(0, 3, 1, 2)
        key = self.key(cells).flatten(2).unflatten(1, (self.num_heads, -1))
        likeness = query.transpose(2, 3) @ key
        scores = self.taps(likeness) + self.tap_bias
        places = [kernel * kernel for kernel in self.kernels]
        halves = value.unflatten(1, (2, self.num_heads, -1)).unbind(1)
        out = [
            self._mix(part, half, kernel, rpb, enlarged)
            for part, half, kernel, rpb in zip(
                scores.split(places, 3), halves, self.kernels, (self.small_rpb, self.large_rpb), strict=True
            )
        ]
        mixed = torch.stack(out, 3).flatten(3)
        if enlarged != size:
            mixed = adaptive_pool(mixed, size)
        return self.proj(mixed.permute(0, 3, 1, 2))

    def _mix(self, scores: Tensor, value: Tensor, kernel: int, rpb: Tensor, size: tuple[int, int]) -> Tensor:
        """Scores `(B, heads, tokens, kernel * kernel)`, value `(B, heads, e, H, W)` -> `(B, H, W, heads, e)`."""
        keys_h, entries_h, keys_w, entries_w = tables(size, (kernel, kernel), (1, 1), value.device)
        bias = rpb[:, entries_h[:, None, :, None], entries_w[None, :, None, :]].flatten(3).flatten(1, 2)
        weights = (scores + bias).softmax(3)
        windows = value[:, :, :, keys_h[:, None, :, None], keys_w[None, :, None, :]].flatten(5).flatten(3, 4)
        return torch.einsum("bhnt,bhent->bnhe", weights, windows).unflatten(1, size)


def make_plain(model: nn.Module) -> nn.Module:
    """Give `model` plain layers, in place."""
    for module in model.modules():
        if type(module) is ContextMixing:
            module.__class__ = PlainContextMixing
    return model
