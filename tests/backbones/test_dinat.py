"""NAT, DiNAT, DiNAT_s and the isotropic nets equal the published ones for each tag, with the cost on their cards."""

from __future__ import annotations

import dataclasses

import goldens
import pytest
import timm
import torch
from networks import assert_cost, costs_of

import hybridzoo  # noqa: F401  (registers the models)
from hybridzoo.backbones.dinat_dilations import DILATIONS, dilations_for
from hybridzoo.checkpoints import cards, convert

FIXTURES = goldens.structures("dinat", "dinat_tiny")
MANIFESTS = goldens.names("dinat", numeric=False)
TAGGED = {  # variants of the authors that are tags here
    "dinat_large": "dinat_large.in22k_ft_in1k_224",
    "dinat_large_384": "dinat_large.in22k_ft_in1k_384",
    "dinat_large_384_11x11": "dinat_large.in22k_ft_in1k_384_11x11",
    "dinat_large_21k": "dinat_large.in22k",
    "dinat_large_21k_11x11": "dinat_large.in22k_11x11",
    "dinat_s_large": "dinat_s_large.in22k_ft_in1k_224",
    "dinat_s_large_384": "dinat_s_large.in22k_ft_in1k_384",
    "dinat_s_large_21k": "dinat_s_large.in22k",
}
CARDS = [card for pattern in ("nat_*", "dinat_*", "vitrpb_*") for card in cards(pattern)]
TINY = dict(depths=(1, 2, 2, 1), dims=(32, 32, 64, 64), num_classes=3)


def name_of(fixture: str) -> str:
    variant = fixture.split("_160x192")[0]
    return TAGGED.get(variant, variant)


def published(fixture: str) -> dict[str, torch.Tensor]:
    return goldens.published_shapes("dinat", fixture)


def shapes(state: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items()}


@pytest.mark.parametrize("fixture", MANIFESTS)
def test_published_state_dict_loads_strictly(fixture):
    name = name_of(fixture)
    with torch.device("meta"):
        model = timm.create_model(name)
    converted = convert(published(fixture), name)
    assert shapes(converted) == shapes(model.state_dict())
    buffers = sum(key.endswith("relative_position_index") for key in published(fixture))
    assert len(converted) == len(published(fixture)) - buffers
    assert buffers == (12 if "vitrpb" in fixture else 0)
    assert sum(p.numel() for p in model.parameters()) == goldens.manifest("dinat", fixture)["params"]
    assert convert(converted, name).keys() == converted.keys()


@pytest.mark.parametrize("fixture", FIXTURES)
def test_equals_the_published_network(fixture):
    model = goldens.network(timm.create_model, name_of(fixture))
    model.load_state_dict(convert(goldens.published_state("dinat", fixture), name_of(fixture)))
    goldens.assert_outputs(model, "dinat", fixture)


def test_there_is_a_card_for_every_published_file():
    official = [card for card in CARDS if card.url.startswith("https://shi-labs.com/projects/")]
    assert (
        len(official) == len({card.url for card in official}) == len(MANIFESTS) - FIXTURES.count("dinat_mini_160x192")
    )
    assert {card.name.removesuffix(".in1k") for card in official} == {name_of(f) for f in MANIFESTS}
    hub = [card for card in CARDS if card.url.startswith("https://huggingface.co/shi-labs/")]
    assert len(official) + len(hub) == len(CARDS)
    by_name = {card.name: card for card in official}
    for card in hub:
        twin = by_name[card.name.removesuffix("_hf")]
        expected = dataclasses.replace(card, url=twin.url, tag=twin.tag, notes=twin.notes)
        assert expected == twin


AUTHORS = [card for card in CARDS if not card.tag.endswith("_hf")]


@pytest.mark.parametrize("card", costs_of(AUTHORS), ids=lambda card: card.name)
def test_cards_state_the_models_size_and_cost(card):
    # Where a window reaches beyond the map, the padding's one token goes through the projection too.
    assert_cost(card, uncounted=0.053 if card.name == "dinat_large.in22k_11x11" else 0.0, abs=6e-4)


# ------------------------------------------------------------------------------------------- what a tag brings with it


def dilations_of(model) -> list[list]:
    return [[b.attn.dilation and b.attn.dilation[0] for b in stage.blocks] for stage in model.stages]


def test_a_tag_sets_kernel_and_dilations_and_arguments_override_them():
    with torch.device("meta"):
        low = timm.create_model("dinat_s_large.in22k")
        high = timm.create_model("dinat_s_large.in22k_ft_in1k_384")
        wide = timm.create_model("dinat_large.in22k_ft_in1k_384_11x11")
        forced = timm.create_model("dinat_large.in22k_ft_in1k_384_11x11", kernel_size=5, dilations="coco")
        features = timm.create_model("dinat_s_large.in22k_ft_in1k_384", features_only=True)
    assert dilations_of(low) == [[1, 8], [1, 4], [1, 2] * 9, [1, 1]]
    assert dilations_of(high) == dilations_of(features.model) == [[1, 13], [1, 6], [1, 3] * 9, [1, 1]]
    assert dilations_of(wide) == [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 9, [1] * 5]
    assert wide.stages[0].blocks[0].attn.kernel_size == (11, 11)
    assert forced.stages[0].blocks[0].attn.kernel_size == (5, 5)
    assert dilations_of(forced)[0] == [1, 28, 1]
    assert wide.default_cfg["input_size"] == (3, 384, 384)


def test_pretrained_weights_of_another_kernel_are_resized(tmp_path):
    small = timm.create_model("dinat_mini", **TINY)
    torch.save(small.state_dict(), tmp_path / "weights.pth")
    overlay = dict(file=str(tmp_path / "weights.pth"), num_classes=3)
    large = timm.create_model("dinat_mini", pretrained=True, kernel_size=11, pretrained_cfg_overlay=overlay, **TINY)
    assert large.stages[0].blocks[0].attn.rpb.shape == (1, 21, 21)
    center = (slice(None), 10, 10), (slice(None), 6, 6)
    for a, b in zip(large.stages[2].blocks, small.stages[2].blocks, strict=True):
        torch.testing.assert_close(a.attn.rpb[center[0]], b.attn.rpb[center[1]], rtol=0.3, atol=0.02)
        assert torch.equal(a.attn.qkv.weight, b.attn.qkv.weight)


# ----------------------------------------------------------------------------------------------- files of other layouts


def to_transformers(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The Hub's layout of a published state dict, spelled out from the authors' names by the card's table."""
    renamed = {}
    for key, tensor in state.items():
        parts = key.split(".")
        if key.startswith("patch_embed.proj"):
            new = [prefix, "embeddings", "patch_embeddings", "projection", *parts[2:]]
        elif key.startswith("patch_embed.norm"):
            new = [prefix, "embeddings", *parts[1:]]
        elif parts[0] == "norm":
            new = [prefix, "layernorm", *parts[1:]]
        elif parts[0] == "head":
            new = ["classifier", *parts[1:]]
        elif parts[2] == "downsample":
            new = [prefix, "encoder", *parts]
        else:
            level = [prefix, "encoder", "levels", parts[1], "layers", parts[3]]
            name = ".".join(parts[4:])
            if name.startswith("attn.qkv"):
                for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                    renamed[".".join([*level, "attention.self", part, parts[-1]])] = piece
                continue
            if name == "gamma1":
                both = torch.stack([tensor, state[key.replace("gamma1", "gamma2")]])
                renamed[".".join([*level, "layer_scale_parameters"])] = both
                continue
            if name == "gamma2":
                continue
            table = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.rpb": "attention.self.rpb"}
            table |= {"attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
            stem = name if name in table else name.rpartition(".")[0]
            new = [*level, table[stem], *([] if name in table else parts[-1:])]
        renamed[".".join(new)] = tensor
    return renamed


@pytest.mark.parametrize(("fixture", "prefix"), [("dinat_base", "dinat"), ("nat_mini", "nat")])
def test_the_layout_of_transformers(fixture, prefix):
    values = {
        key: torch.randn(tuple(min(3 if n % 3 == 0 else 2, n) for n in v.shape))
        for key, v in published(fixture).items()
    }
    hub = to_transformers(values, prefix)
    assert sum("attention.self" in key for key in hub) == 7 * sum(key.endswith("rpb") for key in values)
    ours, expected = convert(hub, fixture), convert(values, fixture)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in ours)


@pytest.mark.parametrize("fixture", ["dinat_mini", "dinat_s_tiny", "nat_base"])
def test_published_detectors_are_converted(fixture):
    """`backbone.` with a norm for every output map and without the classifier; the rest keeps its names."""
    backbone = pytest.importorskip("hybridzoo.train.backbone")
    with torch.device("meta"):
        ours = backbone.PyramidBackbone(name=fixture, out_norm="LN")
    theirs = {f"backbone.{k}": v for k, v in published(fixture).items() if not k.startswith(("norm.", "head."))}
    for i, width in enumerate(ours.channels):
        theirs |= {f"backbone.norm{i}.{part}": torch.empty(width, device="meta") for part in ("weight", "bias")}
    theirs["neck.lateral_convs.0.conv.weight"] = torch.empty(1)
    converted = convert(theirs, fixture)
    expected = shapes({f"backbone.{key}": value for key, value in ours.state_dict().items()})
    assert shapes(converted) == expected | {"neck.lateral_convs.0.conv.weight": torch.Size([1])}
    assert convert(converted, fixture).keys() == converted.keys()
    stripped = {k.removeprefix("backbone."): v for k, v in theirs.items() if k.startswith("backbone.")}
    assert shapes(convert(stripped, fixture)) == shapes(ours.state_dict())


# ------------------------------------------------------------------------------------------------------------ dilations


@pytest.mark.parametrize(
    ("name", "dilations", "expected"),
    [
        ("dinat_mini", "coco", [[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7], [1, 3, 1, 3, 1]]),
        ("dinat_s_tiny", "coco", [[1, 28], [1, 14], [1, 3, 1, 5, 1, 7], [1, 3]]),
        ("dinat_mini", "ade20k_512", [[1, 16, 1], [1, 4, 1, 8], [1, 2, 1, 3, 1, 4], [1, 2, 1, 2, 1]]),
        ("dinat_s_tiny", "ade20k_512", [[1, 16], [1, 8], [1, 2, 1, 3, 1, 4], [1, 2]]),
        (
            "dinat_tiny",
            "ade20k_640",
            [[1, 20, 1], [1, 5, 1, 10], [*[1, 2, 1, 3, 1, 4, 1, 5] * 2, 1, 5], [1, 2, 1, 2, 1]],
        ),
        ("dinat_tiny", "mask2former", [[1, 14, 1], [1, 4, 1, 7], [*[1, 2, 1, 3] * 4, 1, 3], [1] * 5]),
        ("nat_mini", ((1,), (2, 3), (4,), (5, 1)), [[1] * 3, [2, 3, 2, 3], [4] * 6, [5, 1, 5, 1, 5]]),
        ("nat_mini", "auto", [[1, None, 1], [1, None] * 2, [1, None] * 3, [1, None, 1, None, 1]]),
        ("dinat_isotropic_small", "auto", [[1], [None]] * 6),
    ],
)
def test_dilations_by_name_or_stage(name, dilations, expected):
    with torch.device("meta"):
        plain, model = timm.create_model(name), timm.create_model(name, dilations=dilations)
    assert dilations_of(model) == expected
    assert shapes(model.state_dict()) == shapes(plain.state_dict())


@pytest.mark.parametrize(("size", "name"), [(224, "in1k_224"), (384, "in1k_384")])
def test_dilations_of_an_image_size_are_the_authors(size, name):
    published = DILATIONS[name]["conv"]
    assert [max(stage) for stage in dilations_for(size)] == [max(stage) for stage in published]
    assert [max(stage) for stage in dilations_for((size, 3 * size))] == [max(stage) for stage in published]
    assert dilations_for(352, kernel_size=11)[0] == (1, 8)


def test_auto_equals_the_dilations_of_that_size():
    torch.manual_seed(0)
    fixed = timm.create_model("dinat_mini", dilations=dilations_for((192, 256), 3), kernel_size=3, **TINY).eval()
    auto = timm.create_model("dinat_mini", dilations="auto", kernel_size=3, **TINY).eval()
    auto.load_state_dict(fixed.state_dict())
    image = torch.randn(1, 3, 192, 256)
    with torch.no_grad():
        torch.testing.assert_close(auto(image), fixed(image))


@pytest.mark.parametrize(
    ("name", "dilations"),
    [
        ("dinat_mini", "cocoa"),
        ("dinat_s_tiny", "mask2former"),
        ("dinat_isotropic_small", "coco"),
        ("dinat_mini", ((1,), (1,))),
        ("dinat_mini", ((1,), (1,), (), (1,))),
        ("dinat_mini", ((1,), (1,), (0,), (1,))),
    ],
)
def test_bad_dilations_are_named(name, dilations):
    with pytest.raises(ValueError, match="dilations"):
        timm.create_model(name, dilations=dilations)


# ------------------------------------------------------------------------------------------------ what else a user does


def test_variant_fields_can_be_overridden():
    model = timm.create_model("dinat_mini", layer_scale=0.5, padding="mask", kernel_size=5, **TINY)
    assert model(torch.randn(2, 3, 40, 56)).shape == (2, 3)
    block = model.stages[2].blocks[1]
    assert block.attn.num_heads == 2
    assert block.attn.padding == "mask"
    assert block.scale1.gamma.tolist() == [0.5] * 64
    assert block.attn.dilation == (2, 2)


def test_unknown_argument_is_an_error():
    with pytest.raises(TypeError, match="window_size"):
        timm.create_model("nat_mini", window_size=7)


def test_dilated_blocks_compile_and_export():
    """The contract tests build one block a stage, and the first one is never dilated."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = timm.create_model("dinat_mini", **TINY | dict(depths=(2, 0, 0, 0))).eval()
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = model(image)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(image), expected)
        program = torch.export.export(model, (image,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=8)},))
        torch.testing.assert_close(program.module()(image[:1]), expected[:1])


def test_vitrpb_crops_or_resizes_its_table():
    torch.manual_seed(0)
    attn = timm.create_model("vitrpb_small", depths=(1,) * 12).stages[0].blocks[0].attn.double()
    x = torch.randn(1, 5, 20, 384, dtype=torch.float64)
    table = torch.nn.functional.interpolate(attn.bias.table[None], (27, 39), mode="bicubic")[0]
    rows, columns = torch.arange(5), torch.arange(20)
    dy, dx = rows[None] - rows[:, None], columns[None] - columns[:, None]  # key minus query
    bias = table[:, (dy + 13)[:, None, :, None], (dx + 19)[None, :, None, :]].reshape(12, 100, 100)
    q, k, v = attn.qkv(x).view(1, 100, 3, 12, 32).permute(2, 0, 3, 1, 4)
    weight = torch.softmax(q @ k.transpose(-1, -2) * 32**-0.5 + bias, -1)
    torch.testing.assert_close(attn(x), attn.proj((weight @ v).transpose(1, 2).reshape(1, 5, 20, 384)))
