"""Published names of NAT, DiNAT, DiNAT_s and the isotropic nets: of the authors, their detectors, and transformers."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from hybridzoo.checkpoints.keymaps.dense import convert_dense
from hybridzoo.checkpoints.keymaps.tables import HEAD, Table, shifted, to_ours, to_published

_TRANSFORMERS: Table = [  # to the authors' names
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("embeddings.norm.", "patch_embed.norm."),
    ("encoder.levels.*.layers.", "levels.*.blocks."),
    ("encoder.", ""),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".attention.self.", ".attn."),
    (".attention.output.dense.", ".attn.proj."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
    ("layernorm.", "norm."),
    ("classifier.", "head."),
]
_NORMS: Table = [  # of the maps of a detector or segmentor
    ("norm*.", "out_norms.*."),
    *shifted("hidden_states_norms.stage{}.", "out_norms.{}.", 1, range(4)),
]


def _table(model: str) -> Table:
    isotropic = "isotropic" in model or model.startswith("vitrpb")
    one_convolution = isotropic or model.startswith("dinat_s_")
    levels = "layers" if one_convolution else "levels"
    stem = [("patch_embed.proj.0.", "stem.conv1."), ("patch_embed.proj.1.", "stem.conv2.")]
    return [
        *([("patch_embed.proj.", "stem.conv1.")] if one_convolution else stem),
        ("patch_embed.norm.", "stem.norm."),
        # The downsampling between stages ends a published stage, and starts one of ours.
        *[(f"{levels}.{i}.downsample.", f"stages.{i + 1}.downsample.") for i in range(3)],
        ("layers.*.", "stages.*.blocks.0.") if isotropic else (f"{levels}.*.blocks.", "stages.*.blocks."),
        (".gamma1", ".scale1.gamma"),
        (".gamma2", ".scale2.gamma"),
        *([(".attn.rpb", ".attn.bias.table")] if model.startswith("vitrpb") else []),
        *HEAD,
    ]


def convert(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """See `hybridzoo.checkpoints.convert`.

    A published detector or segmentor becomes ours: `backbone.` is a `PyramidBackbone` with output norms.
    """
    return convert_dense(state_dict, functools.partial(_network, model_name), _NORMS)


def _network(model_name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    table = _table(model_name)
    if any(".attention.self." in key for key in state):
        state = _from_transformers(state)
    # The index is computed from the map's size.
    return {to_ours(name, table): v for name, v in state.items() if not name.endswith(".relative_position_index")}


def publish(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """See `hybridzoo.checkpoints.keymaps.publish`."""
    table = _table(model_name)
    return {to_published(key, table): tensor for key, tensor in state_dict.items()}


def _from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names and shapes: q, k and v in one projection, one vector for each layer scale."""
    converted = {}
    for name, tensor in state.items():
        if ".attention.self.key." in name or ".attention.self.value." in name:
            continue
        key = to_ours(name.removeprefix("nat.").removeprefix("dinat."), _TRANSFORMERS)
        if ".attention.self.query." in name:
            parts = [state[name.replace(".query.", f".{part}.")] for part in ("query", "key", "value")]
            converted[key.replace(".query.", ".qkv.")] = torch.cat(parts)
        elif key.endswith(".layer_scale_parameters"):
            for i, gamma in enumerate(tensor.unbind(0), start=1):
                converted[key.replace(".layer_scale_parameters", f".gamma{i}")] = gamma
        else:
            converted[key] = tensor
    return converted
