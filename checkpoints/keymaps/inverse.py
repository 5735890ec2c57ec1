"""From our names back to the authors': what `convert` undoes, for whoever wants to go on in the published code.

Constants that the published code makes for itself (index buffers, masks, caches) are not written; `conversion` checks
every result by converting it again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor

from hybridzoo.checkpoints.keymaps.hosts import _BLOCKS_PER_STAGE
from hybridzoo.checkpoints.keymaps.rules import Rules, rename

_State = Mapping[str, Tensor]
_HEAD = (r"^head\.fc\.", "head.")


def _earlier(match: re.Match[str]) -> str:
    """Our stages begin with the downsampling that published ones end with."""
    return f"levels.{int(match[1]) - 1}.downsample."


def _biformer(state: _State, model: str) -> dict[str, Tensor]:
    swin_like, nchw = "_stl" in model, model.endswith("_nchw")
    conv, norm = ("1", "0") if swin_like else ("0", "1")
    rules: Rules = [
        (r"^stem\.(conv|norm)(\d)\.", lambda m: f"downsample_layers.0.{3 * int(m[2]) - 3 + (m[1] == 'norm')}."),
        (r"^stages\.(\d+)\.downsample\.conv\.", rf"downsample_layers.\1.{conv}."),
        (r"^stages\.(\d+)\.downsample\.norm\.", rf"downsample_layers.\1.{norm}."),
        (r"^(stages\.[012]\..*\.attn)\.qkv\.", r"\1.qkv_linear." if nchw else r"\1.qkv.qkv."),
        (r"^(stages\.[012]\..*\.attn)\.proj\.", r"\1.output_linear." if nchw else r"\1.wo."),
        (r"\.mlp\.fc1\.", ".mlp.0."),
        (r"\.mlp\.fc2\.", ".mlp.2." if swin_like else ".mlp.3."),
        (r"^(stages\.\d+)\.blocks\.", r"\1.blocks." if swin_like else r"\1."),
        _HEAD,
    ]
    published = {}
    for key, tensor in state.items():
        pointwise = nchw and tensor.ndim == 2 and not key.startswith("head.")
        published[rename(key, rules)] = tensor[:, :, None, None] if pointwise else tensor
    return published


def _dinat(state: _State, model: str) -> dict[str, Tensor]:
    isotropic = "isotropic" in model or model.startswith("vitrpb")
    one_convolution = isotropic or model.startswith("dinat_s_")
    rules: Rules = [
        (r"^stem\.conv1\.", "patch_embed.proj." if one_convolution else "patch_embed.proj.0."),
        (r"^stem\.conv2\.", "patch_embed.proj.1."),
        (r"^stem\.norm\.", "patch_embed.norm."),
        (r"^stages\.(\d+)\.downsample\.", _earlier),
        (r"^stages\.(\d+)\.blocks\.0\." if isotropic else r"^stages\.(\d+)\.", r"levels.\1."),
        (r"^levels\.", "layers." if one_convolution else "levels."),
        (r"\.scale([12])\.gamma$", r".gamma\1"),
        (r"\.attn\.bias\.table$", ".attn.rpb"),
        _HEAD,
    ]
    return {rename(key, rules): tensor for key, tensor in state.items()}


def _fastervit(state: _State, model: str) -> dict[str, Tensor]:
    rules: Rules = [
        (r"^stem\.conv(\d)\.(conv|norm)\.", lambda m: f"patch_embed.conv_down.{3 * int(m[1]) - 3 + (m[2] == 'norm')}."),
        (r"^stages\.(\d+)\.downsample\.conv\.", lambda m: f"{_earlier(m)}reduction.0."),
        (r"^stages\.(\d+)\.downsample\.", _earlier),
        (r"^stages\.", "levels."),
        (r"^(levels\.[01]\.blocks\.\d+)\.conv([12])\.(conv|norm)\.", r"\1.\3\2."),
        (r"\.carrier_tokens\.conv\.", ".global_tokenizer.to_global_feature.pos."),
        (r"\.carriers\.scale([12])\.gamma$", r".gamma\1"),
        (r"\.tokens\.scale([12])\.gamma$", lambda m: f".gamma{int(m[1]) + 2}"),
        (r"\.attn\.bias\.", ".attn.pos_emb_funct."),
        (r"\.carrier_pos_embed\.", ".hat_pos_embed."),
        (r"\.(pos_embed|pos_emb_funct)\.mlp\.fc1\.", r".\1.cpb_mlp.0."),
        (r"\.(pos_embed|pos_emb_funct)\.mlp\.fc2\.", r".\1.cpb_mlp.2."),
        (r"\.(hat_pos_embed)\.mlp\.fc1\.", r".\1.cpb_mlp.0."),
        (r"\.(hat_pos_embed)\.mlp\.fc2\.", r".\1.cpb_mlp.2."),
        (r"\.carriers\.(norm|attn|mlp)", r".hat_\1"),
        (r"\.tokens\.(norm|attn|mlp)", r".\1"),
        _HEAD,
    ]
    published = {rename(key, rules): tensor for key, tensor in state.items()}
    # The authors' module holds this convolution under two names.
    second = {
        k.replace(".to_global_feature.pos.", ".pos_embed."): v for k, v in published.items() if "feature.pos" in k
    }
    return published | {key: tensor.clone() for key, tensor in second.items()}


def _msra(state: _State, model: str) -> dict[str, Tensor]:
    rules: Rules = [
        (r"^stem\.conv(\d)\.", lambda m: f"patch_embed.{2 * int(m[1]) - 2}."),
        (r"^stages\.(\d)\.downsample\.local([01])\.branch\.", lambda m: f"blocks{int(m[1]) + 1}.{2 * int(m[2])}.0.m."),
        (r"^stages\.(\d)\.downsample\.ffn([01])\.branch\.", lambda m: f"blocks{int(m[1]) + 1}.{2 * int(m[2])}.1.m."),
        (r"^stages\.(\d)\.downsample\.merge\.", lambda m: f"blocks{int(m[1]) + 1}.1."),
        (r"^(blocks\d\.1)\.expand\.", r"\1.conv1."),
        (r"^(blocks\d\.1)\.depthwise\.", r"\1.conv2."),
        (r"^(blocks\d\.1)\.project\.", r"\1.conv3."),
        (r"^stages\.0\.blocks\.", "blocks1."),
        (r"^stages\.(\d)\.blocks\.(\d+)\.", lambda m: f"blocks{int(m[1]) + 1}.{int(m[2]) + 3}."),
        (r"\.local([01])\.branch\.", r".dw\1.m."),
        (r"\.ffn([01])\.branch\.", r".ffn\1.m."),
        (r"\.fc([12])\.(conv|norm)\.", r".pw\1.\2."),
        (r"\.attn\.branch\.bias\.table$", ".attn.branch.attention_biases"),
        (r"\.attn\.branch\.depthwise\.", ".attn.branch.dws."),
        (r"\.attn\.branch\.proj\.", ".attn.branch.proj.1."),
        (r"\.attn\.branch\.", ".mixer.m.attn."),
        (r"^head\.after\.", "head.bn."),
        (r"^head\.fc\.", "head.l."),
        (r"\.conv\.", ".c."),
        (r"\.norm\.", ".bn."),
    ]
    return {rename(key, rules): tensor for key, tensor in state.items()}


def _mit(state: _State, model: str) -> dict[str, Tensor]:
    large = "_mit_l" in model  # counts the stem as a stage
    stem = "backbone.stages.0" if large else "backbone.input_stem"
    pair = ("conv1", "conv2") if large else ("depth_conv", "point_conv")
    # A block without a depthwise convolution expands by a spatial one.
    fused = {key.rpartition(".expand.")[0] for key in state if ".expand." in key}
    fused -= {key.rpartition(".depthwise.")[0] for key in state if ".depthwise." in key}
    rules: Rules = [
        (r"^stem\.conv\.", f"{stem}.op_list.0."),
        (r"^stem\.pairs\.(\d+)\.branch\.([01])\.", lambda m: f"{stem}.op_list.{int(m[1]) + 1}.main.{pair[int(m[2])]}."),
        (r"(\.blocks\.\d+)\.(expand|depthwise|project)\.", r"\1.main.\2."),
        (r"\.depthwise\.", ".depth_conv."),
        (r"\.project\.", ".point_conv."),
        (r"^stages\.(\d+)\.blocks\.", lambda m: f"backbone.stages.{int(m[1]) + large}.op_list."),
        (r"\.attn\.branch\.qkv\.", ".context_module.main.qkv.conv."),
        (r"\.attn\.branch\.aggregate\.", ".context_module.main.aggreg."),
        (r"\.attn\.branch\.", ".context_module.main."),
        (r"\.local\.", ".local_module.main."),
        (r"^head\.before\.", "head.op_list.0."),
        (r"^head\.after\.0\.", "head.op_list.2.linear."),
        (r"^head\.after\.1\.", "head.op_list.2.norm."),
        (r"^head\.fc\.", "head.op_list.3.linear."),
    ]
    published = {}
    for key, tensor in state.items():
        expand = ".spatial_conv." if key.rpartition(".expand.")[0] in fused else ".inverted_conv."
        published[rename(key, rules).replace(".expand.", expand)] = tensor
    return published


def _pvt_embedding(match: re.Match[str]) -> str:
    what, stage = match[2], 1 + int(match[1] or 0)
    return f"pos_embed{stage}" if what == "pos_embed" else f"patch_embed{stage}.{what}"


_HOSTS: dict[str, Rules] = {
    "deit": [
        (r"^stem\.(cls_token|pos_embed)$", r"\1"),
        (r"^stem\.", "patch_embed."),
        (r"^stages\.(\d+)\.blocks\.(\d+)\.", lambda m: f"blocks.{_BLOCKS_PER_STAGE * int(m[1]) + int(m[2])}."),
    ],
    "pvt": [
        (r"^(?:stem|stages\.(\d)\.downsample)\.(pos_embed|proj|norm)", _pvt_embedding),
        (r"^stages\.(\d)\.blocks\.", lambda m: f"block{int(m[1]) + 1}."),
    ],
    "swin": [
        (r"^stem\.", "patch_embed."),
        (r"^stages\.(\d)\.downsample\.", _earlier),
        (r"^(?:stages|levels)\.", "layers."),
        (r"\.bias\.table$", ".relative_position_bias_table"),
    ],
    "cswin": [
        (r"^stem\.proj\.", "stage1_conv_embed.0."),
        (r"^stem\.norm\.", "stage1_conv_embed.2."),
        (r"^stages\.(\d)\.downsample\.", r"merge\1."),
        (r"^stages\.(\d)\.blocks\.", lambda m: f"stage{int(m[1]) + 1}."),
        (r"\.attn\.(qkv|proj)\.", r".\1."),
        (r"\.attn\.lepe\.", ".attns."),
        (r"\.attn\.", ".attns.0."),
        (r"(\.attns\.\d)\.dwc\.", r"\1.get_v."),
        (r"(\.attns\.\d)\.(weight|bias)$", r"\1.get_v.\2"),
    ],
}


def _hosts(state: _State, model: str) -> dict[str, Tensor]:
    host = model.split("_")[1]
    published = {}
    for key, tensor in state.items():
        name = rename(key, [*_HOSTS[host], _HEAD])
        if host == "pvt" and ".attn.qkv." in name:  # PVT projects queries, and keys with values
            channels = len(tensor) // 3
            published[name.replace(".qkv.", ".q.")] = tensor[:channels].clone()
            published[name.replace(".qkv.", ".kv.")] = tensor[channels:].clone()
        else:
            published[name] = _to_broadcast(name, tensor)
    return published


def _to_broadcast(name: str, tensor: Tensor) -> Tensor:
    """Attention biases in the shapes that the authors add them in; see `hosts.convert` for ours."""
    if name.endswith("relative_position_bias_table"):
        return tensor.flip(1, 2).flatten(1).t().contiguous()
    kind = name.rpartition(".")[2]
    if kind in ("ah_bias", "aw_bias"):
        return tensor[None, :, :, :, None] if kind == "ah_bias" else tensor[None, :, :, None, :]
    if kind in ("ha_bias", "wa_bias"):
        agents_last = tensor.transpose(1, 2).contiguous()
        return agents_last[None, :, :, None, :] if kind == "ha_bias" else agents_last[None, :, None, :, :]
    if kind in ("ac_bias", "ca_bias"):
        return tensor[None, :, :, None] if kind == "ac_bias" else tensor[None, :, None, :]
    return tensor


_FAMILIES: dict[str, Callable[[_State, str], dict[str, Tensor]]] = {
    "agent_": _hosts,
    "biformer_": _biformer,
    "dinat_": _dinat,
    "efficientvit_mit_": _mit,
    "efficientvit_msra_": _msra,
    "fastervit_": _fastervit,
    "inline_": _hosts,
    "nat_": _dinat,
    "vitrpb_": _dinat,
}


def publish(state_dict: _State, model_name: str) -> dict[str, Tensor]:
    """A classifier's weights under the names and shapes of the authors' own code.

    Args:
        state_dict: of our network.
        model_name: registered name, without a tag.

    Raises:
        ValueError: the authors' layout is not known; MaxViT's is timm's.
    """
    for prefix, family in _FAMILIES.items():
        if model_name.startswith(prefix):
            return family(state_dict, model_name)
    raise ValueError(f"model {model_name}: no weights in a layout of the authors' own exist")
