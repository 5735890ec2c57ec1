"""RAVLT equals recorded outputs of the published networks; tests of its own arguments."""

from __future__ import annotations

import goldens
import pytest
import timm
import torch
import torch.nn.functional as F
from networks import assert_cost, costs_of

from hybridzoo.checkpoints import cards, convert
from hybridzoo.layers import GatedAttention, RankAugmentedAttention

FIXTURES = goldens.structures("ravlt", "ravlt_b_96x160")
MANIFESTS = goldens.names("ravlt", numeric=False)
SIZES = dict(t="tiny", s="small", b="base", l="large")


def name_of(fixture: str) -> str:
    return f"ravlt_{SIZES[fixture.split('_')[1]]}"


def network(fixture: str) -> torch.nn.Module:
    headless = dict(num_classes=0, global_pool="") if "_dense" in fixture else {}
    return timm.create_model(name_of(fixture), **headless)


@pytest.mark.parametrize("fixture", MANIFESTS)
def test_published_state_dict_loads_strictly(fixture):
    manifest = goldens.manifest("ravlt", fixture)
    with torch.device("meta"):
        model = network(fixture)
    converted = convert(goldens.published_shapes("ravlt", fixture), name_of(fixture))
    ours = {key: value.shape for key, value in model.state_dict().items()}
    params = sum(p.numel() for p in model.parameters())
    assert convert(converted, name_of(fixture)).keys() == converted.keys()
    if "_dense" in fixture:
        ours = {f"model.{key}": shape for key, shape in ours.items()}
        for i, level in enumerate(model.feature_info):
            ours |= {f"out_norms.{i}.{part}": (level["num_chs"],) for part in ("weight", "bias")}
            params += 2 * level["num_chs"]
    assert params == manifest["params"]
    assert {key: value.shape for key, value in converted.items()} == ours


@pytest.mark.parametrize("fixture", FIXTURES)
def test_equals_the_published_network(fixture):
    model = goldens.network(network, fixture)
    state = convert(goldens.published_state("ravlt", fixture), name_of(fixture))
    norms = {key: state.pop(key) for key in list(state) if key.startswith("out_norms.")}
    model.load_state_dict({k.removeprefix("model."): v for k, v in state.items()})
    data = goldens.numbers("ravlt", fixture)
    with torch.no_grad():
        final, maps = model.forward_intermediates(goldens.image(goldens.manifest("ravlt", fixture)["input_shape"]))
        if not norms:
            goldens.assert_close(model.forward_head(final), data["logits"])
    for i, feature in enumerate(maps):
        if norms:
            weight, bias = norms[f"out_norms.{i}.weight"], norms[f"out_norms.{i}.bias"]
            maps[i] = F.layer_norm(feature.permute(0, 2, 3, 1), weight.shape, weight, bias, 1e-6).permute(0, 3, 1, 2)
    goldens.assert_maps(maps, data)


def test_rotary_angles_are_the_published_constants():
    """float32, in whatever dtype the network computes."""
    for fixture in ("ravlt_t", "ravlt_b_96x160"):
        data, model = goldens.numbers("ravlt", fixture), network(fixture)
        for i, stage in enumerate(model.stages):
            rotary = stage.blocks[0].attn.rotary
            for dtype in (torch.float64, torch.bfloat16):
                cos, sin = rotary(2, 1, dtype, torch.device("cpu"))
                angle = torch.atan2(sin, cos)[1, : rotary.pairs]  # one token down
                published = data[f"keep.layers.{i}.RoPE.angle"][::2]  # each is written twice
                torch.testing.assert_close(angle.double(), published.double(), rtol=1e-6, atol=0)
                assert cos.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("card", costs_of(cards("ravlt*")), ids=lambda card: card.name)
def test_cards_state_the_models_size_and_cost_and_licence(card):
    assert_cost(card, abs=6e-4)
    assert "do not re-host" in card.licence


def test_every_stage_can_be_linear():
    with torch.device("meta"):
        model = timm.create_model("ravlt_tiny", linear=(1, 1, 1, 1))
        plain = timm.create_model("ravlt_tiny")
    kinds = [type(stage.blocks[0].attn) for stage in plain.stages]
    assert kinds == [RankAugmentedAttention, RankAugmentedAttention, GatedAttention, GatedAttention]
    assert {type(stage.blocks[0].attn) for stage in model.stages} == {RankAugmentedAttention}
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(linear=(1, 1)), "linear must have one entry for each of 4 stages"),
        (dict(num_heads=(3, 2, 4, 8)), "dim must be a multiple of num_heads; got dim=64, num_heads=3"),
        (dict(num_heads=(32, 2, 4, 8)), "head_dim must be a multiple of 4"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("ravlt_tiny", **arguments)
