"""PATNet and PartialNet equal the published code, have the cost on their cards, and fold exactly."""

from __future__ import annotations

import copy
import re

import goldens
import pytest
import timm
import torch
from networks import assert_cost, costs_of, gmacs

import hybridzoo  # noqa: F401
from hybridzoo.checkpoints import cards, convert

FIXTURES = goldens.names("patnet", numeric=True)
MANIFESTS = goldens.names("patnet", numeric=False)


def name_of(fixture: str) -> str:
    size = re.match(r"patnet_([a-z0-9]+)", fixture)[1]
    return f"patnet_{size}" if "_paper" in fixture else f"partialnet_{size}"


def model_of(fixture: str, **kwargs) -> torch.nn.Module:
    if "_det_" in fixture:
        kwargs.update(feature_norms=True, num_classes=0, global_pool="")
    return timm.create_model(name_of(fixture), dynamic="dpconv" in fixture, **kwargs)


def published_model(fixture: str, **kwargs) -> torch.nn.Module:
    model = goldens.network(model_of, fixture, **kwargs)
    model.load_state_dict(convert(goldens.published_state("patnet", fixture), name_of(fixture)))
    return model


@pytest.mark.parametrize("fixture", MANIFESTS)
def test_published_state_dict_loads_strictly(fixture):
    meta = goldens.manifest("patnet", fixture)
    with torch.device("meta"):
        model = model_of(fixture)
    state = goldens.published_shapes("patnet", fixture)
    converted = convert(state, name_of(fixture))
    ours = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in converted.items()} == ours
    constants = re.compile(r"\.(I|one|c_div|one_channel)$")  # of dynamic partial convolutions
    assert len(converted) == len([key for key in state if not constants.search(key)])
    assert sum(p.numel() for p in model.parameters()) == meta["params"]
    again = convert(converted, name_of(fixture))
    assert all(again[key] is value for key, value in converted.items())


@pytest.mark.parametrize("fixture", FIXTURES)
def test_equals_the_published_network_folded_or_not(fixture):
    model = published_model(fixture)
    data = goldens.numbers("patnet", fixture)
    image = goldens.image(goldens.manifest("patnet", fixture)["input_shape"])
    for form in (model, copy.deepcopy(model).fuse().fuse()):
        with torch.no_grad():
            final, maps = form.forward_intermediates(image)
            logits = maps[-1].mean((2, 3)) if "_det_" in fixture else form.forward_head(final)
            goldens.assert_close(logits, data["logits"])
        goldens.assert_maps(maps, data)


@pytest.mark.parametrize("card", costs_of(cards("pa[tr]*net_*")), ids=lambda card: card.name)
def test_cards_state_the_models_size_and_cost(card):
    assert_cost(card, abs=6e-4)


def test_folding_removes_batch_norms_and_the_convolutions_of_gates():
    """The papers' FLOPs are those of the folded network."""
    model = timm.create_model("patnet_t2").fuse()
    assert not [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert gmacs(model.to("meta"), 224) == pytest.approx(1.035, abs=1e-3)


@pytest.mark.parametrize("options", [{}, dict(dynamic=True), dict(act="relu", feature_norms=True)])
def test_folding_changes_no_map_of_a_trained_network(options):
    torch.manual_seed(0)
    model = timm.create_model("patnet_t0", depths=(1, 1, 1, 1), num_classes=7, **options).double().train()
    for module in model.modules():  # what training would do to weights and statistics
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            torch.nn.init.normal_(module.weight, 1)
            torch.nn.init.normal_(module.bias)
    x = torch.randn(2, 3, 70, 45, dtype=torch.float64)
    model(x)
    model.eval()
    with torch.no_grad():
        maps, logits = model.forward_intermediates(x, intermediates_only=True), model(x)
        model.fuse()
        for before, after in zip(maps, model.forward_intermediates(x, intermediates_only=True), strict=True):
            goldens.assert_close(after, before)
        goldens.assert_close(model(x), logits)


def test_a_dynamic_network_is_the_same_in_half_precision():
    torch.manual_seed(0)
    model = timm.create_model("patnet_t0", depths=(1, 1, 1, 1), num_classes=7, dynamic=True).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, out = model(x), model.half()(x.half()).float()
    assert (out - expected).abs().max() < 0.05 * expected.std()


def test_stochastic_depth_and_the_published_dropouts_are_set_in_the_layers():
    model = timm.create_model("patnet_t1", drop_path_rate=0.02, attn_drop_rate=0.1, proj_drop_rate=0.2)
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.02 * i / 12 for i in range(13)])
    mixer = model.stages[-1].blocks[0].mixer
    assert (mixer.attn_drop, mixer.proj_drop.p, mixer.num_heads) == (0.1, 0.2, 6)


def test_detection_form_normalises_copies():
    torch.manual_seed(0)
    plain = timm.create_model("patnet_t0", features_only=True).eval()
    dense = timm.create_model("patnet_t0", features_only=True, out_indices=(1, 3), feature_norms=True).eval()
    dense.load_state_dict(plain.state_dict(), strict=False)
    for norm in dense.model.feature_norms:
        norm.running_mean += 1
    x = torch.randn(1, 3, 64, 40)
    with torch.no_grad():
        maps, normalised = plain(x), dense(x)
    for i, feature in zip((1, 3), normalised, strict=True):
        torch.testing.assert_close(feature, (maps[i] - 1) * (1 + 1e-5) ** -0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(act="silu"), "act must be one of gelu, relu; got 'silu'"),
        (dict(embed_dim=30), "embed_dim must be a multiple of 4; got 30"),
        (dict(num_heads=5), "num_heads must divide the 192 attended channels; got 5"),
        (dict(embed_dim=48, dynamic=True), "dim must be a power of two"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("patnet_t0", **arguments)
