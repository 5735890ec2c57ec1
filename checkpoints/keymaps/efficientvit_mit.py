"""EfficientViT (MIT): the authors' names for classifiers and segmentation models, and timm's."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from hybridzoo.checkpoints.keymaps.tables import Row, Table, shifted, to_ours, to_published

_PARTS = (("inverted_conv", "expand"), ("depth_conv", "depthwise"), ("point_conv", "project"))
_SPATIAL = ".spatial_conv."  # blocks without a depthwise convolution have this instead of the inverted one


def _parts(published: str, ours: str) -> list[Row]:
    return [(f"{published}.main.{theirs}.", f"{ours}.{own}.") for theirs, own in _PARTS]


_BLOCKS: Table = [
    *_parts("stages.*.blocks.*", "stages.*.blocks.*"),
    *_parts(".local_module", ".local"),
    (".context_module.main.", ".attn.branch."),
    (".attn.branch.qkv.conv.", ".attn.branch.qkv."),
    (".attn.branch.aggreg.", ".attn.branch.aggregate."),
]


def _stem(published: str, model: str, first: int) -> list[Row]:
    layers = ("conv1", "conv2") if "_mit_l" in model else ("depth_conv", "point_conv")
    rows: list[Row] = []
    for i, layer in enumerate(layers):
        rows += shifted(f"{published}{{}}.main.{layer}.", f"stem.pairs.{{}}.branch.{i}.", first, range(8))
    return rows


def _authors(model: str) -> Table:
    large = "_mit_l" in model  # counts the stem as a stage
    stem = "backbone.stages.0" if large else "backbone.input_stem"
    return [
        (f"{stem}.op_list.0.", "stem.conv."),
        *_stem(f"{stem}.op_list.", model, 1),
        *shifted("backbone.stages.{}.op_list.*.", "stages.{}.blocks.*.", int(large), range(4)),
        *_BLOCKS,
        ("head.op_list.0.", "head.before."),
        ("head.op_list.2.linear.", "head.after.0."),
        ("head.op_list.2.norm.", "head.after.1."),
        ("head.op_list.3.linear.", "head.fc."),
    ]


def _timm(model: str) -> Table:
    return [
        ("stem.in_conv.", "stem.conv."),
        *_stem("stem.res", model, 0),
        *_BLOCKS,
        ("head.in_conv.", "head.before."),
        ("head.classifier.0.", "head.after.0."),
        ("head.classifier.1.", "head.after.1."),
        ("head.classifier.4.", "head.fc."),
    ]


def _segmentation(names: Mapping[str, Tensor]) -> Table:
    # The last convolution of a segmentation head classifies; the one before it, if any, increases the channels.
    last = max(int(m[1]) for name in names if (m := re.match(r"head\.output_ops\.0\.op_list\.(\d+)\.", name)))
    return [
        ("head.input_ops.*.op_list.0.", "head.inputs.*."),
        ("head.input_ops.2.", "head.inputs.2."),
        *_parts("head.middle.op_list.*", "head.middle.*"),
        (f"head.output_ops.0.op_list.{last}.conv.", "head.classifier."),
        ("head.output_ops.0.op_list.0.", "head.widen."),
    ]


def convert(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """See `hybridzoo.checkpoints.convert`; the backbone of a segmentation model keeps its prefix `backbone.`."""
    segments = any(name.startswith("head.input_ops.") for name in state_dict)
    authors = any(".op_list." in name for name in state_dict)
    table = [*(_segmentation(state_dict) if segments else []), *(_authors if authors else _timm)(model_name)]
    converted = {}
    for name, tensor in state_dict.items():
        key = to_ours(name.replace(_SPATIAL, ".inverted_conv."), table)
        converted[f"backbone.{key}" if segments and name.startswith("backbone.") else key] = tensor
    return converted


def publish(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """See `hybridzoo.checkpoints.keymaps.publish`."""
    return _published(state_dict, _authors(model_name))


def like_timm(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """See `hybridzoo.checkpoints.keymaps.publish`."""
    return _published(state_dict, _timm(model_name))


def _published(state: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    depthwise = {key.rpartition(".depthwise.")[0] for key in state}
    published = {}
    for key, tensor in state.items():
        name, block = to_published(key, table), key.rpartition(".expand.")[0]
        published[name if block in depthwise else name.replace(".inverted_conv.", _SPATIAL)] = tensor
    return published
