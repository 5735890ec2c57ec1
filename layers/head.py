"""A classifier with further layers before and after pooling."""

from __future__ import annotations

import torch
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn


class PooledHead(nn.Module):
    """`before` on the map, global pooling, `after` on the vector, dropout, linear classifier.

    Args:
        before: module `(batch, dim, H, W)` -> map.
        after: module `(batch, channels)` -> `(batch, hidden_dim)`.
        hidden_dim: width of the vector that the classifier reads.
        num_classes: 0 for no classifier: the head returns that vector.
        pool_type: timm's name of the pooling; `""` for no head: maps are returned unchanged. Then `before` and `after`
            are removed, so that dense models have no unused weights; a later pooling creates new ones.
        drop_rate: of the dropout.

    Raises:
        ValueError: a classifier without pooling, or a pooling that changes the number of channels.
    """

    def __init__(
        self,
        before: nn.Module,
        after: nn.Module,
        hidden_dim: int,
        num_classes: int,
        pool_type: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        self.pool_type = "avg"  # of the layers as they come
        self.before = before
        self.after = after
        self.drop = nn.Dropout(drop_rate)
        self._dropped: tuple[nn.Module, nn.Module] | None = None
        self.reset(num_classes, pool_type)

    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        """Create a new classifier (none for 0 classes), and another pooling if `pool_type` is given."""
        pool_type = self.pool_type if pool_type is None else pool_type
        if num_classes and not pool_type:
            raise ValueError(f"pool_type must name a pooling where there are classes; got num_classes={num_classes}")
        pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=True)
        if pool_type and pool.feat_mult() != 1:
            raise ValueError(f"pool_type must keep the number of channels ('avg', 'max', 'avgmax'); got {pool_type!r}")
        if not pool_type and self._dropped is None:
            self._dropped = (self.before.to("meta"), self.after.to("meta"))  # a tuple: no longer part of the model
            self.before, self.after = nn.Identity(), nn.Identity()
        elif pool_type and self._dropped is not None:
            self.before, self.after = (_fresh(module).train(self.training) for module in self._dropped)
            self._dropped = None
        self.pool_type, self.pool = pool_type, pool
        self.fc: nn.Module = nn.Linear(self.hidden_dim, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if not self.pool_type:
            return x
        x = self.drop(self.after(self.pool(self.before(x))))
        return x if pre_logits else self.fc(x)


def _fresh(module: nn.Module) -> nn.Module:
    """The module, which is on the meta device, with newly initialised weights."""
    module = module.to_empty(device=torch.get_default_device())
    for part in module.modules():
        if callable(initialise := getattr(part, "reset_parameters", None)):
            initialise()
    return module
