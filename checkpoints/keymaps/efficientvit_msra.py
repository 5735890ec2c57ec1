"""EfficientViT (MSRA): the names of the authors, of their detectors, and of timm."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from hybridzoo.checkpoints.keymaps.tables import Table, shifted, to_ours, to_published

_BLOCK: Table = [  # the same in both
    ("head.bn.", "head.after."),
    (".bn.", ".norm."),
    *[(f".pw*.{layer}.", f".fc*.{layer}.") for layer in ("conv", "norm")],
    (".blocks.*.dw*.m.", ".blocks.*.local*.branch."),
    (".blocks.*.ffn*.m.", ".blocks.*.ffn*.branch."),
    (".mixer.m.attn.", ".attn.branch."),
    (".attn.branch.dws.", ".attn.branch.depthwise."),
    (".attn.branch.proj.1.", ".attn.branch.proj."),
    (".attn.branch.attention_biases", ".attn.branch.bias.table"),
]


def _authors() -> Table:
    rows = [(f"patch_embed.{2 * i}.", f"stem.conv{i + 1}.") for i in range(4)]  # activations between them
    rows += [("blocks1.", "stages.0.blocks.")]
    for stage in (1, 2):  # blocks2 and blocks3 start with the three parts of a downsampling
        blocks, downsample = f"blocks{stage + 1}", f"stages.{stage}.downsample"
        for i in (0, 1):
            rows += [(f"{blocks}.{2 * i}.0.m.", f"{downsample}.local{i}.branch.")]
            rows += [(f"{blocks}.{2 * i}.1.m.", f"{downsample}.ffn{i}.branch.")]
        rows += [(f"{blocks}.1.", f"{downsample}.merge."), *_merge(f"{downsample}.merge")]
        rows += shifted(f"{blocks}.{{}}.", f"stages.{stage}.blocks.{{}}.", 3, range(9))
    return [*rows, (".c.", ".conv."), *_BLOCK, ("head.l.", "head.fc.")]


def _merge(place: str) -> Table:
    parts = ("expand", "depthwise", "project")
    return [(f"{place}.conv{i}.", f"{place}.{part}.") for i, part in enumerate(parts, start=1)]


_AUTHORS = _authors()
_TIMM: Table = [
    ("patch_embed.", "stem."),
    *[
        (f"stages.*.downsample.res{i + 1}.{j}.m.", f"stages.*.downsample.{part}{i}.branch.")
        for i in (0, 1)
        for j, part in enumerate(("local", "ffn"))
    ],
    ("stages.*.downsample.patchmerge.", "stages.*.downsample.merge."),
    *_merge("stages.*.downsample.merge"),
    *_BLOCK,
    ("head.linear.", "head.fc."),
]


def convert(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """See `hybridzoo.checkpoints.convert`; only the backbone of a detector is kept."""
    state = dict(state_dict)
    if any(name.startswith("backbone.") for name in state):
        state = {k.removeprefix("backbone."): value for k, value in state.items() if k.startswith("backbone.")}
    table = _AUTHORS if any(name.startswith("blocks1.") for name in state) else _TIMM
    converted = {}
    for name, tensor in state.items():
        if name.endswith("attention_bias_idxs"):
            continue  # the indices are computed from the window
        key = to_ours(name, table)
        # some files hold 1x1 convolutions as matrices
        matrix = tensor.ndim == 2 and key.endswith((".conv.weight", ".se.fc1.weight", ".se.fc2.weight"))
        converted[key] = tensor[:, :, None, None] if matrix else tensor
    return converted


def publish(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """See `hybridzoo.checkpoints.keymaps.publish`."""
    return {to_published(key, _AUTHORS): tensor for key, tensor in state_dict.items()}


def like_timm(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """See `hybridzoo.checkpoints.keymaps.publish`."""
    return {to_published(key, _TIMM): tensor for key, tensor in state_dict.items()}
