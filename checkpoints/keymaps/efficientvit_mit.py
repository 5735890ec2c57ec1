"""EfficientViT (MIT): the authors' names for classifiers and segmentation models, and timm's."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from hybridzoo.checkpoints.keymaps.rules import Rules, rename

# The authors' layout to timm's. L counts the stem as a stage.
_B_TO_TIMM: Rules = [
    (r"^backbone\.input_stem\.op_list\.0\.", "stem.in_conv."),
    (r"^backbone\.input_stem\.op_list\.(\d+)\.", lambda m: f"stem.res{int(m[1]) - 1}."),
    (r"^backbone\.stages\.(\d+)\.op_list\.", r"stages.\1.blocks."),
]
_L_TO_TIMM: Rules = [
    (r"^backbone\.stages\.0\.op_list\.0\.", "stem.in_conv."),
    (r"^backbone\.stages\.0\.op_list\.(\d+)\.", lambda m: f"stem.res{int(m[1]) - 1}."),
    (r"^backbone\.stages\.(\d+)\.op_list\.", lambda m: f"stages.{int(m[1]) - 1}.blocks."),
]
_RULES: Rules = [
    (r"^stem\.in_conv\.", "stem.conv."),
    (r"^stem\.res(\d+)\.main\.(?:depth_conv|conv1)\.", r"stem.pairs.\1.branch.0."),
    (r"^stem\.res(\d+)\.main\.(?:point_conv|conv2)\.", r"stem.pairs.\1.branch.1."),
    (r"(\.blocks\.\d+)\.main\.", r"\1."),
    (r"\.context_module\.main\.", ".attn.branch."),
    (r"\.local_module\.main\.", ".local."),
    (r"\.attn\.branch\.qkv\.conv\.", ".attn.branch.qkv."),
    (r"\.attn\.branch\.aggreg\.", ".attn.branch.aggregate."),
    # classifier: the authors', then timm's
    (r"^head\.op_list\.0\.", "head.before."),
    (r"^head\.op_list\.2\.linear\.", "head.after.0."),
    (r"^head\.op_list\.2\.norm\.", "head.after.1."),
    (r"^head\.op_list\.3\.linear\.", "head.fc."),
    (r"^head\.in_conv\.", "head.before."),
    (r"^head\.classifier\.([01])\.", r"head.after.\1."),
    (r"^head\.classifier\.4\.", "head.fc."),
    # segmentation head
    (r"^head\.input_ops\.([01])\.op_list\.0\.", r"head.inputs.\1."),
    (r"^head\.input_ops\.2\.", "head.inputs.2."),
    (r"^head\.middle\.op_list\.(\d+)\.main\.", r"head.middle.\1."),
    # convolutions of the bottlenecks
    (r"\.(?:inverted_conv|spatial_conv)\.", ".expand."),
    (r"\.depth_conv\.", ".depthwise."),
    (r"\.point_conv\.", ".project."),
]  # fmt: skip


def convert(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """See `hybridzoo.checkpoints.convert`; a segmentation model's backbone stays below `backbone.`."""
    # Of a segmentation head's last convolutions the last one classifies; one before it widens.
    outputs = [int(m[1]) for key in state_dict if (m := re.match(r"head\.output_ops\.0\.op_list\.(\d+)\.", key))]
    rules: Rules = [
        *(_L_TO_TIMM if "_mit_l" in model_name else _B_TO_TIMM),
        *_RULES,
        (rf"^head\.output_ops\.0\.op_list\.{max(outputs, default=0)}\.conv\.", "head.classifier."),
        (r"^head\.output_ops\.0\.op_list\.0\.", "head.widen."),
    ]
    segments = any(key.startswith("head.input_ops.") for key in state_dict)
    converted = {}
    for published, tensor in state_dict.items():
        key = rename(published, rules)
        if segments and published.startswith("backbone."):
            key = f"backbone.{key}"
        converted[key] = tensor
    return converted
