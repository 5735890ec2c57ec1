"""PATNet's and PartialNet's published names (haiduo/PartialNet): one layout for both forms."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from hybridzoo.checkpoints.keymaps.rules import rename

_RULES = [
    (r"^patch_embed\.proj\.", "stem.conv."),
    (r"^patch_embed\.norm\.", "stem.norm."),
    (r"\.spatial_mixing\.partial_conv3\.", ".mixer.conv."),
    (r"\.spatial_mixing\.attn\.cfc1\.", ".mixer.gate."),
    (r"\.spatial_mixing\.attn\.bn\.", ".mixer.gate_norm."),
    (r"\.spatial_mixing\.attn\.rpe_k\.lookup_table_bias$", ".mixer.bias.table"),
    (r"\.spatial_mixing\.attn\.", ".mixer."),
    (r"\.spatial_mixing\.", ".mixer."),
    (r"\.mlp\.0\.", ".mlp.expand.conv."),
    (r"\.mlp\.1\.", ".mlp.expand.norm."),
    (r"\.mlp\.3\.", ".mlp.project."),
    (r"\.mlp\.4\.conv_attn\.", ".mlp.gate.gate."),
    (r"\.mlp\.4\.norm2\.", ".mlp.gate.conv_norm."),
    (r"\.mlp\.4\.", ".mlp.gate."),
    (r"^avgpool_pre_head\.1\.", "head.after.0."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]
# Constants that the code keeps as buffers of a dynamic partial convolution.
_CONSTANT = re.compile(r"\.spatial_mixing\.(I|one|c_div|one_channel)$")


def convert(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """See `hybridzoo.checkpoints.convert`."""
    # Published stages and the mergings between them share one numbering.
    published = any(key.startswith(("patch_embed.", "norm0.")) for key in state_dict)
    converted = {}
    for name, tensor in state_dict.items():
        if _CONSTANT.search(name):
            continue
        key = rename(_number_stages(name), _RULES) if published else name
        if key.endswith(".mixer.gate.weight") and tensor.ndim == 4:  # 1x2 kernel over (mean, deviation)
            tensor = tensor.permute(0, 3, 2, 1).flatten(1)
        elif key == "head.after.0.weight" and tensor.ndim == 4:
            tensor = tensor.flatten(1)
        converted[key] = tensor
    return converted


def _number_stages(key: str) -> str:
    key = re.sub(r"^norm([0246])\.", lambda m: f"feature_norms.{int(m[1]) // 2}.", key)
    key = re.sub(r"^stages\.([135])\.reduction\.", lambda m: f"stages.{int(m[1]) // 2 + 1}.downsample.conv.", key)
    key = re.sub(r"^stages\.([135])\.norm\.", lambda m: f"stages.{int(m[1]) // 2 + 1}.downsample.norm.", key)
    return re.sub(r"^stages\.([0246])\.blocks\.", lambda m: f"stages.{int(m[1]) // 2}.blocks.", key)
