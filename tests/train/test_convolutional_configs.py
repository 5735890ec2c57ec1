"""The recipes of EfficientViT (MSRA) and PartialNet are the published ones, as far as the engine goes."""

from __future__ import annotations

import pytest
import timm
import torch

import hybridzoo  # noqa: F401  (registers the models)
from hybridzoo.train.config import load_config
from hybridzoo.train.names import list_configs

OURS = [name for name in list_configs() if name.startswith(("efficientvit_msra_", "partialnet_"))]
PARTIALNET = {  # drop path, weight decay, mixup, RandAugment's magnitude, largest gradient norm
    "t0": (0.0, 0.005, 0.05, None, None),
    "t1": (0.02, 0.01, 0.1, 3, None),
    "t2": (0.05, 0.02, 0.1, 5, None),
    "s": (0.1, 0.03, 0.3, 7, None),
    "m": (0.2, 0.05, 0.5, 7, 1.0),
    "l": (0.3, 0.05, 0.7, 7, 0.01),
}


def test_every_published_recipe_exists():
    sizes = {f"efficientvit_msra_m{i}" for i in range(6)} | {f"partialnet_{size}" for size in PARTIALNET}
    assert set(OURS) == {f"{name}_300e_in1k" for name in sizes}


@pytest.mark.parametrize("name", OURS)
def test_published_recipe(name):
    config = load_config(name)
    model = name.removesuffix("_300e_in1k")
    assert config.model.name == model
    assert config.task == "classification"
    assert config.train_cfg.max_epochs == config.param_scheduler[1].end == 300
    optimizer, (warmup, cosine) = config.optim_wrapper.optimizer, config.param_scheduler
    assert warmup.start_factor * optimizer.lr == pytest.approx(1e-6)
    assert cosine.eta_min == 1e-5
    assert "eta_min_ratio" not in cosine
    transform, size = config.train_dataloader.dataset.transform, model.rpartition("_")[2]
    if "msra" in model:
        assert (optimizer.lr, optimizer.weight_decay, warmup.end) == (4e-3, 0.025, 5)
        assert config.train_dataloader.batch_size == 256
        assert config.train_dataloader.sampler.type == "RepeatAugSampler"
        assert [(hook.decay, hook.evaluate) for hook in config.custom_hooks] == [(0.99996, "raw")]
        assert (transform.auto_augment, transform.re_prob) == ("rand-m9-mstd0.5-inc1", 0.25)
        assert config.model.mixup.mixup_alpha == 0.8
        return
    drop_path, decay, mixup, magnitude, norm = PARTIALNET[size]
    net = config.model
    assert (net.drop_path_rate, optimizer.weight_decay, net.mixup.mixup_alpha) == (drop_path, decay, mixup)
    assert (net.attn_drop_rate, net.proj_drop_rate) == (0.1, 0.1)
    assert (net.mixup.cutmix_alpha, net.mixup.switch_prob, net.label_smoothing) == (1.0, 0.5, 0.1)
    augmentation = None if magnitude is None else f"rand-m{magnitude}-mstd0.5-inc1"
    assert (transform.auto_augment, transform.input_size, transform.re_prob) == (augmentation, 192, 0.0)
    assert config.val_dataloader.dataset.transform.crop_pct == 0.9
    assert config.optim_wrapper.get("clip_grad", {}).get("max_norm") == norm
    # learning rates are for global batches of 4096 and 2048, on eight devices
    assert optimizer.lr / (8 * config.train_dataloader.batch_size) == pytest.approx(4e-3 / 4096)
    assert (warmup.end, config.amp_dtype) == (20, "float16")
    assert config.optim_wrapper.paramwise_cfg.decay_1d


@pytest.mark.parametrize("name", OURS)
def test_the_model_takes_the_recipes_arguments(name):
    config = load_config(name).model
    options = {k: v for k, v in config.items() if k not in ("type", "name", "mixup", "label_smoothing")}
    with torch.device("meta"):
        model = timm.create_model(config.name, **options)
    if "partialnet" in name:
        mixer = model.stages[-1].blocks[0].mixer
        assert (mixer.attn_drop, mixer.proj_drop.p) == (0.1, 0.1)
        rates = [block.drop_path.drop_prob or 0.0 for stage in model.stages for block in stage.blocks]
        assert max(rates) == pytest.approx(config.drop_path_rate)
