"""EfficientViT (MSRA) equals the published networks, at any size, folded or not."""

from __future__ import annotations

import copy
import re

import goldens
import pytest
import timm
import torch
from networks import assert_cost, costs_of

import hybridzoo  # noqa: F401
from hybridzoo.checkpoints import cards, convert

FAMILY = "efficientvit_msra"
FIXTURES = goldens.structures(FAMILY, "efficientvit_m4", "efficientvit_m4_damped")
MANIFESTS = goldens.names(FAMILY, numeric=False)
DETECTOR = "efficientvit_m4_det_512x640"


def name_of(fixture: str) -> str:
    return "efficientvit_msra_" + fixture.split("_")[1]


def published(fixture: str, **kwargs) -> torch.nn.Module:
    """The model with a fixture's weights, in float64."""
    model = goldens.network(timm.create_model, name_of(fixture), **kwargs)
    model.load_state_dict(convert(goldens.published_state(FAMILY, fixture), name_of(fixture)))
    return model


@pytest.mark.parametrize("fixture", MANIFESTS)
def test_published_state_dict_loads_strictly(fixture):
    manifest = goldens.manifest(FAMILY, fixture)
    with torch.device("meta"):
        model = timm.create_model(name_of(fixture))
    state = goldens.published_shapes(FAMILY, fixture)
    converted = convert(state, name_of(fixture))
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert len(converted) == len([key for key in state if not key.endswith("attention_bias_idxs")])
    assert sum(p.numel() for p in model.parameters()) == manifest["params"]
    assert convert(converted, name_of(fixture)).keys() == converted.keys()


@pytest.mark.parametrize("fixture", FIXTURES)
def test_equals_the_published_network(fixture):
    # The published detector widens the last stage's windows and resizes their bias tables.
    model = published(fixture, **(dict(windows=(7, 7, 7)) if fixture == DETECTOR else {}))
    data = goldens.numbers(FAMILY, fixture)
    with torch.no_grad():
        final, maps = model.forward_intermediates(goldens.image(goldens.manifest(FAMILY, fixture)["input_shape"]))
        if fixture != DETECTOR:
            goldens.assert_close(model.forward_head(final), data["logits"])
    goldens.assert_maps(maps, data)


def test_timms_layout_matrices_and_detectors_convert_to_the_same_weights():
    fixture = "efficientvit_m0"
    state = goldens.published_state(FAMILY, fixture)
    ours = convert(state, name_of(fixture))
    with torch.device("meta"):
        theirs = timm.create_model("efficientvit_m0").state_dict()
    from_timm = convert(theirs, name_of(fixture))
    assert {k: v.shape for k, v in from_timm.items()} == {k: v.shape for k, v in ours.items()}
    matrices = {k: v.flatten(1) if v.shape[2:] == (1, 1) else v for k, v in state.items()}
    converted = convert(matrices, name_of(fixture))
    assert all(torch.equal(converted[key], value) for key, value in ours.items())
    detector = {f"backbone.{k}": v for k, v in state.items()} | {"neck.conv.weight": torch.zeros(1)}
    assert convert(detector, name_of(fixture)).keys() == ours.keys()


def test_equals_timm_with_timms_weights():
    """Weights travel by name and shape above; here by value, through timm's layout."""
    torch.manual_seed(0)
    theirs = timm.create_model("efficientvit_m2").double().eval()
    for key, tensor in theirs.state_dict().items():
        if tensor.is_floating_point() and not key.endswith("running_var"):
            tensor.add_(0.02 * torch.randn_like(tensor))
    ours = timm.create_model("efficientvit_msra_m2").double().eval()
    ours.load_state_dict(convert(theirs.state_dict(), "efficientvit_msra_m2"))
    image = goldens.image([1, 3, 224, 224])
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs(image), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("card", costs_of(cards(f"{FAMILY}*")), ids=lambda card: card.name)
def test_cards_state_the_models_size_and_cost(card):
    assert_cost(card, abs=6e-5)


@pytest.mark.parametrize("size", [(64, 64), (160, 224), (250, 331)])
def test_folding_does_not_change_the_outputs(size):
    model = published("efficientvit_m0_damped")
    folded = copy.deepcopy(model).fuse()
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    image = goldens.image([2, 3, *size])
    with torch.no_grad():
        expected = model(image)
        goldens.assert_close(folded(image), expected)
        goldens.assert_close(folded.fuse()(image), expected)  # twice does no harm


def test_a_map_that_fits_its_window_is_not_padded():
    """At 32 x 64 pixels stage 1 has 2 x 4 tokens: zeros around them, attended to as in a padded map, would show."""
    model = published("efficientvit_m0_damped")
    attn = model.stages[0].blocks[0].attn.branch
    x = goldens.image([2, 64, 2, 4])
    with torch.no_grad():
        alone = attn(x)
        padded = attn._attend(torch.nn.functional.pad(x, (0, 3, 0, 5)))[:, :, :2, :4]
    assert (alone - padded).abs().max() > 1e-3 * alone.std()


def test_windows_do_not_see_each_other():
    attn = published("efficientvit_m0_damped").stages[0].blocks[0].attn.branch
    x = goldens.image([1, 64, 14, 14])
    y = x.clone()
    y[:, :, 8:, 8:] += 1
    with torch.no_grad():
        changed = (attn(y) - attn(x)).abs().amax(dim=(0, 1)) > 0
    assert changed[7:, 7:].all()
    assert not changed[:7].any()
    assert not changed[:, :7].any()


def test_features_can_include_the_maps_of_the_stem():
    options = dict(features_only=True, stem_taps=True)
    dense = timm.create_model("efficientvit_msra_m0", **options).eval()
    assert dense.feature_info.reduction() == [4, 8, 16, 32, 64]
    assert dense.feature_info.channels() == [16, 32, 64, 128, 192]
    image = torch.randn(2, 3, 97, 130)
    maps = dense(image)
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 25, 33), (32, 13, 17), (64, 7, 9), (128, 4, 5), (192, 2, 3)]
    assert all(level.min() >= 0 for level in maps[:2])  # after their ReLU
    assert maps[2].min() < 0
    chosen = timm.create_model("efficientvit_msra_m0", out_indices=(1, 3), **options).eval()
    chosen.model.load_state_dict(dense.model.state_dict(), strict=False)
    for got, index in zip(chosen(image), (1, 3), strict=True):
        torch.testing.assert_close(got, maps[index])
    plain = timm.create_model("efficientvit_msra_m0", features_only=True)
    assert plain.feature_info.reduction() == [16, 32, 64]
    sum(level.mean() for level in dense.train()(image)).backward()
    assert all(p.grad is not None for p in dense.parameters())  # no idle weights


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_accurate(dtype):
    fixture = "efficientvit_m0_damped"
    model = published(fixture)
    image = goldens.image([1, 3, 224, 224])
    with torch.no_grad():
        expected = model(image)
        got = model.to(dtype)(image.to(dtype)).double()
    assert (got - expected).abs().max() < {torch.float16: 0.02, torch.bfloat16: 0.15}[dtype] * expected.std()


def test_residual_branches_start_at_zero_and_tables_have_no_weight_decay():
    torch.manual_seed(0)
    model = timm.create_model("efficientvit_msra_m1", num_classes=3).eval()
    block = model.stages[1].blocks[0]
    x = torch.randn(2, 144, 7, 7)
    with torch.no_grad():
        torch.testing.assert_close(block(x), x)
    assert model.no_weight_decay() == {k for k, _ in model.named_parameters() if re.search(r"bias\.table$", k)}
    assert len(model.no_weight_decay()) == 6


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("heads", (5, 4, 4)),
        ("windows", (7, 0, 4)),
        ("windows", 7),
        ("dims", (64, 128)),
        ("kernel_sizes", (5, 5)),
        ("global_pool", ""),
        ("global_pool", "catavgmax"),
    ],
)
def test_bad_arguments_are_named(argument, value):
    named = {"heads": "num_heads", "windows": "window", "global_pool": "pool_type"}.get(argument, argument)
    with pytest.raises(ValueError, match=named):
        timm.create_model("efficientvit_msra_m0", **{argument: value})
