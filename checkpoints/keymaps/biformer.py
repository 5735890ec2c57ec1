"""BiFormer's published names, from both published code bases."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from hybridzoo.checkpoints.keymaps.tables import HEAD, Table, to_ours, to_published

_POINTWISE = re.compile(r"\.(qkv|proj|fc[12])\.weight$")


def _table(model: str) -> Table:
    swin_like, nchw = "_stl" in model, "_nchw" in model
    conv, norm = (1, 0) if swin_like else (0, 1)  # between stages
    qkv, proj = ("qkv_linear", "output_linear") if nchw else ("qkv.qkv", "wo")
    return [
        ("downsample_layers.0.0.", "stem.conv1."),
        ("downsample_layers.0.1.", "stem.norm1."),
        ("downsample_layers.0.3.", "stem.conv2."),
        ("downsample_layers.0.4.", "stem.norm2."),
        (f"downsample_layers.*.{conv}.", "stages.*.downsample.conv."),
        (f"downsample_layers.*.{norm}.", "stages.*.downsample.norm."),
        *([] if swin_like else [("stages.*.*.", "stages.*.blocks.*.")]),
        # the last stage's attention is plain and has our names
        *[(f"stages.{stage}.blocks.*.attn.{qkv}.", f"stages.{stage}.blocks.*.attn.qkv.") for stage in range(3)],
        *[(f"stages.{stage}.blocks.*.attn.{proj}.", f"stages.{stage}.blocks.*.attn.proj.") for stage in range(3)],
        (".mlp.0.", ".mlp.fc1."),
        (".mlp.2." if swin_like else ".mlp.3.", ".mlp.fc2."),
        *HEAD,
    ]


def convert(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """See `hybridzoo.checkpoints.convert`."""
    converted, table = {}, _table(model_name)
    for name, tensor in state_dict.items():
        key = to_ours(name, table)
        # stl_nchw was published with 1x1 convolutions where we have linear layers
        pointwise = tensor.ndim == 4 and tensor.shape[2:] == (1, 1) and _POINTWISE.search(key)
        converted[key] = tensor.flatten(1) if pointwise else tensor
    return converted


def publish(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """See `hybridzoo.checkpoints.keymaps.publish`."""
    published, table = {}, _table(model_name)
    for key, tensor in state_dict.items():
        pointwise = "_nchw" in model_name and _POINTWISE.search(key)
        published[to_published(key, table)] = tensor[:, :, None, None] if pointwise else tensor
    return published
