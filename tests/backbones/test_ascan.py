"""The reconstruction of AsCAN: its sizes, every choice that the paper leaves open, and no further claims."""

from __future__ import annotations

import goldens
import networks
import pytest
import timm
import torch
from torch import nn

from hybridzoo.backbones import ascan
from hybridzoo.backbones.ascan import AsCANConfig, PositionBias
from hybridzoo.checkpoints import cards, convert
from hybridzoo.layers import MBConv

SMALL = dict(pattern="CC/C/CT/TT", dims=(16, 24, 32, 64), head_dim=16, stem_dim=8, num_classes=5)


@pytest.mark.parametrize(
    ("name", "params", "gmacs"),
    [("ascan_tiny", 54.34, 7.61), ("ascan_base", 98.15, 16.87), ("ascan_large", 170.86, 31.07)],
)
def test_meets_the_sizes_of_the_reconstruction(name, params, gmacs):
    with torch.device("meta"):
        model = timm.create_model(name)
    count = sum(p.numel() for p in model.parameters())
    assert count / 1e6 == pytest.approx(params, abs=0.005)
    assert networks.gmacs(model, 224) == pytest.approx(gmacs, abs=0.005)
    (card,) = cards(name)
    assert card.params == count
    assert card.gmacs == gmacs


def test_the_documentation_calls_it_a_reconstruction_without_results():
    assert "RECONSTRUCTION" in ascan.__doc__
    for name in ascan.VARIANTS:
        (card,) = cards(name)
        assert "RECONSTRUCTION" in card.notes
        assert (card.status, card.top1, card.url, card.tag) == ("none", None, "", "")
        assert not timm.models.is_model_pretrained(name)
    state = timm.create_model("ascan_tiny", **SMALL).state_dict()
    assert convert(state, "ascan_tiny").keys() == state.keys()


def test_the_pattern_of_blocks_can_be_written_in_several_ways():
    model = timm.create_model("ascan_tiny", **SMALL)
    kinds = ["".join("T" if isinstance(b, ascan.Transformer) else "C" for b in s.blocks) for s in model.stages]
    assert "/".join(kinds) == SMALL["pattern"]
    again = timm.create_model("ascan_tiny", **{**SMALL, "pattern": ("CC", "C", "CT", "TT")})
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    short = timm.create_model("ascan_tiny", **SMALL, depths=(1, 1, 1, 1))
    assert [type(stage.blocks[0]).__name__ for stage in short.stages] == ["FusedMBConv"] * 2 + ["Transformer"] * 2


@pytest.mark.parametrize(
    "choice",
    [
        dict(expansion=2.0),
        dict(expand_from="out"),
        dict(se_ratio=0.25),
        dict(fused=False),
        dict(conv_norm="layer"),
        dict(act="silu"),
        dict(mlp_ratio=3.0),
        dict(qkv_bias=False),
        dict(position="conv"),
        dict(position="none"),
        dict(downsample="conv"),
        dict(stem_dim=16),
        dict(head_dim=32),
    ],
    ids=str,
)
def test_every_choice_that_the_paper_leaves_open_is_an_argument_with_an_effect(choice):
    torch.manual_seed(0)
    plain = timm.create_model("ascan_tiny", **SMALL)
    model = timm.create_model("ascan_tiny", **{**SMALL, **choice})
    for size in ((32, 32), (45, 70)):
        loss = model(torch.randn(2, 3, *size)).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    shapes = [tuple(m.state_dict().items()) for m in (plain, model)]
    structure = [[(key, value.shape) for key, value in items] for items in shapes]
    activations = [{type(m) for m in net.modules()} for net in (plain, model)]
    assert structure[0] != structure[1] or activations[0] != activations[1]
    if choice == dict(fused=False):
        assert any(isinstance(m, MBConv) for m in model.modules())


@pytest.mark.parametrize("choice", [{}, dict(se_ratio=0.25, fused=False), dict(downsample="conv")], ids=str)
def test_folding_changes_nothing(choice):
    torch.manual_seed(0)
    model = timm.create_model("ascan_tiny", **SMALL, **choice).double().train()
    x = torch.randn(2, 3, 50, 33, dtype=torch.float64)
    for _ in range(2):
        model(x)
    with torch.no_grad():
        expected = model.eval()(x)
        goldens.assert_close(model.fuse()(x), expected)
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def test_the_position_table_is_exact_at_its_size_and_resized_for_other_maps():
    bias = PositionBias(2, 7)
    at_home = bias((7, 7)).unflatten(1, (7, 7)).unflatten(3, (7, 7))
    torch.testing.assert_close(at_home[:, 2, 3, 5, 1], bias.table[:, 5 - 2 + 6, 1 - 3 + 6])
    nn.init.constant_(bias.table, 0.5)
    torch.testing.assert_close(bias((9, 4)), torch.full((2, 36, 36), 0.5))
    with torch.no_grad():  # a bias that falls with the vertical distance keeps doing so on a larger map
        bias.table.copy_(-torch.arange(-6.0, 7).abs()[None, :, None].expand(2, 13, 13))
    taller = bias((14, 7)).unflatten(1, (14, 7)).unflatten(3, (14, 7))[0, 7, 3, :, 3]
    assert (taller[:8].diff() > 0).all()
    assert (taller[7:].diff() < 0).all()


@pytest.mark.parametrize(("pattern", "dims"), [("CT", (32,)), ("C/CC/TT", (16, 24, 32)), ("C/C/CT/TT/T", (16,) * 5)])
def test_any_number_of_stages(pattern, dims):
    options = {**SMALL, "pattern": pattern, "dims": dims}
    model = timm.create_model("ascan_tiny", **options).eval()
    strides = [4 * 2**i for i in range(len(dims))]
    assert [level["reduction"] for level in model.feature_info] == strides
    sides = [m.bias.table.shape[1] for m in model.modules() if isinstance(m, ascan.Attention)]
    assert sides[-1] == 2 * -(-224 // strides[-1]) - 1  # every offset at 224 pixels
    x = torch.randn(2, 3, 70, 97)
    maps = timm.create_model("ascan_tiny", features_only=True, **options).eval()(x)
    assert [tuple(m.shape[1:]) for m in maps] == [
        (c, -(-70 // s), -(-97 // s)) for c, s in zip(dims, strides, strict=True)
    ]
    assert model(x).shape == (2, 5)


def test_attention_sees_the_whole_map():
    """A change in one corner reaches the opposite one within a single T."""
    torch.manual_seed(0)
    block = ascan.Transformer(AsCANConfig("T", (16,), head_dim=16), 16, 7, 0.0).eval()
    x = torch.randn(1, 16, 9, 11)
    changed = x.clone()
    changed[..., 0, 0] += 1
    assert (block(changed) - block(x))[..., -1, -1].abs().max() > 0


def test_tokens_are_a_view_of_channels_last_maps():
    block = ascan.Transformer(AsCANConfig("T", (16,), head_dim=16), 16, 7, 0.0)
    x = torch.randn(2, 16, 5, 4).contiguous(memory_format=torch.channels_last)
    assert x.flatten(2).transpose(1, 2).is_contiguous()
    assert block(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(pattern="CC/CX/CT/T"), "pattern must be stages of C and T"),
        (dict(pattern="CC//CT/T"), "pattern must be stages of C and T"),
        (dict(pattern="CC/CT"), "dims must have one width for each of the 2 stages"),
        (dict(head_dim=20), "head_dim must divide the width of a stage with T; got 20 and 384"),
        (dict(head_dim=0), "head_dim must be positive; got 0"),
        (dict(stem_dim=0), "stem_dim must be positive; got 0"),
        (dict(dims=(0, 192, 384, 768)), "dims must be positive"),
        (dict(position="rope"), "position must be one of bias, conv, none; got 'rope'"),
        (dict(conv_norm="group"), "conv_norm must be one of batch, layer; got 'group'"),
        (dict(depths=(1, 1, 9, 1)), "depths must be from 1 to"),
        (dict(depths=(1, 1)), "depths must be from 1 to"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("ascan_tiny", **arguments)
