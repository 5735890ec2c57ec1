"""EfficientViT (MIT) equals the published classifiers and segmentation models, at any size, folded or not."""

from __future__ import annotations

import copy

import goldens
import pytest
import timm
import torch
from networks import assert_cost, costs_of

import hybridzoo  # noqa: F401
from hybridzoo.backbones.efficientvit_mit_segmentation import SEGMENTORS, EfficientViTSegmentor
from hybridzoo.checkpoints import cards, convert
from hybridzoo.layers import MultiScaleLinearAttention
from hybridzoo.layers.linear_attention import EPS

FAMILY = "efficientvit_mit"
MANIFESTS = goldens.names(FAMILY, numeric=False)
SEGMENTATION = [f for f in goldens.names(FAMILY, numeric=True) if "_seg_" in f]
CLASSIFIERS = [f for f in goldens.structures(FAMILY, "efficientvit_b1") if f not in SEGMENTATION]


def name_of(fixture: str) -> str:
    return "efficientvit_mit_" + fixture.removeprefix("efficientvit_").removeprefix("seg_").split("_")[0]


def model_of(fixture: str) -> torch.nn.Module:
    if "_seg_" in fixture:
        return EfficientViTSegmentor(fixture.removesuffix("_128x256"))
    return timm.create_model(name_of(fixture))


def published(fixture: str) -> torch.nn.Module:
    """The model with a fixture's weights, in float64."""
    model = goldens.network(model_of, fixture)
    model.load_state_dict(convert(goldens.published_state(FAMILY, fixture), name_of(fixture)))
    return model


def image_of(fixture: str) -> torch.Tensor:
    return goldens.image(goldens.manifest(FAMILY, fixture)["input_shape"])


@pytest.mark.parametrize("fixture", MANIFESTS)
def test_published_state_dict_loads_strictly(fixture):
    manifest = goldens.manifest(FAMILY, fixture)
    with torch.device("meta"):
        model = model_of(fixture)
    state = goldens.published_shapes(FAMILY, fixture)
    converted = convert(state, name_of(fixture))
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert len(converted) == len(state)
    assert sum(p.numel() for p in model.parameters()) == manifest["params"]
    assert convert(converted, name_of(fixture)).keys() == converted.keys()


def test_every_published_segmentation_model_exists():
    assert len(SEGMENTORS) == 11
    assert SEGMENTORS.keys() == {f for f in MANIFESTS if "_seg_" in f and not f.endswith("128x256")}


@pytest.mark.parametrize("fixture", CLASSIFIERS)
def test_equals_the_published_network(fixture):
    model = published(fixture)
    goldens.assert_outputs(model, FAMILY, fixture)


@pytest.mark.parametrize("fixture", SEGMENTATION)
def test_equals_the_published_segmentation_model(fixture):
    model = published(fixture)
    data = goldens.numbers(FAMILY, fixture)
    image = image_of(fixture)
    with torch.no_grad():
        maps = model.backbone.forward_intermediates(image, intermediates_only=True)
        out = model(image)
        torch.testing.assert_close(model.head(maps[1:]), out)
    goldens.assert_maps([*maps, out], data)
    goldens.assert_close(out.mean(dim=(2, 3)), data["logits"])


def test_segmentation_accepts_any_size_trains_and_has_no_unused_weights():
    torch.manual_seed(0)
    model = EfficientViTSegmentor("efficientvit_seg_b0_cityscapes").train()
    out = model(torch.randn(2, 3, 75, 130))
    assert out.shape == (2, 19, 10, 17)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(ValueError, match="efficientvit_seg_b0_cityscapes"):
        EfficientViTSegmentor("efficientvit_seg_b0")


@pytest.mark.parametrize("theirs_name", ["efficientvit_b1", "efficientvit_l1"])
def test_timms_layout_converts(theirs_name):
    with torch.device("meta"):
        theirs = timm.create_model(theirs_name).state_dict()
        ours = timm.create_model(name_of(theirs_name)).state_dict()
    converted = convert(theirs, name_of(theirs_name))
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in ours.items()}


def test_norms_have_the_published_epsilons():
    """Weights of timm's layout run with the authors' numerics: timm leaves 1e-5 in the head of L."""
    for name, eps in (("b0", 1e-5), ("l1", 1e-7)):
        with torch.device("meta"):
            model = timm.create_model(f"efficientvit_mit_{name}")
        assert {m.eps for m in model.modules() if hasattr(m, "eps")} == {eps}
    assert EPS == 1e-15


def test_equals_timm_except_for_the_epsilon_of_attention():
    torch.manual_seed(0)
    theirs = timm.create_model("efficientvit_b0").double().eval()
    for module in theirs.modules():
        if type(module).__name__ == "LiteMLA":
            module.eps = 1e-15
    ours = timm.create_model("efficientvit_mit_b0").double().eval()
    ours.load_state_dict(convert(theirs.state_dict(), "efficientvit_mit_b0"))
    # timm's attention computes in float32 whatever the input
    with torch.no_grad():
        image = goldens.image([1, 3, 224, 224])
        torch.testing.assert_close(ours(image), theirs(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("card", costs_of(cards(f"{FAMILY}*")), ids=lambda card: card.name)
def test_cards_state_the_models_size_and_cost(card):
    assert_cost(card, rel=2e-3)


@pytest.mark.parametrize(
    "fixture",
    [  # every structure: B, L, and the segmentation heads of both
        "efficientvit_b0",
        "efficientvit_l1",
        "efficientvit_seg_b0_cityscapes_128x256",
        pytest.param("efficientvit_seg_l1_ade20k_128x256", marks=pytest.mark.exhaustive),  # the head is b0's, wider
    ],
)
def test_folding_does_not_change_the_outputs(fixture):
    model = published(fixture)
    folded = copy.deepcopy(model).fuse()
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    image = goldens.image([1, 3, 96, 131])
    with torch.no_grad():
        goldens.assert_close(folded(image), model(image))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_accurate_where_the_published_code_overflows(dtype):
    """Queries and keys a hundred times larger: the same function, whose sums pass float16's largest number."""
    model = published("efficientvit_b0")
    layers = [m for m in model.modules() if isinstance(m, MultiScaleLinearAttention)]
    sums = []

    def watch(module, args, output):
        heads = output.double().flatten(2).unflatten(1, (-1, 3, layers[0].head_dim)).relu()
        query, key = heads[:, :, 0], heads[:, :, 1]
        sums.append((query * key.sum(-1, keepdim=True)).sum(-2).max().item())

    layers[0].qkv.register_forward_hook(watch)
    image = image_of("efficientvit_b0")[:1]
    with torch.no_grad():
        expected = model(image)
        for layer in layers:
            layer.qkv.weight.unflatten(0, (-1, 3, layer.head_dim))[:, :2] *= 100
        got = model.to(dtype)(image.to(dtype)).double()
    assert sums[1] > 65504
    assert (got - expected).abs().max() < {torch.float16: 0.01, torch.bfloat16: 0.1}[dtype] * expected.std()


def test_variant_fields_can_be_overridden():
    model = timm.create_model("efficientvit_mit_b0", dims=(16, 32, 64, 96), head_widths=(64, 48), num_classes=5)
    assert model(torch.randn(2, 3, 40, 56)).shape == (2, 5)
    assert model.head_hidden_size == 48
    assert model.stages[3].blocks[1].attn.branch.qkv.out_channels == 3 * 96


def test_dense_form_drops_the_head():
    dense = timm.create_model("efficientvit_mit_b0", features_only=True)
    assert sum(p.numel() for p in dense.parameters()) == pytest.approx(0.683e6, rel=1e-3)  # the backbone alone
    assert not [k for k, _ in dense.named_parameters() if "head" in k]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="head_dim"):
        timm.create_model("efficientvit_mit_b0", head_dim=24)
    with pytest.raises(ValueError, match="pool_type"):
        timm.create_model("efficientvit_mit_b0", global_pool="")
    model = timm.create_model("efficientvit_mit_b0", num_classes=0, global_pool="")
    with pytest.raises(ValueError, match="pool_type must name a pooling where there are classes"):
        model.reset_classifier(3)
