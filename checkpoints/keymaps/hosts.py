"""Published names of the networks on the hosts DeiT, PVT, Swin and CSwin: Agent attention and InLine attention."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from hybridzoo.checkpoints.keymaps.rules import Rules, rename

_BLOCKS_PER_STAGE = 3  # DeiT's twelve blocks are four stages here
_CONSTANTS = re.compile(r"\.(attn_mask|relative_position_index)$")  # buffers of Swin's windows: made when needed here
_TABLE = re.compile(r"\.relative_position_bias_table$")


def _patches(match: re.Match[str]) -> str:
    """PVT's embedding of the patches of stage 1, 2, …: our stem, and what comes first in our stages 1, …"""
    stage = int(match[1]) - 1
    return f"stages.{stage}.downsample." if stage else "stem."


def _stage(match: re.Match[str]) -> str:
    return f"stages.{int(match[1]) - 1}.blocks.{match[2]}."


_RULES: Rules = [
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
    # DeiT
    (r"^(cls_token|pos_embed)$", r"stem.\1"),
    (r"^blocks\.(\d+)\.", lambda m: "stages.{}.blocks.{}.".format(*divmod(int(m[1]), _BLOCKS_PER_STAGE))),
    # PVT; the first rule is DeiT's and Swin's too
    (r"^patch_embed\.", "stem."),
    (r"^patch_embed(\d)\.", _patches),
    (r"^pos_embed(\d)$", lambda m: f"{_patches(m)}pos_embed"),
    (r"^block(\d)\.(\d+)\.", _stage),
    # Swin merges patches at the end of a stage, we at the start of the next
    (r"^layers\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (r"^layers\.(\d+)\.", r"stages.\1."),
    # CSwin
    (r"^stage1_conv_embed\.0\.", "stem.proj."),
    (r"^stage1_conv_embed\.2\.", "stem.norm."),
    (r"^merge(\d)\.", r"stages.\1.downsample."),
    (r"^stage(\d)\.(\d+)\.", _stage),
    (r"(blocks\.\d+)\.(qkv|proj)\.", r"\1.attn.\2."),
]


def _agent_major(key: str, tensor: Tensor) -> Tensor:
    """Agent attention's row, column and class biases, published to broadcast: `(heads, agents, entries)` here."""
    if re.search(r"\.a[hw]_bias$", key) and tensor.ndim == 5:  # (1, heads, agents, rows, 1) or (…, 1, columns)
        return tensor[0].flatten(2)
    if re.search(r"\.[hw]a_bias$", key) and tensor.ndim == 5:  # (1, heads, rows, 1, agents) or (…, 1, columns, agents)
        return tensor[0].flatten(1, 2).transpose(1, 2).contiguous()
    if re.search(r"\.(ac|ca)_bias$", key) and tensor.ndim == 4:  # (1, heads, agents, 1) and (1, heads, 1, agents)
        return tensor[0].flatten(1)
    return tensor


def convert(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """See `hybridzoo.checkpoints.convert`."""
    renamed = {rename(key, _RULES): tensor for key, tensor in state_dict.items() if not _CONSTANTS.search(key)}
    # A CSwin block holds the family's attention (one branch, its convolution a plain `dwc`) or stripes (LePE).
    family = {key.rsplit(".attns.", 1)[0] for key in renamed if re.search(r"\.attns\.0\.(an_bias|residual\.)", key)}
    converted: dict[str, Tensor] = {}
    for key, tensor in renamed.items():
        block, _, part = key.partition(".attns.")
        if part:
            branch, _, name = part.partition(".")
            if block in family:
                key = f"{block}.attn.{name.replace('get_v.', 'dwc.')}"
            else:
                key = f"{block}.attn.lepe.{branch}.{name.removeprefix('get_v.')}"
        elif _TABLE.search(key):  # (offsets, heads), query minus key -> (heads, rows, columns), key minus query
            side = round(tensor.shape[0] ** 0.5)
            key = _TABLE.sub(".bias.table", key)
            tensor = tensor.t().unflatten(1, (side, side)).flip(1, 2).contiguous()
        elif ".attn.q." in key:  # PVT projects queries, and keys with values
            tensor = torch.cat([tensor, renamed[key.replace(".attn.q.", ".attn.kv.")]])
            key = key.replace(".attn.q.", ".attn.qkv.")
        elif ".attn.kv." in key:
            continue
        converted[key] = _agent_major(key, tensor)
    return converted
