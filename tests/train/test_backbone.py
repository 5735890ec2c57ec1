"""PyramidBackbone over small timm models, NCHW and NHWC inside."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

pytest.importorskip("mmengine")
from mmengine.registry import MODELS

from hybridzoo.train.backbone import PyramidBackbone
from hybridzoo.train.errors import UserError

SWIN = {  # NHWC inside; its patches need multiples of 4
    "name": "swin_tiny_patch4_window7_224",
    "embed_dim": 24,
    "depths": (1, 1, 2, 1),
    "num_heads": (1, 2, 2, 2),
    "strict_img_size": False,
    "drop_path_rate": 0.0,
}
CONVNEXT = {"name": "convnext_atto", "dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1)}
RESNET = {"name": "resnet10t", "out_indices": (1, 2, 3, 4)}
EACH = pytest.mark.parametrize("args", [SWIN, CONVNEXT, RESNET], ids=lambda a: a["name"])


def images(height=32, width=64, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def build(**args):
    torch.manual_seed(0)
    return PyramidBackbone(**args)


@pytest.mark.parametrize("size", [(64, 96), (76, 100), (75, 101), (32, 33)])
@EACH
def test_maps_are_nchw_at_the_advertised_widths_and_strides(args, size):
    if args is SWIN and any(pixels % 4 for pixels in size):
        pytest.skip("timm's Swin takes no such size")
    model = build(**args).eval()
    maps = model(images(*size))
    assert [m.shape[1] for m in maps] == model.channels
    assert model.strides == [4, 8, 16, 32]
    for level, stride in zip(maps, model.strides, strict=True):
        for got, pixels in zip(level.shape[2:], size, strict=True):
            assert pixels // stride <= got <= -(-pixels // stride)


@EACH
def test_maps_equal_the_classification_models(args):
    """Same weights, same maps: of the whole timm model, called by timm's own means."""
    kwargs = {k: v for k, v in args.items() if k not in ("name", "out_indices")}
    whole = timm.create_model(args["name"], **kwargs).eval()
    model = build(**args).eval()
    own = model.model.state_dict()
    model.model.load_state_dict({k: v for k, v in whole.state_dict().items() if k in own})
    expected = whole.forward_intermediates(images(), indices=list(model.out_indices), intermediates_only=True)
    for got, want in zip(model(images()), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_registered_and_selects_levels():
    model = MODELS.build(dict(type="PyramidBackbone", **CONVNEXT, out_indices=(1, 3)))
    assert [m.shape[1] for m in model(images())] == model.channels == [16, 32]
    assert model.strides == [8, 32]


@EACH
def test_every_parameter_learns(args):
    """DDP stops at a parameter without gradient: nothing of the head or final norm may remain."""
    model = build(**args, out_norm="LN")
    sum(level.square().mean() for level in model(images())).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@EACH
def test_frozen_stages(args):
    model = build(**args, frozen_stages=2).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    sum(level.square().mean() for level in model(images())).backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    stages = {"swin": ("layers", 0), "conv": ("stages", 0), "resn": ("layer", 1)}[args["name"][:4]]
    names = [f"model.{stages[0]}{'' if args is RESNET else '.'}{stages[1] + i}." for i in range(4)]
    assert [any(c.startswith(name) for c in changed) for name in names] == [False, False, True, True]
    assert not any(c.startswith(("model.stem", "model.patch_embed", "model.conv1", "model.bn1")) for c in changed)
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.startswith(tuple(names[:2])))


def test_frozen_stages_switch_their_dropout_off():
    model = build(**CONVNEXT, frozen_stages=2, drop_path_rate=0.9).train()
    first, second = model(images(batch=8)), model(images(batch=8))
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[3], second[3])


def test_frozen_stages_are_none_by_default_and_0_freezes_the_stem():
    assert all(p.requires_grad for p in build(**RESNET).parameters())
    frozen = {n.split(".")[1] for n, p in build(**RESNET, frozen_stages=0).named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "bn1"}


def test_norm_eval_keeps_statistics_but_learns_weights():
    for norm_eval in (False, True):
        model = build(**RESNET, norm_eval=norm_eval).train()
        before = copy.deepcopy(model.state_dict())
        sum(level.square().mean() for level in model(images())).backward()
        moved = any(
            not torch.equal(value, before[name]) for name, value in model.state_dict().items() if "running" in name
        )
        assert moved is not norm_eval
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all(m.weight.grad is not None and m.training is not norm_eval for m in norms)
        assert model.training


@pytest.mark.parametrize("args", [SWIN, CONVNEXT], ids=lambda a: a["name"])
def test_with_cp_changes_neither_output_nor_gradients(args):
    plain, checkpointed = build(**args), build(**args, with_cp=True)
    checkpointed.load_state_dict(plain.state_dict())
    saved = []
    for model in (plain, checkpointed):
        model.train()
        count = 0

        def pack(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            maps = model(images())
        saved.append(count)
        sum((level * torch.arange(level.numel()).view_as(level).sin()).sum() for level in maps).backward()
    assert saved[1] < saved[0] / 2, "checkpointing saved no memory"
    for a, b in zip(plain(images()), checkpointed(images()), strict=True):
        torch.testing.assert_close(a, b)
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", ["LN", "BN"])
def test_out_norm_normalises_the_output_copy_only(kind):
    bare, normed = build(**CONVNEXT), build(**CONVNEXT, out_norm=kind)
    normed.load_state_dict(bare.state_dict(), strict=False)
    for raw, level in zip(bare.train()(images()), normed.train()(images()), strict=True):
        dims = 1 if kind == "LN" else (0, 2, 3)
        mean, var = raw.mean(dims, keepdim=True), raw.var(dims, keepdim=True, unbiased=False)
        eps = 1e-6 if kind == "LN" else 1e-5
        torch.testing.assert_close(level, (raw - mean) / (var + eps).sqrt(), rtol=1e-4, atol=1e-4)


def test_weights_load_from_a_classifier_with_another_head(tmp_path):
    kwargs = {k: v for k, v in CONVNEXT.items() if k != "name"}
    classifier = timm.create_model("convnext_atto", num_classes=7, **kwargs)
    torch.save({"state_dict": {f"model.{k}": v for k, v in classifier.state_dict().items()}}, tmp_path / "a.pth")
    model = build(**CONVNEXT, weights=tmp_path / "a.pth")
    stem = "stem.0.weight"
    assert not torch.equal(model.model.state_dict()[stem], classifier.state_dict()[stem])  # not read before training
    model.init_weights()
    for name, value in model.model.state_dict().items():
        assert torch.equal(value, classifier.state_dict()[name]), name


def test_weights_of_another_model_are_refused_and_nothing_changes(tmp_path):
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "a.pth")
    model = build(**CONVNEXT, weights=tmp_path / "a.pth")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match="do not fit"):
        model.init_weights()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_layer_decay_follows_the_models_own_groups():
    from timm.optim import param_groups_layer_decay

    model = build(**CONVNEXT, out_norm="LN")
    names = {id(p): n for n, p in model.named_parameters()}
    scale = {
        names[id(p)]: group["lr_scale"]
        for group in param_groups_layer_decay(model, 0.05, layer_decay=0.5)
        for p in group["params"]
    }
    assert scale.keys() == dict(model.named_parameters()).keys()
    order = ["model.stem.0.weight", "model.stages.0.blocks.0.conv_dw.weight", "model.stages.3.blocks.0.conv_dw.weight"]
    assert scale[order[0]] < scale[order[1]] < scale[order[2]] <= scale["out_norms.0.weight"] == 1


def test_no_weight_decay_names_carry_the_prefix():
    model = PyramidBackbone("vit_tiny_patch16_224", depth=2, out_indices=(0, 1), img_size=32)
    assert "model.pos_embed" in model.no_weight_decay() & dict(model.named_parameters()).keys()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"name": "no_such_net"}, "no_such_net"),
        ({"name": "convnext_atto", "out_indices": (0, 4)}, "levels 0 to 3, not 4"),
        ({"name": "convnext_atto", "out_norm": "GN"}, "out_norm='GN'"),
        ({"name": "convnext_atto", "weights": "/nowhere.pth"}, "nowhere"),
    ],
)
def test_bad_arguments_are_reported(args, message):
    with pytest.raises(UserError, match=message):
        PyramidBackbone(**args).init_weights()
