"""MaxViT against timm's weights and numbers, and at sizes that the published code refuses."""

from __future__ import annotations

import copy

import goldens
import pytest
import timm
import torch
from networks import assert_cost, costs_of

from hybridzoo.checkpoints import cards, convert

FIXTURES = goldens.structures("maxvit", "maxvit_small_tf_224", "maxvit_tiny_tf_224", "maxvit_tiny_tf_384")
MANIFESTS = goldens.names("maxvit", numeric=False)
SHALLOW = dict(depths=(1, 1, 1, 1), num_classes=7)


def model_of(fixture: str, **kwargs) -> torch.nn.Module:
    """`maxvit_<size>_tf_<pixels>…`: windows of a 32nd of the pixels; `imgsize`: timm's other rule."""
    size, resolution = fixture.split("_")[1], int(fixture.split("_")[3].split(".")[0])
    how = dict(img_size=(256, 320)) if "imgsize" in fixture else dict(window_size=resolution // 32)
    classes = 21843 if fixture.endswith("in21k") else 1000
    return timm.create_model(f"maxvit_{size}", num_classes=classes, **how, **kwargs)


@pytest.mark.parametrize("fixture", [m for m in MANIFESTS if "imgsize" not in m])
def test_published_state_dict_loads_strictly(fixture):
    manifest = goldens.manifest("maxvit", fixture)
    with torch.device("meta"):
        model = model_of(fixture)
    state = goldens.published_shapes("maxvit", fixture)
    converted = convert(state, model.default_cfg["architecture"])
    ours = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in converted.items()} == ours
    assert len(converted) == len(state)
    assert sum(p.numel() for p in model.parameters()) == manifest["params"]
    assert convert(converted, "maxvit_tiny").keys() == converted.keys()


@pytest.mark.parametrize("fixture", FIXTURES)
def test_equals_the_published_network(fixture):
    """`224x448`: windows stay, their number grows. `imgsize256x320`: timm's windows of 8 x 10 with resampled tables."""
    model = goldens.network(model_of, fixture)
    model.load_state_dict(convert(goldens.published_state("maxvit", fixture), "maxvit_tiny"))
    goldens.assert_outputs(model, "maxvit", fixture)


@pytest.mark.parametrize("card", costs_of(cards("maxvit*")), ids=lambda card: card.name)
def test_cards_state_the_models_size_and_cost(card):
    model = assert_cost(card, abs=6e-4)
    assert model.stages[0].blocks[0].attn_grid.window == (card.input_size[1] // 32,) * 2


def test_weights_of_another_window_follow_the_official_bilinear_rule():
    """13 x 13 tables in a network of 384 pixels become 23 x 23, pixel centres aligned, each head alone."""
    small = timm.create_model("maxvit_tiny", **SHALLOW)
    large = timm.create_model("maxvit_tiny.tf_384_in1k", **SHALLOW)
    large.load_state_dict(small.state_dict())
    for name, table in small.named_parameters():
        if name.endswith("bias.table"):
            wanted = torch.nn.functional.interpolate(table[None], (23, 23), mode="bilinear", align_corners=False)[0]
            torch.testing.assert_close(large.get_parameter(name), wanted)


def test_padding_does_not_change_the_result():
    """Grid and windows at a size 7 does not divide: one stage of attention, alone and inside a larger canvas."""
    torch.manual_seed(0)
    block = timm.create_model("maxvit_tiny", **SHALLOW).double().eval().stages[0].blocks[0]
    x = torch.randn(1, 10, 13, 64, dtype=torch.float64)
    with torch.no_grad():
        out = block.attn_block(x)
        corner = block.attn_block(x[:, 7:])  # the lower row of windows by itself: 3 of its 7 rows are there
        torch.testing.assert_close(out[:, 7:], corner)
        spread = block.attn_grid(x)
        phase = block.attn_grid(x[:, 1::2, 1::2])  # two windows an axis: a window is every second token
        torch.testing.assert_close(spread[:, 1::2, 1::2], phase)


def test_dense_models_have_no_unused_weights():
    dense = timm.create_model("maxvit_tiny", features_only=True, depths=(1, 1, 1, 1))
    maps = dense(torch.randn(2, 3, 70, 50))
    sum(m.sum() for m in maps).backward()
    assert all(p.grad is not None for p in dense.parameters())


def test_position_tables_have_no_weight_decay():
    model = timm.create_model("maxvit_tiny", **SHALLOW)
    assert model.no_weight_decay() == {n for n, p in model.named_parameters() if p.ndim == 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(window_size=0), "window_size must be positive, a number or .rows, columns.; got 0"),
        (dict(window_size=(7, 7, 7)), "window_size must be positive"),
        (dict(dims=(16, 32, 64, 128)), r"dims must be multiples of 32, .*; got \(16, 32, 64, 128\)"),
        (dict(dims=(80, 96, 192, 384)), "dims must be multiples of 32"),
        (dict(dims=64), "dims must have one entry for each of 4 stages; got 64"),
        (dict(img_size=31), "img_size must be at least 32, a number or .height, width.; got 31"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("maxvit_tiny", **SHALLOW, **arguments)


def test_folding_removes_batch_norms_and_keeps_the_outputs():
    torch.manual_seed(0)
    model = timm.create_model("maxvit_tiny", **SHALLOW).double()
    image = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        model.train()(image)  # so that the running statistics are not those of a fresh norm
        expected = model.eval()(image)
        folded = copy.deepcopy(model).fuse()
        torch.testing.assert_close(folded(image), expected)
    assert not [key for key, m in folded.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
