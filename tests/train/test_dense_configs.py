"""Every detection and segmentation config: loads, builds, fits its backbone, and says what it must."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
from mmengine.registry import MODELS, DefaultScope

from hybridzoo.train.config import load_config
from hybridzoo.train.engine import prepare
from hybridzoo.train.names import list_configs

DENSE = {name: path for name, path in list_configs().items() if path.parent.name in ("detection", "segmentation")}
PUBLISHED = sorted(name for name in DENSE if "_biformer_" in name and not name.endswith("_digits"))


def test_the_published_recipes_and_the_demos_are_there():
    methods = ("mask-rcnn_biformer_{}_1x_coco", "retinanet_biformer_{}_1x_coco")
    methods += ("fpn_biformer_{}_80k_ade20k", "upernet_biformer_{}_160k_ade20k")
    expected = {method.format(size) for method in methods for size in ("small", "base")}
    assert expected | {"mask-rcnn_biformer_tiny_digits", "segformer_biformer_tiny_digits"} <= DENSE.keys()


@pytest.mark.parametrize("name", sorted(DENSE))
def test_builds_and_runs_to_its_heads(name):
    """Every layer meets the widths it was built for; one block a stage, for the time's sake."""
    config = load_config(name, ["model.backbone.depths=(1,1,1,1)"])
    assert config.task == DENSE[name].parent.name
    prepare(config)
    with DefaultScope.overwrite_default_scope(config.default_scope):
        model = MODELS.build(config.model).eval()
    with torch.no_grad():
        features = model.extract_feat(torch.zeros(2, 3, 128, 96))
        if config.task == "detection":
            assert {level.shape[1] for level in features} == {config.model.neck.out_channels}
            head = model.rpn_head if hasattr(model, "rpn_head") else model.bbox_head
            sizes = [(-(-128 // s), -(-96 // s)) for s, _ in head.prior_generator.strides]
            assert [tuple(level.shape[2:]) for level in head(features)[0]] == sizes
        else:
            classes = 11 if name.endswith("_digits") else 150
            assert model.decode_head(features).shape == (2, classes, 32, 24)
            if model.with_auxiliary_head:
                assert model.auxiliary_head(features).shape == (2, classes, 8, 6)


@pytest.mark.parametrize("name", sorted(DENSE))
def test_docstring_gives_command_time_and_score(name):
    text = DENSE[name].read_text()
    doc = text[: text.index('"""', 5)]
    command = re.search(r"^(?:hybridzoo|torchrun .* hybridzoo) train (\S+)", doc, re.MULTILINE)
    assert command is not None
    assert command[1] == name
    assert re.search(r"About \d+ (hours|minutes)", doc)
    assert re.search(r"mIoU|box AP", doc)
    assert name.endswith("_digits") or "estimate" in doc


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
