"""Published names of Agent and InLine attention in the networks DeiT, PVT, Swin and CSwin."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from hybridzoo.checkpoints.keymaps.tables import (
    HEAD,
    Reshape,
    Table,
    bias_table,
    published_bias_table,
    shifted,
    to_ours,
    to_published,
)

_BLOCKS_PER_STAGE = 3  # DeiT's twelve blocks are four stages here
_CONSTANTS = re.compile(r"\.(attn_mask|relative_position_index)$")  # our network computes them when needed

_HOSTS: dict[str, Table] = {
    "deit": [
        ("patch_embed.", "stem."),
        *[(token, f"stem.{token}") for token in ("cls_token", "pos_embed")],
        *[(f"blocks.{i}.", "stages.{}.blocks.{}.".format(*divmod(i, _BLOCKS_PER_STAGE))) for i in range(12)],
    ],
    "pvt": [
        ("patch_embed1.", "stem."),
        *shifted("patch_embed{}.", "stages.{}.downsample.", 1, range(1, 4)),
        ("pos_embed1", "stem.pos_embed"),
        *shifted("pos_embed{}", "stages.{}.downsample.pos_embed", 1, range(1, 4)),
        *shifted("block{}.*.", "stages.{}.blocks.*.", 1, range(4)),
    ],
    "swin": [
        ("patch_embed.", "stem."),
        # Swin merges patches at the end of a stage, we at the start of the next
        *[(f"layers.{i}.downsample.", f"stages.{i + 1}.downsample.") for i in range(3)],
        ("layers.*.blocks.", "stages.*.blocks."),
        (".relative_position_bias_table", ".bias.table"),
    ],
    "cswin": [
        ("stage1_conv_embed.0.", "stem.proj."),
        ("stage1_conv_embed.2.", "stem.norm."),
        ("merge*.", "stages.*.downsample."),
        *shifted("stage{}.*.", "stages.{}.blocks.*.", 1, range(4)),
        (".attns.*.get_v.", ".stripes.*."),  # LePE
        (".attns.0.", ".attn."),
        ("stages.*.blocks.*.qkv.", "stages.*.blocks.*.attn.qkv."),
        ("stages.*.blocks.*.proj.", "stages.*.blocks.*.attn.proj."),
        (".stripes.*.", ".attn.lepe.*."),
    ],
}


# Parameters that are published with broadcast axes, by the end of their name: published axes, our axes, and the
# conversions in both directions. Agent attention's row, column and class biases are `(heads, agents, entries)` here.
_SHAPES: dict[str, tuple[int, int, Reshape, Reshape]] = {
    "bias.table": (2, 3, bias_table, published_bias_table),
    "ah_bias": (5, 3, lambda t: t[0].flatten(2), lambda t: t[None, :, :, :, None]),
    "aw_bias": (5, 3, lambda t: t[0].flatten(2), lambda t: t[None, :, :, None, :]),
    "ha_bias": (5, 3, lambda t: _swapped(t[0].flatten(1, 2)), lambda t: _swapped(t)[None, :, :, None, :]),
    "wa_bias": (5, 3, lambda t: _swapped(t[0].flatten(1, 2)), lambda t: _swapped(t)[None, :, None, :, :]),
    "ac_bias": (4, 2, lambda t: t[0].flatten(1), lambda t: t[None, :, :, None]),
    "ca_bias": (4, 2, lambda t: t[0].flatten(1), lambda t: t[None, :, None, :]),
}


def _swapped(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous()


def convert(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """See `hybridzoo.checkpoints.convert`."""
    state = {name: tensor for name, tensor in state_dict.items() if not _CONSTANTS.search(name)}
    # A CSwin block has the family's attention (one branch, with a plain convolution `dwc`) or stripes (LePE).
    family = {name.rsplit(".attns.", 1)[0] for name in state if re.search(r"\.attns\.0\.(an_bias|residual\.)", name)}
    table, converted = _table(model_name), {}
    for name, tensor in state.items():
        if ".attn.kv." in name:
            continue
        if ".attn.q." in name:  # PVT projects queries, and keys with values
            tensor = torch.cat([tensor, state[name.replace(".attn.q.", ".attn.kv.")]])
            name = name.replace(".attn.q.", ".attn.qkv.")
        if name.partition(".attns.")[0] in family:
            name = name.replace(".get_v.", ".dwc.")
        key = to_ours(name, table)
        converted[key] = _reshaped(key, tensor, back=False)
    return converted


def publish(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """See `hybridzoo.checkpoints.keymaps.publish`."""
    table, pvt, published = _table(model_name), "_pvt_" in model_name, {}
    for key, tensor in state_dict.items():
        name = to_published(key, table).replace(".attns.0.dwc.", ".attns.0.get_v.")
        if pvt and ".attn.qkv." in name:
            channels = len(tensor) // 3
            published[name.replace(".qkv.", ".q.")] = tensor[:channels].clone()
            published[name.replace(".qkv.", ".kv.")] = tensor[channels:].clone()
        else:
            published[name] = _reshaped(key, tensor, back=True)
    return published


def _table(model: str) -> Table:
    return [*_HOSTS[model.split("_")[1]], *HEAD]


def _reshaped(key: str, tensor: Tensor, *, back: bool) -> Tensor:
    for end, (theirs, ours, there, return_) in _SHAPES.items():
        if key.endswith(f".{end}") and tensor.ndim == (ours if back else theirs):
            return return_(tensor) if back else there(tensor)
    return tensor
