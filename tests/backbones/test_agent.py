"""The networks with agent attention equal the published ones, and their cost is that on the cards."""

from __future__ import annotations

import math
import re

import goldens
import pytest
import timm
import torch
from networks import assert_cost, costs_of, gmacs, one_block_a_stage

import hybridzoo.layers.agent_attention as layer
from hybridzoo.checkpoints import cards, convert

MANIFESTS = goldens.names("agent", numeric=False)


def model_of(fixture: str) -> torch.nn.Module:
    """The model of a fixture: `name[_size]` or `name_dense[_clsagents]_256x320`, the published dense form."""
    name, size = re.match(r"(agent_[a-z]+_[a-z]+?)(?:_(\d+))?(?:_dense.*)?$", fixture).groups()
    dense = fixture.endswith("_dense_256x320")
    return timm.create_model(name, **dict(agent_grid="dense") if dense else {}, **dict(img_size=int(size or 224)))


@pytest.mark.parametrize("fixture", MANIFESTS)
def test_published_state_dict_loads_strictly(fixture):
    meta = goldens.manifest("agent", fixture)
    with torch.device("meta"):
        model = model_of(fixture)
    converted = convert(goldens.published_shapes("agent", fixture), fixture)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert sum(p.numel() for p in model.parameters()) == meta["params"]
    again = convert(converted, fixture)
    assert again.keys() == converted.keys()
    assert all(again[key] is value for key, value in converted.items())


@pytest.mark.parametrize("fixture", goldens.names("agent", numeric=True))
def test_equals_the_published_network(fixture):
    model = goldens.network(model_of, fixture)
    model.load_state_dict(convert(goldens.published_state("agent", fixture), fixture))
    goldens.assert_outputs(model, "agent", fixture)


@pytest.mark.parametrize("card", costs_of(cards("agent*")), ids=lambda card: card.name)
def test_cards_state_the_models_size_and_cost(card, monkeypatch):
    """Counted as published: without pooling and without the resizing of tables (matrix products here)."""
    monkeypatch.setattr(layer, "resize_map", lambda x, size: x.new_empty(*x.shape[:-2], *size))
    monkeypatch.setattr(layer, "adaptive_pool", lambda x, size: x.new_empty(x.shape[0], *size, x.shape[3]))
    assert_cost(card, abs=6e-4)


@pytest.mark.parametrize(
    ("name", "grid"),
    [("agent_deit_tiny", "trained"), ("agent_pvt_tiny", "dense"), ("agent_swin_tiny", "dense")],
)
def test_cost_is_linear_in_the_area(name, grid):
    """Of multiplications, from 224 to 1792 px, tables included; dense attention's exponent is 1.6 and more."""
    with torch.device("meta"):
        model = timm.create_model(name, **one_block_a_stage(name), agent_grid=grid)
        few, many = (gmacs(model, side) for side in (224, 1792))
    assert math.log(many / few) / math.log(64) < 1.05


def test_only_the_first_blocks_of_a_mixed_stage_use_agents():
    model = timm.create_model("agent_deit_base", dim=48, num_heads=2, depths=(2, 2, 1, 1))
    kinds = [[type(b.attn).__name__ for b in stage.blocks] for stage in model.stages]
    assert kinds == [["AgentAttention"] * 2, ["AgentAttention", "SoftmaxAttention"], *[["SoftmaxAttention"]] * 2]


def test_agent_grids_can_be_chosen_per_stage():
    model = timm.create_model("agent_cswin_tiny", depths=(1, 1, 1, 1), agent_grid=(2, (3, 5), 7, 7))
    assert model.stages[1].blocks[0].attn.grid == (3, 5)
    assert model(torch.randn(1, 3, 40, 72)).shape == (1, 1000)


@pytest.mark.parametrize(
    ("name", "grid", "message"),
    [
        ("agent_deit_tiny", "dense", "published for PVT and Swin only"),
        ("agent_pvt_tiny", "finer", "'trained', 'dense'"),
        ("agent_swin_tiny", (9, 12), "each of 4 stages"),
        ("agent_swin_tiny", (9, 12, 14, 0), "grid must be positive"),
    ],
)
def test_bad_agent_grid_is_named(name, grid, message):
    kwargs = dict(linear=(1, 1, 1, 1)) if "swin" in name else {}
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, agent_grid=grid, **kwargs)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("cswin", dict(num_heads=(2, 4, 1, 16)), "num_heads must be even, and a divisor of .* 256 channels; got 1"),
        ("cswin", dict(dim=48, num_heads=(3, 3, 3, 3)), "num_heads must be even, and a divisor of .* 192 .*; got 3"),
        ("cswin", dict(num_heads=(2, 4, 8, 0)), "num_heads must be a divisor of the stage's 512 channels; got 0"),
        ("cswin", dict(num_heads=4), "num_heads must have one entry for each of 4 stages; got 4"),
        ("swin", dict(linear=(1, 1)), r"linear must have one entry for each of 4 stages; got \(1, 1\)"),
        ("pvt", dict(mlp_ratios=(8, 8)), "mlp_ratios must have one entry for each of 4 stages"),
    ],
)
def test_bad_arguments_of_the_hosts_are_named(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model(f"agent_{name}_tiny", **arguments)


def test_bad_pooling_is_named():
    with pytest.raises(ValueError, match="global_pool must be one of"):
        timm.create_model("agent_deit_tiny", global_pool="median")
