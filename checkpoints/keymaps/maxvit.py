"""MaxViT's published names: timm's conversion of the TensorFlow weights."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from hybridzoo.checkpoints.keymaps.tables import Table, to_ours, to_published

_TABLE: Table = [
    ("stem.conv1.weight", "stem.conv1.conv.weight"),
    ("stem.conv1.bias", "stem.conv1.conv.bias"),
    ("stem.norm1.", "stem.conv1.norm."),
    (".conv.shortcut.expand.", ".conv.shortcut.project.conv."),
    (".conv.conv1_1x1.", ".conv.expand.conv."),
    (".conv.norm1.", ".conv.expand.norm."),
    (".conv.conv2_kxk.", ".conv.depthwise.conv."),
    (".conv.norm2.", ".conv.depthwise.norm."),
    (".conv.conv3_1x1.", ".conv.project.conv."),
    (".attn.rel_pos.relative_position_bias_table", ".attn.bias.table"),
]


def convert(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """See `hybridzoo.checkpoints.convert`."""
    return {to_ours(name, _TABLE): tensor for name, tensor in state_dict.items()}


def publish(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """See `hybridzoo.checkpoints.keymaps.publish`."""
    return {to_published(key, _TABLE): tensor for key, tensor in state_dict.items()}


like_timm = publish
