"""Shared by the four hosts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models import generate_default_cfgs
from torch import nn

from hybridzoo import checkpoints

ALL = 1000  # number of blocks with the family's attention: more than any stage has

Attention = Callable[[int, int, int, int], nn.Module]
"""A family's attention for `(stage, dim, num_heads, side)`, `side` in tokens of the map at the published size."""


def default_cfgs(family: str) -> Any:
    """A family's cards as timm default configurations, for all hosts."""
    names = dict(first_conv="stem.proj", classifier="head.fc")
    pyramids, plain = (checkpoints.timm_cfgs(family, **names, reduction=r) for r in (32, 16))
    return generate_default_cfgs({n: (plain if "_deit_" in n else pyramids)[n] for n in pyramids})
