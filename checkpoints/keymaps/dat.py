"""Published names of DAT, DAT+ and DAT++, and of DAT++'s detectors and segmentors."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from hybridzoo.checkpoints.keymaps.dense import convert_dense
from hybridzoo.checkpoints.keymaps.tables import Table, bias_table, published_bias_table, to_ours, to_published

_CONSTANTS = re.compile(r"\.(attn_mask|relative_position_index)$")  # follow from the map's size
_NORMS: Table = [("norms.*.norm.", "out_norms.*.")]  # of the maps of a detector or segmentor
_DEPTH = 18  # of the deepest stage
_DEFORMABLE: Table = [
    (".rpe_table", ".bias.table"),
    (".attn.conv_offset.0.", ".attn.offset.conv."),
    (".attn.conv_offset.1.norm.", ".attn.offset.norm."),
    (".attn.conv_offset.3.", ".attn.offset.proj."),
    (".attn.proj_q.", ".attn.query."),
    (".attn.proj_k.", ".attn.key."),
    (".attn.proj_v.", ".attn.value."),
    (".attn.proj_out.", ".attn.proj."),
]
_WINDOWS: Table = [
    (".relative_position_bias_table", ".bias.table"),
    (".attn.proj_qkv.", ".attn.qkv."),
    (".attn.proj_out.", ".attn.proj."),
]


def _table(model: str, deformable: bool) -> Table:
    """Rows for everything outside of attentions, for deformable attention, and for the network's other attention."""
    plus = model.startswith("dat_plus")
    before, after = ("", "0.") if plus else ("chunk.", "")  # in an MLP's names
    return [
        ("patch_proj.0.", "stem.conv1."),
        ("patch_proj.1.norm.", "stem.norm1." if plus else "stem.norm."),
        ("patch_proj.3.", "stem.conv2."),
        ("patch_proj.4.norm.", "stem.norm2."),
        *[(f"down_projs.{i}.0.", f"stages.{i + 1}.downsample.reduction.") for i in range(3)],
        *[(f"down_projs.{i}.1.norm.", f"stages.{i + 1}.downsample.norm.") for i in range(3)],
        # All norms of a stage are in one list: for the first block's attention, its MLP, the second attention, …
        *[(f"stages.*.layer_norms.{2 * i}.norm.", f"stages.*.blocks.{i}.norm1.") for i in range(_DEPTH)],
        *[(f"stages.*.layer_norms.{2 * i + 1}.norm.", f"stages.*.blocks.{i}.norm2.") for i in range(_DEPTH)],
        ("stages.*.local_perception_units.*.", "stages.*.blocks.*.local."),
        *[(f"stages.*.mlps.*.{before}linear{i}.{after}", f"stages.*.blocks.*.mlp.fc{i}.") for i in (1, 2)],
        ("stages.*.mlps.*.dwc.", "stages.*.blocks.*.mlp.conv."),
        ("stages.*.attns.*.", "stages.*.blocks.*.attn."),
        *(_DEFORMABLE if deformable else [] if model.startswith(("dat_plus", "dat_plain")) else _WINDOWS),
        ("cls_norm.norm.", "norm."),
        ("cls_head.", "head.fc."),
    ]


def convert(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """See `hybridzoo.checkpoints.convert`.

    A published detector or segmentor becomes ours: `backbone.` is a `PyramidBackbone` with output norms.
    """
    return convert_dense(state_dict, lambda state: _classifier(state, model_name), _NORMS)


def _classifier(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    tables = [_table(model_name, deformable) for deformable in (False, True)]
    deformable = _blocks(state_dict, ".proj_q.")
    converted = {}
    for name, tensor in state_dict.items():
        if _CONSTANTS.search(name):
            continue
        if name.endswith(".relative_position_bias_table"):
            tensor = bias_table(tensor)
        elif tensor.ndim == 4 and tensor.shape[2:] == (1, 1):  # our linear layers were published as convolutions
            tensor = tensor.flatten(1)
        converted[to_ours(name, tables[_block(name) in deformable])] = tensor
    return converted


def publish(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """See `hybridzoo.checkpoints.keymaps.publish`."""
    tables = [_table(model_name, deformable) for deformable in (False, True)]
    deformable = _blocks(state_dict, ".attn.query.")
    published = {}
    for key, tensor in state_dict.items():
        name = to_published(key, tables[_block(key) in deformable])
        linear = tensor.ndim == 2 and key.startswith("stages.")
        if name.endswith(".relative_position_bias_table"):
            tensor = published_bias_table(tensor)
        elif linear and ((".mlp." in key and "chunk" not in name) or (".attn." in key and _block(key) in deformable)):
            tensor = tensor[:, :, None, None]
        published[name] = tensor
    return published


def _block(name: str) -> str:
    return ".".join(name.split(".")[:4])


def _blocks(names: Mapping[str, Tensor], part: str) -> set[str]:
    return {_block(name) for name in names if part in name}
