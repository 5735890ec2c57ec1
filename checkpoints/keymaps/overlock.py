"""OverLoCK's published names (LMMMEng/OverLoCK): one layout for classifiers and dense networks, merged or not."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from hybridzoo.checkpoints.keymaps.tables import Table, to_ours, to_published


def _conv_norm(published: str, ours: str, first: int = 0) -> Table:
    return [(f"{published}.{first + i}.", f"{ours}.{part}.") for i, part in enumerate(("conv", "norm"))]


# Outside of blocks. The Overview-Net is the block `@` of stage 3; its number depends on the variant.
_AROUND: Table = [
    *[row for i in range(4) for row in _conv_norm("patch_embed1", f"stem.{i}", 3 * i)],
    *_conv_norm("patch_embed2", "stages.1.downsample"),
    *_conv_norm("patch_embed3", "stages.2.downsample"),
    *_conv_norm("patch_embed4", "stages.2.blocks.@.downsample"),
    *_conv_norm("patch_embedx.x_proj", "stages.3.downsample.features"),
    *_conv_norm("patch_embedx.h_proj", "stages.3.downsample.context"),
    ("high_level_proj.", "stages.2.blocks.@.project."),
    ("extra_norm.1.", "stages.1.norm."),
    ("extra_norm.4.", "overview_norm."),
    ("extra_norm.*.", "feature_norms.*."),
    ("h_proj.0.", "overview_project."),
    ("h_proj.1.", "overview_scale."),
    *_conv_norm("head", "head.before"),
    ("head.4.", "head.fc."),
    ("aux_head.0.", "aux_head.before."),
    ("aux_head.2.", "aux_head.fc."),
]
_LARGE: Table = [
    ("large.lk_origin.bias", "large.conv.bias"),  # only a merged one has a bias
    ("large.origin_bn.", "large.large.norm."),
    ("large.dil_conv_k*_*.", "large.branches.k*_*.conv."),
    ("large.dil_bn_k*_*.", "large.branches.k*_*.norm."),
]
_MERGED: Table = [*_LARGE, ("large.lk_origin.weight", "large.conv.weight")]
_BRANCHED: Table = [*_LARGE, ("large.lk_origin.weight", "large.large.conv.weight")]
# Inside a block: first of the Base-Net and the Overview-Net, then of the Focus-Net.
_REP: Table = [
    ("dwconv.", "dwconv.conv."),
    ("proj.0.", "norm."),
    ("proj.1.", "large."),
    ("proj.2.", "large_norm."),
    ("proj.3.proj.1.", "se.fc1."),
    ("proj.3.proj.3.", "se.fc2."),
    ("proj.4.", "mlp.expand."),
    ("proj.6.", "mlp.local.conv."),
    ("proj.7.gamma", "mlp.norm.weight"),
    ("proj.7.beta", "mlp.norm.bias"),
    ("proj.8.", "mlp.project."),
    ("ls.", "scale."),
]
_FOCUS: Table = [
    ("x_scale.", "context_scale."),
    ("h_scale.", "guide_scale."),
    ("dwconv1.", "dwconv1.conv."),
    ("dwconv2.", "dwconv2.conv."),
    *_conv_norm("fusion", "fuse_local"),
    ("fusion.3.", "fuse_project."),
    ("fusion.4.gamma", "fuse_norm.weight"),
    ("fusion.4.beta", "fuse_norm.bias"),
    *_conv_norm("gate", "gate"),
    ("lepe.0.", "large."),
    ("lepe.1.", "large_norm."),
    *_conv_norm("weight_query", "mixing.query"),
    *_conv_norm("weight_key", "mixing.key", 1),
    ("weight_proj.weight", "mixing.taps.weight"),
    ("weight_proj.bias", "mixing.tap_bias"),
    ("rpb1", "mixing.small_rpb"),
    ("rpb2", "mixing.large_rpb"),
    *_conv_norm("dyconv_proj", "mixing.proj"),
    ("se_layer.proj.1.", "se.fc1."),
    ("se_layer.proj.3.", "se.fc2."),
    ("proj.0.", "out_norm."),
    ("proj.1.", "out_project."),
    ("mlp.0.", "mlp.expand."),
    ("mlp.2.", "mlp.local.conv."),
    ("mlp.3.gamma", "mlp.norm.weight"),
    ("mlp.3.beta", "mlp.norm.bias"),
    ("mlp.4.", "mlp.project."),
    ("ls1.", "scale1."),
    ("ls2.", "scale2."),
]
_PUBLISHED_BLOCK = re.compile(r"^(sub_)?blocks(\d)\.(\d+)\.(.*)$")
_OUR_BLOCK = re.compile(r"^stages\.(\d)\.blocks\.(\d+)\.(?:blocks\.(\d+)\.)?(.*)$")
_OVERVIEW = re.compile(r"^stages\.2\.blocks\.(\d+)\.downsample\.")


def convert(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """See `hybridzoo.checkpoints.convert`."""
    if not any(key.startswith("patch_embed1.") for key in state_dict):
        return dict(state_dict)
    overview = 1 + max(int(m[3]) for key in state_dict if (m := _PUBLISHED_BLOCK.match(key)) and key[:7] == "blocks3")
    large = _BRANCHED if any(".origin_bn." in key for key in state_dict) else _MERGED
    converted = {}
    for published, tensor in state_dict.items():
        if match := _PUBLISHED_BLOCK.match(published):
            focus, stage, number, inside = match.groups()
            inside = to_ours(inside, [*(_FOCUS if focus else _REP), *large])
            place = {
                ("3", True): f"2.blocks.{overview + 1 + int(number)}",
                ("4", True): f"3.blocks.{number}",
                ("4", False): f"2.blocks.{overview}.blocks.{number}",
            }.get((stage, bool(focus)), f"{int(stage) - 1}.blocks.{number}")
            key = f"stages.{place}.{inside}"
        else:
            key = to_ours(published, _AROUND).replace("@", str(overview))
        if key.endswith(("taps.weight", "head.fc.weight")):  # 1x1 convolutions
            tensor = tensor.flatten(1)
        elif published.endswith((".gamma", ".beta")):
            tensor = tensor.flatten()
        converted[key] = tensor
    return converted


def publish(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """See `hybridzoo.checkpoints.keymaps.publish`."""
    overview = next(int(m[1]) for key in state_dict if (m := _OVERVIEW.match(key)))
    large = _BRANCHED if any(".branches." in key for key in state_dict) else _MERGED
    published = {}
    for key, tensor in state_dict.items():
        match = _OUR_BLOCK.match(key)
        if match and not (match[1] == "2" and int(match[2]) == overview and match[3] is None):
            stage, number = int(match[1]), int(match[2])
            focus = stage == 3 or (stage == 2 and number > overview)
            inside = to_published(match[4], [*(_FOCUS if focus else _REP), *large])
            if match[3] is not None:
                name = f"blocks4.{match[3]}.{inside}"
            elif focus:
                name = f"sub_blocks{stage + 1}.{number - (overview + 1) * (stage == 2)}.{inside}"
            else:
                name = f"blocks{stage + 1}.{number}.{inside}"
        else:
            name = to_published(key.replace(f"stages.2.blocks.{overview}.", "stages.2.blocks.@."), _AROUND)
        if key.endswith(("taps.weight", "head.fc.weight")):
            tensor = tensor[:, :, None, None]
        elif name.endswith((".gamma", ".beta")):
            tensor = tensor[None, :, None, None]
        published[name] = tensor
    return published
