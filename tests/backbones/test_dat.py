"""DAT, DAT+ and DAT++ equal the published networks, accept any size, and have the cost on their cards."""

from __future__ import annotations

import re

import goldens
import pytest
import timm
import torch
from networks import assert_cost, costs_of

import hybridzoo  # noqa: F401  (registers the models)
from hybridzoo.checkpoints import cards, convert
from hybridzoo.checkpoints.keymaps import publish
from hybridzoo.layers import DeformableAttention, NeighborhoodAttention2d, ShiftedWindowAttention

MANIFESTS = goldens.names("dat", numeric=False)
CARDS = cards("dat_*")
SMALL = dict(dims=(32, 64, 64, 128), groups=(1, 2, 1, 2), depths=(2, 2, 2, 2), num_classes=3)


def name_of(fixture: str) -> str:
    """Fixtures are named as the authors' files: `dat_pp_` is DAT++, `dat_p_` DAT+."""
    generation, size, tag = re.match(r"dat_(pp_|p_|)(tiny|small|base)(_384)?", fixture).groups()
    return f"dat_{dict(pp_='plus_', p_='plain_').get(generation, '')}{size}" + (".in1k_384" if tag else "")


def shapes(state: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items()}


@pytest.mark.parametrize("fixture", [name for name in MANIFESTS if "_det_" not in name])
def test_published_state_dict_loads_strictly_and_converts_back(fixture):
    name, theirs = name_of(fixture), goldens.published_shapes("dat", fixture)
    with torch.device("meta"):
        model = timm.create_model(name)
    converted = convert(theirs, name)
    assert shapes(converted) == shapes(model.state_dict())
    assert sum(p.numel() for p in model.parameters()) == goldens.manifest("dat", fixture)["params"]
    assert convert(converted, name).keys() == converted.keys()
    constants = {key for key in theirs if key.endswith(("attn_mask", "relative_position_index"))}
    back = publish(converted, name)
    assert shapes(back) == {key: value.shape for key, value in theirs.items() if key not in constants}


@pytest.mark.parametrize("fixture", [name for name in goldens.names("dat", numeric=True) if "_det_" not in name])
def test_equals_the_published_network(fixture):
    model = goldens.network(timm.create_model, name_of(fixture))
    state = goldens.published_state("dat", fixture)
    model.load_state_dict(convert(state, name_of(fixture)))
    goldens.assert_outputs(model, "dat", fixture)
    back = publish(model.state_dict(), name_of(fixture))
    assert all(torch.equal(state[key], value) for key, value in back.items())


def test_equals_the_published_detectors_backbone():
    """`backbone.` with a norm for every output map and without the classifier; what is outside keeps its names."""
    backbone = pytest.importorskip("hybridzoo.train.backbone")
    fixture = "dat_pp_tiny_det_160x256"
    ours = goldens.network(backbone.PyramidBackbone, name="dat_plus_tiny", out_norm="LN")
    theirs = {f"backbone.{key}": value for key, value in goldens.published_state("dat", fixture).items()}
    converted = convert(theirs | {"neck.conv.weight": torch.ones(1)}, "dat_plus_tiny")
    assert converted.pop("neck.conv.weight") == 1
    ours.load_state_dict({key.removeprefix("backbone."): value for key, value in converted.items()})
    data = goldens.numbers("dat", fixture)
    with torch.no_grad():
        goldens.assert_maps(ours(goldens.image(goldens.manifest("dat", fixture)["input_shape"])), data)


@pytest.mark.parametrize("card", costs_of(CARDS), ids=lambda card: card.name)
def test_cards_state_the_models_size_and_cost(card):
    assert_cost(card, abs=6e-4)


def test_there_is_a_card_for_every_published_file():
    assert {card.name.removesuffix(".in1k") for card in CARDS} == {name_of(f) for f in MANIFESTS}
    assert [card.name for card in CARDS if card.status == "none"] == ["dat_plain_tiny"]
    assert len({card.url for card in cards("dat_*", task=None)}) == 8 + 12 + 6 + 1  # and none


def test_blocks_have_the_types_of_the_paper():
    letters = {DeformableAttention: "D", NeighborhoodAttention2d: "N"}
    for name, kinds in (
        ("dat_small", ("LS", "LS", "LD" * 9, "LD")),
        ("dat_plus_small", ("ND", "NDND", "ND" * 9, "DD")),
    ):
        with torch.device("meta"):
            model = timm.create_model(name)
        layers = [[block.attn for block in stage.blocks] for stage in model.stages]
        found = ["".join(letters.get(type(attn)) or ("S" if attn.shift else "L") for attn in row) for row in layers]
        assert tuple(found) == kinds
        assert {attn.shift for row in layers for attn in row if isinstance(attn, ShiftedWindowAttention)} <= {0, 4}


def test_weights_of_another_size_are_resized(tmp_path):
    """The tables of windows and of places; DAT++ needs none of that, its tables stretch with the map."""
    small = timm.create_model("dat_tiny", **SMALL)
    torch.save(small.state_dict(), tmp_path / "weights.pth")
    overlay = dict(file=str(tmp_path / "weights.pth"), num_classes=3)
    large = timm.create_model("dat_tiny", pretrained=True, img_size=384, pretrained_cfg_overlay=overlay, **SMALL)
    assert large.stages[0].blocks[0].attn.bias.table.shape[1:] == (23, 23)
    assert large.stages[2].blocks[1].attn.bias.table.shape[1:] == (47, 47)
    assert torch.equal(large.stages[2].blocks[1].attn.query.weight, small.stages[2].blocks[1].attn.query.weight)
    with torch.device("meta"):
        plus = timm.create_model("dat_plus_base.in1k_384")
    assert plus.stages[0].blocks[1].attn.bias.table.shape[1:] == (111, 111)


def test_only_position_tables_have_no_weight_decay():
    with torch.device("meta"):
        first, plus = timm.create_model("dat_tiny"), timm.create_model("dat_plus_tiny")
    assert len(first.no_weight_decay()) == 12
    assert all(name.endswith("bias.table") for name in first.no_weight_decay())
    assert len(plus.no_weight_decay()) == 14  # the neighborhoods' tables are decayed


def test_places_to_draw():
    """A hook on the layer gets the places where the keys of an image are sampled."""
    model = timm.create_model("dat_plus_tiny", **SMALL).eval()
    attn = model.stages[1].blocks[1].attn
    seen = []
    attn.query.register_forward_hook(lambda module, given, query: seen.append(attn.places(query)))
    with torch.no_grad():
        model(torch.randn(1, 3, 96, 160))
    (places,) = seen
    assert places.shape == (1, 2, 3, 5, 2)
    assert places.abs().max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(kinds=("ND", "XD", "ND", "D")), "kinds must be made of the letters D, L, N, S; got X"),
        (dict(depths=(1, 1, 1)), "depths must have one entry for each of 4 stages"),
        (dict(groups=(1, 2, 4)), "groups must have one entry for each of 4 stages"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("dat_plus_tiny", **arguments)
