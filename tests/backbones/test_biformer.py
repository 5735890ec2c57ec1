"""BiFormer equals the published networks, and its cost is that on the card."""

from __future__ import annotations

import goldens
import pytest
import timm
import torch
from networks import assert_cost, costs_of, gmacs

import hybridzoo
from hybridzoo.checkpoints import cards, convert

FIXTURES = goldens.structures("biformer", "biformer_small", "biformer_stl_nchw")
MANIFESTS = goldens.names("biformer", numeric=False)


def model_of(fixture: str, **kwargs) -> torch.nn.Module:
    name = fixture.split("_256x320")[0]
    if fixture.endswith("nwin8"):
        kwargs["regions"] = 8
    return timm.create_model(name, **kwargs)


@pytest.mark.parametrize("fixture", MANIFESTS)
def test_published_state_dict_loads_strictly(fixture):
    with torch.device("meta"):
        model = model_of(fixture)
    state = goldens.published_shapes("biformer", fixture)
    converted = convert(state, fixture.split("_256x320")[0])
    ours = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in converted.items()} == ours
    assert len(converted) == len(state)
    assert sum(p.numel() for p in model.parameters()) == goldens.manifest("biformer", fixture)["params"]
    assert convert(converted, model.default_cfg["architecture"]).keys() == converted.keys()


@pytest.mark.parametrize("fixture", FIXTURES)
def test_equals_the_published_network(fixture):
    model = goldens.network(model_of, fixture)
    model.load_state_dict(convert(goldens.published_state("biformer", fixture), model.default_cfg["architecture"]))
    goldens.assert_outputs(model, "biformer", fixture)


@pytest.mark.parametrize("card", costs_of(cards("biformer*")), ids=lambda card: card.name)
def test_cards_state_the_models_size_and_cost(card):
    assert_cost(card, abs=6e-4)


def test_cost_is_linear_in_the_area_when_regions_follow_the_resolution():
    """The last stage attends fully, so the whole grows a little faster than the area; a fixed grid much faster."""
    with torch.device("meta"):
        fixed, following = (timm.create_model("biformer_tiny", depths=(1, 1, 2, 1), regions=r) for r in (7, "auto"))
    small = gmacs(following, 224)
    assert small == gmacs(fixed, 224)
    growth_fixed, growth_following = (gmacs(m, 1024) / small for m in (fixed, following))
    area = (1024 / 224) ** 2
    assert growth_following < area**1.1
    assert growth_fixed > area**1.2


def test_variant_fields_can_be_overridden():
    model = timm.create_model("biformer_tiny", depths=(1, 1, 1, 1), dims=(32, 64, 128, 256), num_classes=5)
    assert model(torch.randn(2, 3, 40, 56)).shape == (2, 5)
    assert model.stages[1].blocks[0].attn.num_heads == 2


@pytest.mark.parametrize("regions", ["7", 0, (7, -1)])
def test_bad_region_count_is_named(regions):
    with pytest.raises(ValueError, match="regions"):
        timm.create_model("biformer_tiny", regions=regions)


def test_unknown_argument_is_an_error():
    with pytest.raises(TypeError, match="window_size"):
        timm.create_model("biformer_tiny", window_size=7)


def test_the_package_names_its_version():
    assert hybridzoo.__version__
