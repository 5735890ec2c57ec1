"""Parameter groups: decay, layer-wise rates, and mixed precision."""

import itertools
from typing import Any

import pytest
import timm
import torch
from torch import nn

from hybridzoo.train.errors import UserError
from hybridzoo.train.optim import AutocastOptimWrapper, TimmParamGroups, use_amp


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = timm.create_model("test_vit", num_classes=3)


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model("test_vit", num_classes=0)
        self.bbox_head = nn.Linear(4, 4)


def build(model: nn.Module, **paramwise: Any) -> dict[str, dict[str, Any]]:
    """Parameter name -> its group's settings."""
    cfg = {"type": "OptimWrapper", "optimizer": {"type": "AdamW", "lr": 1.0, "weight_decay": 0.5}}
    wrapper = TimmParamGroups(cfg, paramwise)(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: group for group in wrapper.optimizer.param_groups for p in group["params"]}
    assert len(found) == sum(p.requires_grad for p in model.parameters()), "a parameter is in no group, or in two"
    return found


def test_weight_decay_excludes_vectors_and_the_models_list() -> None:
    groups = build(Classifier())
    assert groups["model.blocks.0.attn.qkv.weight"]["weight_decay"] == 0.5
    for spared in ("model.blocks.0.attn.qkv.bias", "model.blocks.0.norm1.weight", "model.pos_embed", "model.cls_token"):
        assert groups[spared]["weight_decay"] == 0, spared
    assert all(group["lr"] == 1 for group in groups.values())
    assert build(Classifier(), decay_1d=True)["model.blocks.0.norm1.weight"]["weight_decay"] == 0.5


def test_layer_decay_of_a_classifier() -> None:
    groups = build(Classifier(), layer_decay=0.5)
    depth = len(Classifier().model.blocks)
    assert groups["model.head.weight"]["lr"] == 1
    assert groups[f"model.blocks.{depth - 1}.mlp.fc1.weight"]["lr"] == 0.5
    assert groups["model.blocks.0.mlp.fc1.weight"]["lr"] == 0.5**depth
    assert groups["model.patch_embed.proj.weight"]["lr"] == 0.5 ** (depth + 1)
    assert groups["model.pos_embed"]["weight_decay"] == 0


def test_layer_decay_of_a_detector_starts_below_its_heads() -> None:
    groups = build(Detector(), layer_decay=0.5)
    depth = len(Detector().backbone.blocks)
    assert groups["bbox_head.weight"]["lr"] == 1
    assert groups["bbox_head.weight"]["weight_decay"] == 0.5
    assert groups["bbox_head.bias"]["weight_decay"] == 0
    rates = [groups[f"backbone.blocks.{i}.mlp.fc1.weight"]["lr"] for i in range(depth)]
    assert rates == sorted(rates)
    assert all(later == 2 * earlier for earlier, later in itertools.pairwise(rates))
    assert rates[-1] <= 0.5


def test_our_backbone_in_a_detector_has_the_layers_of_the_classifier() -> None:
    from hybridzoo.train.backbone import PyramidBackbone

    class Ours(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = PyramidBackbone("test_convnext", out_norm="LN")
            self.head = nn.Linear(2, 2)

    groups = build(Ours(), layer_decay=0.5)
    stem, last = groups["backbone.model.stem.0.weight"], groups["backbone.model.stages.3.blocks.0.conv_dw.weight"]
    assert stem["lr"] < last["lr"] <= 0.5
    assert groups["backbone.out_norms.0.weight"]["weight_decay"] == 0


def test_frozen_parameters_are_excluded() -> None:
    model = Classifier()
    model.model.patch_embed.requires_grad_(False)
    for paramwise in ({}, {"layer_decay": 0.5}):
        assert "model.patch_embed.proj.weight" not in build(model, **paramwise)


def test_bad_settings() -> None:
    with pytest.raises(UserError, match="layer_deca: unknown"):
        TimmParamGroups({}, {"layer_deca": 0.5})
    with pytest.raises(UserError, match="no group_matcher"):
        build(nn.Linear(2, 2), layer_decay=0.5)


def test_amp_types() -> None:
    wrapper: dict[str, Any] = {"type": "OptimWrapper", "loss_scale": 512.0}
    use_amp(wrapper)
    assert wrapper == {"type": "AutocastOptimWrapper"}
    with pytest.raises(UserError, match="choose bfloat16 or float16"):
        use_amp(wrapper, "int8")


def test_autocast_computes_in_bfloat16_and_steps_in_float32() -> None:
    layer = nn.Linear(4, 4)
    wrapper = AutocastOptimWrapper(torch.optim.SGD(layer.parameters(), lr=0.1))
    before = layer.weight.detach().clone()
    with wrapper.optim_context(layer):
        out = layer(torch.ones(2, 4))
    assert out.dtype == torch.bfloat16
    wrapper.update_params(out.float().pow(2).mean())
    assert layer.weight.dtype == torch.float32
    assert not torch.equal(layer.weight, before)
