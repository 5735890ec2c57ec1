"""Blocks that families share, and the attention layers."""

from hybridzoo.layers.bi_level_routing import BiLevelRoutingAttention
from hybridzoo.layers.stage import Stage

__all__ = ["BiLevelRoutingAttention", "Stage"]
