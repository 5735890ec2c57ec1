"""RAVLT's published names and shapes: 1x1 convolutions are linear layers here, layer scales vectors."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from hybridzoo.checkpoints.keymaps.dense import convert_dense
from hybridzoo.checkpoints.keymaps.tables import HEAD, Table, to_ours, to_published

_TURNS = re.compile(r"\.RoPE\.angle$")  # the rotary embedding's constants, which our network computes when needed
_LINEAR = re.compile(r"^head\.fc\.weight$|\.(qkvg|proj|fc[12])\.weight$")

_TABLE: Table = [
    *[(f"patch_embed.proj.{3 * i}.", f"stem.conv{i + 1}.conv.") for i in range(4)],
    *[(f"patch_embed.proj.{3 * i + 1}.", f"stem.conv{i + 1}.norm.") for i in range(4)],
    # The downsampling between stages ends a published stage, and starts one of ours.
    *[(f"layers.{i}.downsample.reduction.", f"stages.{i + 1}.downsample.reduction.conv.") for i in range(3)],
    *[(f"layers.{i}.downsample.norm.", f"stages.{i + 1}.downsample.reduction.norm.") for i in range(3)],
    ("layers.*.blocks.", "stages.*.blocks."),
    (".gamma_1", ".scale1.gamma"),
    (".gamma_2", ".scale2.gamma"),
    (".pos.", ".pos_embed."),
    (".norm1.norm.", ".norm1."),
    (".norm2.norm.", ".norm2."),
    (".attn.qkvo.", ".attn.qkvg."),
    (".ffn.dwconv.", ".mlp.conv."),
    (".ffn.fc1.", ".mlp.fc1."),
    (".ffn.fc2.", ".mlp.fc2."),
    ("proj.", "head.before.conv."),
    ("norm.", "head.before.norm."),
    *HEAD,
]
_NORMS: Table = [("extra_norms.*.norm.", "out_norms.*.")]


def convert(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """See `hybridzoo.checkpoints.convert`; a published detector or segmentor becomes ours."""
    return convert_dense(state_dict, _classifier, _NORMS)


def _classifier(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    converted = {}
    for name, tensor in state_dict.items():
        key = to_ours(name, _TABLE)
        if _LINEAR.search(key):
            tensor = tensor.flatten(1)
        if not _TURNS.search(name):
            converted[key] = tensor.flatten() if key.endswith(".gamma") else tensor
    return converted


def publish(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """See `hybridzoo.checkpoints.keymaps.publish`."""
    published = {}
    for key, tensor in state_dict.items():
        if _LINEAR.search(key):
            tensor = tensor[:, :, None, None]
        published[to_published(key, _TABLE)] = tensor[None, :, None, None] if key.endswith(".gamma") else tensor
    return published
