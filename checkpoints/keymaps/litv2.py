"""LITv2's published names: of classifiers, detectors and segmentors."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from hybridzoo.checkpoints.keymaps.dense import convert_dense
from hybridzoo.checkpoints.keymaps.tables import HEAD, Table, to_ours, to_published

_TABLE: Table = [
    ("patch_embed.", "stem."),
    # The downsampling between stages ends a published stage, and starts one of ours.
    *[(f"layers.{i}.downsample.", f"stages.{i + 1}.downsample.") for i in range(3)],
    ("layers.*.blocks.", "stages.*.blocks."),
    (".downsample.dconv.conv_offset.", ".downsample.offset."),
    (".downsample.dconv.", ".downsample.conv."),
    (".downsample.norm_layer.", ".downsample.norm."),
    (".blocks.*.norm1.", ".blocks.*.attn.branch.norm."),
    (".blocks.*.norm2.", ".blocks.*.mlp.branch.norm."),
    (".mlp.fc1.", ".mlp.branch.update.fc1."),
    (".mlp.fc2.", ".mlp.branch.update.fc2."),
    (".mlp.dwconv.dwconv.", ".mlp.branch.update.conv."),
    (".attn.l_q.", ".attn.branch.update.low_q."),
    (".attn.l_kv.", ".attn.branch.update.low_kv."),
    (".attn.l_proj.", ".attn.branch.update.low_proj."),
    (".attn.h_qkv.", ".attn.branch.update.high_qkv."),
    (".attn.h_proj.", ".attn.branch.update.high_proj."),
    *HEAD,
]
_NORMS: Table = [("norm*.", "out_norms.*.")]


def convert(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """See `hybridzoo.checkpoints.convert`; a published detector or segmentor becomes ours."""
    return convert_dense(state_dict, _classifier, _NORMS)


def _classifier(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {to_ours(name, _TABLE): tensor for name, tensor in state_dict.items()}


def publish(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """See `hybridzoo.checkpoints.keymaps.publish`."""
    return {to_published(key, _TABLE): tensor for key, tensor in state_dict.items()}
