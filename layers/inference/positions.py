"""Stores position tables and biases, which depend only on weights and sizes, for one image size."""

from __future__ import annotations

from hybridzoo.layers.cascaded_group_attention import AbsoluteOffsetBias
from hybridzoo.layers.coordinate_position import CoordinateBias, CoordinateEmbedding
from hybridzoo.layers.inference.fusing import Fixed, swaps
from hybridzoo.layers.partial_attention import DistanceBias
from hybridzoo.layers.relative_position import RelativePositionBias

for kind in (RelativePositionBias, AbsoluteOffsetBias, DistanceBias, CoordinateBias, CoordinateEmbedding):
    swaps(kind)(Fixed)
