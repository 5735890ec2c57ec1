"""From the names in published state dicts to ours.

A family's map is a list of (pattern, replacement), each applied once, in order, to every key; our own names pass
through unchanged, so that converting twice does no harm.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_BIFORMER = [
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
_BIFORMER_MERGES = {
    False: [(r"^downsample_layers\.(\d+)\.0\.", r"stages.\1.downsample.conv."),
            (r"^downsample_layers\.(\d+)\.1\.", r"stages.\1.downsample.norm.")],
    True: [(r"^downsample_layers\.(\d+)\.0\.", r"stages.\1.downsample.norm."),
           (r"^downsample_layers\.(\d+)\.1\.", r"stages.\1.downsample.conv.")],
}  # fmt: skip


def convert(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """A published state dict under our names and shapes, ready for `load_state_dict(strict=True)`.

    Args:
        state_dict: as published, out of its wrapper (`{"model": ...}`); or already ours.
        model_name: registered name, with or without a tag.

    Raises:
        ValueError: no key map for this model.
    """
    family = model_name.split(".")[0].split("_")[0]
    if family != "biformer":
        raise ValueError(f"model_name: no published weights are known for {model_name!r}; families: biformer")
    rules = _BIFORMER + _BIFORMER_MERGES["_stl" in model_name]
    converted = {}
    for key, tensor in state_dict.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key, count=1)
        # stl_nchw was published with 1x1 convolutions where we have linear layers
        pointwise = tensor.ndim == 4 and tensor.shape[2:] == (1, 1) and re.search(r"\.(qkv|proj|fc1|fc2)\.", key)
        converted[key] = tensor.flatten(1) if pointwise else tensor
    return converted
