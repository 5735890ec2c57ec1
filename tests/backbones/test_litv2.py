"""LITv2 equals recorded outputs of the published networks; tests of its own arguments."""

from __future__ import annotations

import goldens
import pytest
import timm
import torch
import torch.nn.functional as F
from networks import assert_cost, costs_of

from hybridzoo.checkpoints import cards, convert

FIXTURES = goldens.names("litv2", numeric=True)
MANIFESTS = goldens.names("litv2", numeric=False)
SIZES = dict(s="small", m="medium", b="base")


def dense(fixture: str) -> bool:
    return "_det" in fixture or "_seg" in fixture


def name_of(fixture: str) -> str:
    return f"litv2_{SIZES[fixture.split('_')[1]]}"


def network(fixture: str) -> torch.nn.Module:
    alpha = goldens.manifest("litv2", fixture)["architecture"]["alpha"]
    headless = dict(num_classes=0, global_pool="") if dense(fixture) else {}
    return timm.create_model(name_of(fixture), alpha=alpha, **headless)


@pytest.mark.parametrize("fixture", MANIFESTS)
def test_published_state_dict_loads_strictly(fixture):
    manifest = goldens.manifest("litv2", fixture)
    with torch.device("meta"):
        model = network(fixture)
    converted = convert(goldens.published_shapes("litv2", fixture), name_of(fixture))
    ours = {key: value.shape for key, value in model.state_dict().items()}
    assert convert(converted, name_of(fixture)).keys() == converted.keys()
    if dense(fixture):
        ours = {f"model.{key}": shape for key, shape in ours.items() if not key.startswith("norm.")}
        for i, dim in list(enumerate(model.feature_info))["_det" in fixture :]:
            ours |= {f"out_norms.{i}.{part}": (dim["num_chs"],) for part in ("weight", "bias")}
    else:
        assert sum(p.numel() for p in model.parameters()) == manifest["params"]
    assert {key: value.shape for key, value in converted.items()} == ours


@pytest.mark.parametrize("fixture", FIXTURES)
def test_equals_the_published_network(fixture):
    """`seg_217x330`: padded to multiples of 4 pixels and of HiLo's windows, every map normalised."""
    model = goldens.network(network, fixture)
    state = convert(goldens.published_state("litv2", fixture), name_of(fixture))
    norms = {key: state.pop(key) for key in list(state) if key.startswith("out_norms.")}
    loaded = model.load_state_dict({k.removeprefix("model."): v for k, v in state.items()}, strict=not norms)
    assert set(loaded.missing_keys) == ({"norm.weight", "norm.bias"} if norms else set())
    data = goldens.numbers("litv2", fixture)
    with torch.no_grad():
        final, maps = model.forward_intermediates(goldens.image(goldens.manifest("litv2", fixture)["input_shape"]))
        if not norms:
            goldens.assert_close(model.forward_head(final), data["logits"])
    for i, feature in enumerate(maps):
        if norms:
            weight, bias = norms[f"out_norms.{i}.weight"], norms[f"out_norms.{i}.bias"]
            maps[i] = F.layer_norm(feature.permute(0, 2, 3, 1), weight.shape, weight, bias).permute(0, 3, 1, 2)
    goldens.assert_maps(maps, data)


@pytest.mark.parametrize("fixture", ["litv2_s_det", "litv2_m_seg"])
def test_published_detectors_and_segmentors_are_converted(fixture):
    """Detectors leave the finest map as it is."""
    backbone = pytest.importorskip("hybridzoo.train.backbone")
    detector = fixture == "litv2_s_det"
    name = "litv2_small" if detector else "litv2_medium"
    manifest = goldens.manifest("litv2", fixture)
    with torch.device("meta"):
        ours = backbone.PyramidBackbone(name=name, out_norm=[None, "LN", "LN", "LN"] if detector else "LN")
        theirs = {f"backbone.{key}": torch.empty(shape) for key, shape, _ in manifest["state_dict"]}
        theirs["neck.lateral_convs.0.conv.weight"] = torch.empty(1)
    converted = convert(theirs, name)
    expected = {f"backbone.{key}": value.shape for key, value in ours.state_dict().items()}
    expected["neck.lateral_convs.0.conv.weight"] = torch.Size([1])
    assert {key: value.shape for key, value in converted.items()} == expected


@pytest.mark.parametrize("card", costs_of(cards("litv2*")), ids=lambda card: card.name)
def test_cards_state_the_models_size_and_cost(card):
    assert_cost(card, abs=6e-4)


def test_a_tag_sets_its_share_of_heads():
    with torch.device("meta"):
        model = timm.create_model("litv2_small.alpha04_in1k")
    attention = model.stages[2].blocks[0].attn.branch.update
    assert (attention.low_heads, attention.high_heads) == (4, 8)
    assert model.stages[3].blocks[0].attn.branch.update.high_heads == 0


def test_wider_windows_load_the_same_weights():
    with torch.device("meta"):
        plain, wide = (timm.create_model("litv2_small", windows=w) for w in ((0, 0, 2, 1), (0, 0, 4, 1)))
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in wide.state_dict().items()}


def test_downsampling_starts_as_a_plain_convolution():
    torch.manual_seed(0)
    merging = timm.create_model("litv2_small", depths=(1, 1, 1, 1)).stages[1].downsample.eval()
    x = torch.randn(2, 8, 11, 96)
    with torch.no_grad():
        plain = merging.act(merging.norm(merging.conv(x.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1)
        torch.testing.assert_close(merging(x), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(windows=(2, 1)), "windows must have one entry for each of 4 stages"),
        (dict(alpha=1.5), r"alpha must be in 0\.\.1; got 1\.5"),
        (dict(windows=(0, 0, -1, 1)), "window must be positive; got -1"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("litv2_small", **arguments)
