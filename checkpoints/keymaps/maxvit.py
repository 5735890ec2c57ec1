"""MaxViT's published names: timm's conversion of the TensorFlow weights."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from hybridzoo.checkpoints.keymaps.rules import rename

_RULES = [
    (r"^stem\.conv1\.(weight|bias)$", r"stem.conv1.conv.\1"),
    (r"^stem\.norm1\.", "stem.conv1.norm."),
    (r"\.conv\.shortcut\.expand\.", ".conv.shortcut.project.conv."),
    (r"\.conv\.conv1_1x1\.", ".conv.expand.conv."),
    (r"\.conv\.norm1\.", ".conv.expand.norm."),
    (r"\.conv\.conv2_kxk\.", ".conv.depthwise.conv."),
    (r"\.conv\.norm2\.", ".conv.depthwise.norm."),
    (r"\.conv\.conv3_1x1\.", ".conv.project.conv."),
    (r"\.attn\.rel_pos\.relative_position_bias_table$", ".attn.bias.table"),
]


def convert(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """See `hybridzoo.checkpoints.convert`."""
    return {rename(key, _RULES): tensor for key, tensor in state_dict.items()}
