"""Published names of NAT, DiNAT, DiNAT_s and the isotropic nets: the authors' own, their detectors', transformers'."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hybridzoo.checkpoints.keymaps.rules import rename

_TRANSFORMERS = [  # to the authors' names
    (r"^(?:nat|dinat)\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.levels\.(\d+)\.layers\.", r"levels.\1.blocks."),
    (r"^encoder\.", ""),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.self\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    *[(rf"^hidden_states_norms\.stage{i + 1}\.", f"norm{i}.") for i in range(4)],
]
_RULES = [
    (r"^patch_embed\.proj\.(?:0\.)?(weight|bias)$", r"stem.conv1.\1"),
    (r"^patch_embed\.proj\.1\.", "stem.conv2."),
    (r"^patch_embed\.norm\.", "stem.norm."),
    (r"^(?:levels|layers)\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"^layers\.(\d+)\.(norm|attn|mlp|gamma)", r"stages.\1.blocks.0.\2"),  # isotropic: a block is a stage
    (r"\.gamma([12])$", r".scale\1.gamma"),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]
_DENSE = [  # of a detector or segmentor: a norm for each output map
    (r"^norm(\d)\.", r"out_norms.\1."),
    (r"^(?!out_norms\.)", "model."),
]


def convert(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """See `hybridzoo.checkpoints.convert`.

    A published detector or segmentor becomes ours, `backbone.` being a `PyramidBackbone` with output norms.
    """
    state = dict(state_dict)
    if any(key.startswith("backbone.") for key in state):
        inside = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
        outside = {k: v for k, v in state.items() if not k.startswith("backbone.")}
        return {f"backbone.{k}": v for k, v in convert(inside, model_name).items()} | outside
    if any(".attention.self." in key for key in state):
        state = _from_transformers(state)
    rules = _RULES + (_DENSE if any(key.startswith("norm0.") for key in state) else [])
    converted = {}
    for published, tensor in state.items():
        if published.endswith(".relative_position_index"):
            continue  # follows from the map's size
        key = _next_stage(rename(published, rules))
        if model_name.startswith("vitrpb"):
            key = key.replace(".attn.rpb", ".attn.bias.table")
        converted[key] = tensor
    return converted


def _next_stage(key: str) -> str:
    """Published stages end with the downsampling that ours begin with."""
    prefix, found, rest = key.partition("levels.")
    if not found:
        prefix, found, rest = key.partition("layers.")
    if not found or ".downsample." not in rest:
        return key
    stage, _, name = rest.partition(".")
    return f"{prefix}stages.{int(stage) + 1}.{name}"


def _from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names and shapes: q, k and v in one projection, one vector for each layer scale."""
    converted = {}
    for published, tensor in state.items():
        if ".attention.self.key." in published or ".attention.self.value." in published:
            continue
        key = rename(published, _TRANSFORMERS)
        if ".attention.self.query." in published:
            parts = [state[published.replace(".query.", f".{part}.")] for part in ("query", "key", "value")]
            converted[key.replace(".query.", ".qkv.")] = torch.cat(parts)
        elif key.endswith(".layer_scale_parameters"):
            for i, gamma in enumerate(tensor.unbind(0), start=1):
                converted[key.replace(".layer_scale_parameters", f".gamma{i}")] = gamma
        else:
            converted[key] = tensor
    return converted
