"""BiFormer's published names, in both code bases."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from hybridzoo.checkpoints.keymaps.rules import rename

_RULES = [
    # stem: conv, norm, (GELU,) conv, norm in one Sequential
    (r"^downsample_layers\.0\.0\.", "stem.conv1."),
    (r"^downsample_layers\.0\.1\.", "stem.norm1."),
    (r"^downsample_layers\.0\.3\.", "stem.conv2."),
    (r"^downsample_layers\.0\.4\.", "stem.norm2."),
    (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),  # stl only: bring both layouts to stages.s.b
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.attn\.(?:qkv\.qkv|qkv_linear)\.", ".attn.qkv."),
    (r"\.attn\.(?:wo|output_linear)\.", ".attn.proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.[23]\.", ".mlp.fc2."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]
# Between stages: conv then norm, or, in the Swin-like skeleton, norm then conv.
_MERGES = {
    False: [(r"^downsample_layers\.(\d+)\.0\.", r"stages.\1.downsample.conv."),
            (r"^downsample_layers\.(\d+)\.1\.", r"stages.\1.downsample.norm.")],
    True: [(r"^downsample_layers\.(\d+)\.0\.", r"stages.\1.downsample.norm."),
           (r"^downsample_layers\.(\d+)\.1\.", r"stages.\1.downsample.conv.")],
}  # fmt: skip


def convert(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """See `hybridzoo.checkpoints.convert`."""
    rules = _RULES + _MERGES["_stl" in model_name]
    converted = {}
    for published, tensor in state_dict.items():
        key = rename(published, rules)
        # stl_nchw was published with 1x1 convolutions where we have linear layers
        pointwise = tensor.ndim == 4 and tensor.shape[2:] == (1, 1) and re.search(r"\.(qkv|proj|fc1|fc2)\.", key)
        converted[key] = tensor.flatten(1) if pointwise else tensor
    return converted
