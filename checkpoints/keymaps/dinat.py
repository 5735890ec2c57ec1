"""Published names of NAT, DiNAT, DiNAT_s and the isotropic nets: the authors' own, their detectors', transformers'."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

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
    *shifted("hidden_states_norms.stage{}.", "norm{}.", 1, range(4)),
]


def _table(model: str) -> Table:
    isotropic = "isotropic" in model or model.startswith("vitrpb")
    one_convolution = isotropic or model.startswith("dinat_s_")
    levels = "layers" if one_convolution else "levels"
    stem = [("patch_embed.proj.0.", "stem.conv1."), ("patch_embed.proj.1.", "stem.conv2.")]
    return [
        *([("patch_embed.proj.", "stem.conv1.")] if one_convolution else stem),
        ("patch_embed.norm.", "stem.norm."),
        # Published stages end with the downsampling that ours begin with.
        *[(f"{levels}.{i}.downsample.", f"stages.{i + 1}.downsample.") for i in range(3)],
        ("layers.*.", "stages.*.blocks.0.") if isotropic else (f"{levels}.*.blocks.", "stages.*.blocks."),
        (".gamma1", ".scale1.gamma"),
        (".gamma2", ".scale2.gamma"),
        *([(".attn.rpb", ".attn.bias.table")] if model.startswith("vitrpb") else []),
        *HEAD,
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
    # An index follows from the map's size.
    state = {name: value for name, value in state.items() if not name.endswith(".relative_position_index")}
    table = _table(model_name)
    converted = {to_ours(name, table): tensor for name, tensor in state.items()}
    if any(key.startswith("norm0.") for key in converted):  # of a detector or segmentor: a norm for each output map
        outputs = [(f"norm{i}.", f"out_norms.{i}.") for i in range(4)]
        converted = {to_ours(key, outputs): tensor for key, tensor in converted.items()}
        return {k if k.startswith("out_norms.") else f"model.{k}": tensor for k, tensor in converted.items()}
    return converted


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
