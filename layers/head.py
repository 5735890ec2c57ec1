"""A classifier with layers of its own before and after pooling."""

from __future__ import annotations

from typing import Any

from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn


class PooledHead(nn.Module):
    """`before` on the map, global pooling, `after` on the vector, dropout, linear classifier.

    Args:
        before: module `(batch, dim, H, W)` -> map.
        after: module `(batch, channels)` -> `(batch, hidden_dim)`.
        hidden_dim: width of the vector that the classifier reads.
        num_classes: 0 for no classifier: the head returns that vector.
        pool_type: timm's name of the pooling; `""` for no head at all: maps pass as they are. Then `before` and `after`
            are dropped, so that dense models carry no idle weights.
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
        self.pool_type = pool_type
        self.before = before
        self.after = after
        self.drop = nn.Dropout(drop_rate)
        self.fc: nn.Module = nn.Linear(hidden_dim, num_classes) if num_classes else nn.Identity()
        self.pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=True)
        self._use_pool(num_classes, pool_type)

    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        """A fresh classifier (none for 0 classes), and another pooling if `pool_type` is given."""
        if pool_type is not None:
            self._use_pool(num_classes, pool_type)
        if num_classes and not self.pool_type:
            raise ValueError("num_classes: this head's own layers were removed with its pooling; create the model anew")
        like = next(self.parameters(), None)
        where: dict[str, Any] = {} if like is None else dict(device=like.device, dtype=like.dtype)
        self.fc = nn.Linear(self.hidden_dim, num_classes, **where) if num_classes else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if not self.pool_type:
            return x
        x = self.drop(self.after(self.pool(self.before(x))))
        return x if pre_logits else self.fc(x)

    def _use_pool(self, num_classes: int, pool_type: str) -> None:
        if pool_type and not self.pool_type:
            raise ValueError("pool_type: this head's own layers were removed with its pooling; create the model anew")
        if num_classes and not pool_type:
            raise ValueError(f"pool_type must name a pooling where there are classes; got num_classes={num_classes}")
        pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=True)
        if pool_type and pool.feat_mult() != 1:
            raise ValueError(f"pool_type must keep the number of channels ('avg', 'max', 'avgmax'); got {pool_type!r}")
        if not pool_type:
            self.before, self.after = nn.Identity(), nn.Identity()
        self.pool_type, self.pool = pool_type, pool
