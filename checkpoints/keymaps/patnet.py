"""PATNet's and PartialNet's published names (haiduo/PartialNet): one layout for both forms."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from hybridzoo.checkpoints.keymaps.tables import HEAD, Table, to_ours, to_published

_TABLE: Table = [
    ("patch_embed.proj.", "stem.conv."),
    ("patch_embed.norm.", "stem.norm."),
    # Published stages and the mergings between them are numbered together.
    *[(f"norm{2 * i}.", f"feature_norms.{i}.") for i in range(4)],
    *[(f"stages.{2 * i}.blocks.", f"stages.{i}.blocks.") for i in range(4)],
    *[(f"stages.{2 * i - 1}.reduction.", f"stages.{i}.downsample.conv.") for i in range(1, 4)],
    *[(f"stages.{2 * i - 1}.norm.", f"stages.{i}.downsample.norm.") for i in range(1, 4)],
    (".spatial_mixing.", ".mixer."),
    (".mixer.partial_conv3.", ".mixer.conv."),
    (".mixer.attn.cfc1.", ".mixer.gate."),
    (".mixer.attn.bn.", ".mixer.gate_norm."),
    (".mixer.attn.rpe_k.lookup_table_bias", ".mixer.bias.table"),
    (".mixer.attn.qkv.", ".mixer.qkv."),
    (".mixer.attn.proj.", ".mixer.proj."),
    (".mlp.0.", ".mlp.expand.conv."),
    (".mlp.1.", ".mlp.expand.norm."),
    (".mlp.3.", ".mlp.project."),
    (".mlp.4.", ".mlp.gate."),
    (".mlp.gate.conv_attn.", ".mlp.gate.gate."),
    (".mlp.gate.norm2.", ".mlp.gate.conv_norm."),
    ("avgpool_pre_head.1.", "head.after.0."),
    *HEAD,
]
# Constants that the code keeps as buffers of a dynamic partial convolution.
_CONSTANT = re.compile(r"\.spatial_mixing\.(I|one|c_div|one_channel)$")


def convert(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """See `hybridzoo.checkpoints.convert`."""
    published = any(name.startswith(("patch_embed.", "norm0.")) for name in state_dict)
    converted = {}
    for name, tensor in state_dict.items():
        if _CONSTANT.search(name):
            continue
        key = to_ours(name, _TABLE) if published else name
        if key.endswith(".mixer.gate.weight") and tensor.ndim == 4:  # 1x2 kernel over (mean, deviation)
            tensor = tensor.permute(0, 3, 2, 1).flatten(1)
        elif key == "head.after.0.weight" and tensor.ndim == 4:
            tensor = tensor.flatten(1)
        converted[key] = tensor
    return converted


def publish(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """See `hybridzoo.checkpoints.keymaps.publish`."""
    published = {}
    for key, tensor in state_dict.items():
        if key.endswith(".mixer.gate.weight"):
            tensor = tensor.unflatten(1, (2, 1, -1)).permute(0, 3, 2, 1)
        elif key == "head.after.0.weight":
            tensor = tensor[:, :, None, None]
        published[to_published(key, _TABLE)] = tensor
    return published
