"""Every detection and segmentation config: loads, builds, fits its backbone, and says what it must."""

from __future__ import annotations

import re

import pytest
import timm
import torch

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
from mmengine.registry import MODELS, DefaultScope

from hybridzoo.checkpoints import cards
from hybridzoo.train.config import load_config
from hybridzoo.train.engine import prepare
from hybridzoo.train.names import recipes

DENSE = {name: recipe for name, recipe in recipes().items() if recipe.task != "classification"}
PUBLISHED = sorted(name for name in DENSE if "_biformer_" in name and not name.endswith("_digits"))


def test_the_recipes_of_publications_and_of_the_demo_exist():
    methods = ("mask-rcnn_biformer_{}_1x_coco", "retinanet_biformer_{}_1x_coco")
    methods += ("fpn_biformer_{}_80k_ade20k", "upernet_biformer_{}_160k_ade20k")
    expected = {method.format(size) for method in methods for size in ("small", "base")}
    assert expected | {"mask-rcnn_biformer_tiny_digits", "segformer_biformer_tiny_digits"} <= DENSE.keys()


# One run of every kind in every family, with the family's smallest network: they differ in sizes alone.
PARAMS = {card.model: card.params for card in cards()}
KINDS: dict[tuple, str] = {}
for name, recipe in sorted(DENSE.items(), key=lambda run: PARAMS.get(run[1].network, 0), reverse=True):
    KINDS[recipe.path, recipe.network.partition("_")[0]] = name


def kinds():
    """Every recipe and every family, in as few of their pairs as that takes; the other pairs in exhaustive runs."""
    usual: set[tuple] = set()
    for path in sorted({path for path, _ in KINDS}):  # each with the family that so far has the fewest recipes
        mine = sorted(family for other, family in KINDS if other == path)
        usual.add((path, min(mine, key=[family for _, family in usual].count)))
    missing = {family for _, family in KINDS} - {family for _, family in usual}
    usual |= {min(kind for kind in KINDS if kind[1] == family) for family in missing}
    for kind, name in sorted(KINDS.items(), key=lambda kind: kind[1]):
        yield pytest.param(name, marks=[] if kind in usual else pytest.mark.exhaustive)


@pytest.mark.parametrize("name", [*kinds()])
def test_heads_have_the_widths_of_the_network(name):
    """On the meta device, which computes shapes alone."""
    config = load_config(name)
    prepare(config)
    with DefaultScope.overwrite_default_scope(config.default_scope), torch.device("meta"):
        model = MODELS.build(config.model).eval()
    with torch.no_grad():
        features = model.extract_feat(torch.empty(2, 3, 128, 96, device="meta"))
    head = model.decode_head if config.task == "segmentation" else None
    if head is None:
        assert {level.shape[1] for level in features} == {config.model.neck.out_channels}
        head = model.rpn_head if hasattr(model, "rpn_head") else model.bbox_head
        if hasattr(head, "prior_generator"):
            sizes = [(-(-128 // s), -(-96 // s)) for s, _ in head.prior_generator.strides]
            assert [tuple(level.shape[2:]) for level in features] == sizes
    elif hasattr(head, "conv_seg") and name != "mask2former":
        classes = 11 if name.endswith("_digits") else 150
        assert head(features).shape == (2, classes, 32, 24)
        if model.with_auxiliary_head:
            assert model.auxiliary_head(features).shape[:2] == (2, classes)


@pytest.mark.parametrize("name", sorted(name for name in DENSE if recipes()[name].published))
def test_published_rows_give_score_and_weights(name):
    recipe = recipes()[name]
    known = re.search(r"mIoU|(box|mask) AP", recipe.score) and recipe.source
    assert known or "no score" in recipe.note
    assert not recipe.weights or timm.is_model(recipe.weights.partition(".")[0])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipe(name):
    """The table of the paper's repository: regions, drop path, optimiser, length, batch of one GPU."""
    method, _, size, *_ = name.split("_")
    regions, small, base, lr, decay, batch = {
        "mask-rcnn": (16, 0.2, 0.3, 1e-4, 0.05, 2),
        "retinanet": (16, 0.2, 0.3, 1e-4, 1e-4, 2),
        "fpn": (8, 0.15, 0.3, 2e-4, 1e-4, 4),
        "upernet": (8, 0.3, 0.4, 6e-5, 0.01, 2),
    }[method]
    config = load_config(name)
    backbone, optimizer = config.model.backbone, config.optim_wrapper.optimizer
    assert backbone.name == f"biformer_{size}"
    assert (backbone.regions, backbone.drop_path_rate) == (regions, {"small": small, "base": base}[size])
    assert backbone.out_norm == "LN"
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ("AdamW", lr, decay)
    undecayed = config.optim_wrapper.get("paramwise_cfg") == {"custom_keys": {"norm": {"decay_mult": 0.0}}}
    assert undecayed is (method in ("mask-rcnn", "upernet"))
    assert config.train_dataloader.batch_size == batch
    assert config.amp_dtype == "float16"
    if config.task == "detection":
        assert config.train_cfg.max_epochs == 12
        assert config.param_scheduler[0].end == 500
        assert config.param_scheduler[1].milestones == [8, 11]
        assert backbone.norm_eval is True
    else:
        assert config.train_cfg.max_iters == {"fpn": 80_000, "upernet": 160_000}[method]
        assert config.param_scheduler[1].begin == {"fpn": 1000, "upernet": 1500}[method]
        assert config.param_scheduler[-1].end == config.train_cfg.max_iters
        assert config.sync_bn == "torch"
        assert not backbone.get("norm_eval", False)
