"""The recipes of NAT, DiNAT, DiNAT_s and the isotropic nets are the published ones."""

from __future__ import annotations

import pytest

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
import timm
import torch

import hybridzoo  # noqa: F401  (registers the models)
from hybridzoo.train.config import load_config
from hybridzoo.train.names import list_configs

FINE_TUNED = {name for name in list_configs() if "dinat_" in name and "_in22k_ft_in1k" in name}
OURS = {name for name in list_configs() if "nat_" in name or name.startswith("vitrpb_")} - FINE_TUNED
OURS -= {"mask2former_dinat_large_160k_ade20k"}
ISOTROPIC = ("nat_isotropic", "dinat_isotropic", "vitrpb")
DROP_PATH = {  # method: by size, or by model where it differs from NAT's and DiNAT's of that size
    "classification": dict(mini=0.2, tiny=0.2, small=0.3, base=0.5)
    | {f"{net}_small": 0.1 for net in ISOTROPIC}
    | {f"{net}_base": 0.4 for net in ISOTROPIC},
    "mask-rcnn": dict(mini=0.2, tiny=0.2, small=0.35),
    "cascade-mask-rcnn": dict(mini=0.2, tiny=0.3, nat_small=0.3, nat_base=0.5, small=0.5, base=0.6, large=0.6),
    "upernet": dict(mini=0.2, tiny=0.3, small=0.5, base=0.5, large=0.3, dinat_s_small=0.3, dinat_s_base=0.3),
}


def split(name: str) -> tuple[str, str]:
    """Method and model of a config's name."""
    method, _, rest = name.partition("_")
    if method not in DROP_PATH:
        return "classification", name.removesuffix("_300e_in1k")
    return method, rest.removesuffix("_3x_coco").removesuffix("_160k_ade20k")


def test_every_published_recipe_exists():
    pyramids = {f"{net}_{size}" for net in ("nat", "dinat") for size in ("mini", "tiny", "small", "base")}
    pyramids |= {f"dinat_s_{size}" for size in ("tiny", "small", "base")}
    large = {"dinat_large", "dinat_s_large"}
    isotropic = {f"{net}_{size}" for net in ISOTROPIC for size in ("small", "base")}
    found: dict[str, set] = {}
    for name in OURS:
        method, model = split(name)
        found.setdefault(method, set()).add(model)
    assert found == {
        "classification": pyramids | isotropic,
        "mask-rcnn": {model for model in pyramids if not model.endswith("base")},
        "cascade-mask-rcnn": pyramids | large,
        "upernet": pyramids | large,
    }


@pytest.mark.parametrize("name", sorted(OURS))
def test_published_recipe(name):
    method, model = split(name)
    config = load_config(name)
    net = config.model if method == "classification" else config.model.backbone
    size = model.rpartition("_")[2]
    assert net.name == model
    assert net.drop_path_rate == DROP_PATH[method].get(model, DROP_PATH[method].get(size))
    optimizer = config.optim_wrapper.optimizer
    assert optimizer.type == "AdamW"
    assert (config.amp_dtype == "float16") is (model != "dinat_large")
    if method == "classification":
        assert (optimizer.lr, optimizer.weight_decay, config.optim_wrapper.clip_grad.max_norm) == (1e-3, 0.05, 5.0)
        wide = model in ("nat_isotropic_base", "dinat_isotropic_base", "vitrpb_base")
        assert [schedule.end for schedule in config.param_scheduler] == [50 if wide else 20, 300]
        assert config.param_scheduler[1].eta_min_ratio * optimizer.lr == pytest.approx(5e-6)
        assert [hook.decay for hook in config.get("custom_hooks", [])] == ([0.9998] if wide else [])
        assert config.train_dataloader.dataset.transform.interpolation == "random"
        return
    undecayed = {key for key, rule in config.optim_wrapper.paramwise_cfg.custom_keys.items() if rule.decay_mult == 0}
    assert undecayed == {"norm", "rpb"}
    task = {"upernet": "ade20k_640" if size == "large" else "ade20k_512"}.get(method, "coco")
    assert net.get("dilations") == (None if model.startswith("nat") else task)
    with torch.device("meta"):
        channels = [level["num_chs"] for level in timm.create_model(model, depths=(1,) * 4).feature_info]
    if method == "upernet":
        assert (optimizer.lr, optimizer.weight_decay) == (6e-5, 0.01)
        assert config.train_cfg.max_iters == config.param_scheduler[-1].end == 160_000
        crop = (640, 640) if size == "large" else (512, 512)
        assert tuple(config.model.data_preprocessor.size) == crop
        (cut,) = [step for step in config.train_dataloader.dataset.pipeline if step.type == "RandomCrop"]
        assert tuple(cut.crop_size) == crop
        assert list(config.model.decode_head.in_channels) == channels
        assert config.model.auxiliary_head.in_channels == channels[2]
        return
    rates = {"dinat_base": 7.5e-5, "dinat_large": 7.5e-5, "dinat_s_base": 7.5e-5, "dinat_s_large": 5e-5}
    assert (optimizer.lr, optimizer.weight_decay) == (rates.get(model, 1e-4), 0.05)
    assert (config.train_cfg.max_epochs, list(config.param_scheduler[1].milestones)) == (36, [27, 33])
    assert config.param_scheduler[0].end == 500
    assert list(config.model.neck.in_channels) == channels
    (choice,) = [step for step in config.train_dataloader.dataset.pipeline if step.type == "RandomChoice"]
    assert [scale[0] for scale in choice.transforms[0][0].scales] == list(range(480, 801, 32))
    assert len(choice.transforms[1]) == 3
    assert config.train_dataloader.batch_size == 2


def test_fine_tuning_from_22k():
    sizes = {}
    for name in FINE_TUNED:
        config = load_config(name)
        size = config.train_dataloader.dataset.transform.input_size
        assert size == config.val_dataloader.dataset.transform.input_size
        assert config.model.mixup is None
        assert config.model.drop_path_rate == 0.35
        assert config.train_dataloader.batch_size == 64
        (schedule,) = config.param_scheduler
        assert (schedule.start_factor, schedule.end_factor, schedule.end) == (1.0, 0.0, config.train_cfg.max_epochs)
        assert (config.optim_wrapper.optimizer.lr, schedule.end) == (5e-5, 30)
        with torch.device("meta"):
            net = {k: v for k, v in config.model.items() if k in ("kernel_size", "dilations")}
            model = timm.create_model(config.model.name, **net)
        kernel, _ = model.stages[0].blocks[0].attn.kernel_size
        sizes[config.model.name, size, kernel] = config.optim_wrapper.optimizer.weight_decay
    assert sizes == {
        ("dinat_large", 224, 7): 1e-4, ("dinat_large", 384, 7): 1e-10, ("dinat_large", 384, 11): 1e-10,
        ("dinat_s_large", 224, 7): 1e-4, ("dinat_s_large", 384, 7): 1e-5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("mask-rcnn_nat_mini_3x_coco", 40),
        ("mask-rcnn_dinat_s_tiny_3x_coco", 48),
        ("cascade-mask-rcnn_nat_mini_3x_coco", 77),
        ("cascade-mask-rcnn_dinat_s_tiny_3x_coco", 86),
    ],
)
def test_detectors_have_the_published_number_of_parameters(name, millions):
    """Which says that necks and heads are the authors'."""
    from mmengine.registry import MODELS, DefaultScope

    from hybridzoo.train.engine import prepare

    config = load_config(name)
    prepare(config)
    with DefaultScope.overwrite_default_scope(config.default_scope), torch.device("meta"):
        model = MODELS.build(config.model)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.75)
