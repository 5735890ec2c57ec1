"""Any network with any recipe in one line: values that follow from the network, the data and the machine."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import pytest
import timm
import torch

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
import numpy as np
import photographs
from mmengine import Config
from mmengine.registry import DATASETS, MODELS, DefaultScope
from mmengine.runner import Runner as MMRunner
from PIL import Image

from hybridzoo import checkpoints
from hybridzoo.__main__ import main
from hybridzoo.train import published, raw, settle
from hybridzoo.train.config import load_config
from hybridzoo.train.engine import build_for_inference, prepare
from hybridzoo.train.errors import UserError
from hybridzoo.train.export import exporting
from hybridzoo.train.export.formats import FORMATS
from hybridzoo.train.facts import read_network
from hybridzoo.train.names import EVERYDAY, recipes
from hybridzoo.train.predict import predict

DENSE = [name for name, task in EVERYDAY.items() if task != "classification"]
# Four levels; a stem level before them; three coarse stages; one stride.
NETWORKS = ("test_convnext", "test_resnet", "efficientvit_msra_m0", "test_vit")


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    return photographs.scenes(tmp_path_factory.mktemp("scenes"), side=96, count=4)


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    return photographs.image_folder(tmp_path_factory.mktemp("photographs"), side=48, count=4)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def dense_model(config, device="meta"):
    prepare(config)
    with DefaultScope.overwrite_default_scope(config.default_scope), torch.device(device):
        return MODELS.build(config.model).eval()


# Every recipe with the usual levels, every kind of network with one recipe a neck; the other pairs in `make test-all`.
PAIRS = [
    (recipe, network)
    if network == NETWORKS[0] or recipe in ("mask-rcnn", "retinanet", "upernet")
    else pytest.param(recipe, network, marks=pytest.mark.exhaustive)
    for recipe in DENSE
    for network in NETWORKS
]


@pytest.mark.parametrize(("recipe", "network"), PAIRS)
def test_any_network_fits_any_dense_recipe(recipe, network):
    config = load_config(recipe, model=network)
    device = "cpu" if recipe == "mask2former" else "meta"  # its pixel decoder reads numbers out of tensors
    model = dense_model(config, device)
    with torch.no_grad():
        features = model.extract_feat(torch.zeros(2, 3, 96, 128, device=device))
    if config.task == "detection":
        head = getattr(model, "rpn_head", model.bbox_head if hasattr(model, "bbox_head") else None)
        if hasattr(head, "prior_generator"):
            sizes = [(-(-96 // s), -(-128 // s)) for s, _ in head.prior_generator.strides]
            assert [tuple(level.shape[2:]) for level in features] == sizes
        assert {level.shape[1] for level in features} == {256}
    elif recipe != "mask2former":
        assert model.decode_head(features).shape == (2, 150, 24, 32)
    else:
        mask_features, _ = model.decode_head.pixel_decoder(features)
        assert mask_features.shape == (2, 256, 24, 32)


def test_a_three_stage_network_has_its_published_neck():
    for recipe, finer, coarser in (("mask-rcnn", 2, 0), ("retinanet", 1, 1)):
        for network in ("efficientvit_msra_m4", "shvit_s4"):
            neck = load_config(recipe, model=network).model.neck
            assert (neck.type, neck.finer, neck.coarser) == ("FinerFPN", finer, coarser)
            assert list(neck.in_channels) == [width for width, _ in read_network(network).levels]


def test_the_neck_adds_missing_strides():
    from hybridzoo.train.necks import FinerFPN

    maps = [torch.randn(1, width, side, side + 1) for width, side in ((8, 10), (12, 5), (16, 3))]
    neck = FinerFPN([8, 12, 16], out_channels=4, finer=2, coarser=1)
    sides = [tuple(level.shape[1:]) for level in neck(maps)]
    assert sides == [(4, 40, 44), (4, 20, 22), (4, 10, 11), (4, 5, 6), (4, 3, 4), (4, 2, 2)]
    sum(level.sum() for level in neck(maps)).backward()
    assert all(parameter.grad is not None for parameter in neck.parameters())
    with pytest.raises(UserError, match="got 2 maps"):
        neck(maps[:2])


def test_every_published_run_starts_from_weights_that_are_published():
    named = [recipe for recipe in recipes().values() if recipe.weights]
    assert len(named) > 60
    for recipe in named:
        model, _, tag = recipe.weights.partition(".")
        own = [card.tag for card in checkpoints.cards(model, task=None) if card.model == model and card.url]
        assert tag in own or (not own and timm.get_pretrained_cfg(recipe.weights).has_weights), recipe.name
    assert load_config(named[0].name).start == named[0].weights


def test_a_networks_name_fine_tunes_it():
    config = load_config("maxvit_tiny")
    assert config.model.name == "maxvit_tiny"
    assert config.filename == "finetune_maxvit_tiny.py"
    assert load_config("finetune", model="maxvit_tiny").to_dict() == config.to_dict()


def test_the_input_follows_from_the_network():
    config = load_config("vit_tiny_patch16_224")
    cfg = timm.get_pretrained_cfg("vit_tiny_patch16_224")
    for loader in (config.train_dataloader, config.val_dataloader):
        assert tuple(loader.dataset.transform.mean) == cfg.mean
        assert loader.dataset.transform.input_size == 224
    assert config.val_dataloader.dataset.transform.crop_pct == cfg.crop_pct
    small = load_config("vit_tiny_patch16_224", img_size=64)
    assert small.val_dataloader.dataset.transform.input_size == 64
    model = timm.create_model(small.model.name, img_size=small.model.img_size)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


@pytest.mark.parametrize(
    ("network", "argument"), [("biformer_tiny", "regions"), ("dinat_mini", "dilations"), ("nat_mini", "dilations")]
)
def test_arguments_of_a_network_follow_from_the_image_size(network, argument):
    wanted = None if network == "nat_mini" else "auto"
    assert load_config(network).model.get(argument) is None
    assert load_config(network, img_size=96).model.get(argument) == wanted
    assert load_config("upernet", model=network).model.backbone.get(argument) == wanted
    published = {"regions": 8, "dilations": "ade20k_512"}[argument]
    config = load_config("upernet", [f"model.backbone.{argument}={published}"], model=network)
    assert config.model.backbone[argument] == published


@pytest.mark.parametrize("network", ["dinat_mini", "maxvit_tiny", "test_vit", "shvit_s1"])
def test_the_stem_learns_at_a_tenth_whatever_the_depth(network):
    found = read_network(network)
    assert found.layer_decay**found.depth == pytest.approx(0.1, rel=0.01)


def test_arguments_that_a_network_does_not_have_are_left_out():
    assert "drop_path_rate" in load_config("finetune", model="test_convnext").model
    assert "drop_path_rate" not in load_config("finetune", model="shvit_s1").model


def test_short_options():
    options = {"epochs": 40, "batch_size": 6, "lr": 3e-4, "img_size": 320, "freeze": 2, "workers": 3}
    config = load_config("mask-rcnn", model="test_convnext", **options)
    warmup, cosine = config.param_scheduler
    assert (config.train_cfg.max_epochs, warmup.end, cosine.begin, cosine.end) == (40, 2, 2, 40)
    assert (config.train_dataloader.batch_size, config.optim_wrapper.optimizer.lr) == (6, 3e-4)
    assert config.model.backbone.frozen_stages == 2
    assert config.train_dataloader.num_workers == config.val_dataloader.num_workers == 3
    pipelines = (config.train_dataloader.dataset.pipeline, config.test_pipeline)
    sizes = [step[key] for steps in pipelines for step in steps for key in ("scale", "crop_size") if key in step]
    assert sizes
    assert all(tuple(size) == (320, 320) for size in sizes)
    segmentor = load_config("upernet", img_size=256)
    assert tuple(segmentor.model.data_preprocessor.size) == (256, 256)
    published_run = load_config("mask-rcnn_nat_mini_3x_coco", epochs=12)
    assert list(published_run.param_scheduler[1].milestones) == [9, 11]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"epochs": 0}, "--epochs 0"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"lr": 0.0}, "--lr 0"),
        ({"img_size": 8}, "--img-size 8"),
        ({"freeze": -1}, "--freeze -1"),
        ({"workers": -1}, "--workers -1"),
        ({"model": "convnext_tinny"}, "convnext_tiny"),
    ],
)
def test_bad_short_options(options, complaint):
    with pytest.raises(UserError, match=complaint):
        load_config("finetune", **options)


def test_iterations_have_no_epochs():
    with pytest.raises(UserError, match=r"counts iterations.*max_iters"):
        load_config("upernet_dinat_mini_160k_ade20k", epochs=3)


def test_options_override_values_that_follow_from_the_network():
    options = ["model.neck.in_channels=[1,2,3,4]", "optim_wrapper.paramwise_cfg.layer_decay=0.5"]
    config = load_config("mask-rcnn", options, model="test_convnext")
    assert list(config.model.neck.in_channels) == [1, 2, 3, 4]
    assert config.optim_wrapper.paramwise_cfg.layer_decay == 0.5


def test_values_that_follow_from_the_number_of_images():
    def settled(images, *, started=True, **options):
        config = load_config("finetune", model="test_convnext", **options)
        settle.fit_data(config, images, started=started)
        assert "settle" not in config
        return config

    few, many = settled(50), settled(50_000)
    assert (few.train_dataloader.batch_size, few.train_cfg.max_epochs) == (12, 100)
    assert (many.train_dataloader.batch_size, many.train_cfg.max_epochs) == (32, 10)
    assert "custom_hooks" not in few
    assert many.custom_hooks[0].type == "TimmEMAHook"
    for config in (few, many):
        warmup, cosine = config.param_scheduler
        assert warmup.end == cosine.begin == pytest.approx(config.train_cfg.max_epochs / 20)
    scratch = settled(1000, started=False)
    assert "layer_decay" not in scratch.optim_wrapper.paramwise_cfg
    assert scratch.train_cfg.max_epochs > settled(1000).train_cfg.max_epochs
    own = settled(50, epochs=3, batch_size=7, lr=1e-5)
    assert (own.train_cfg.max_epochs, own.train_dataloader.batch_size) == (3, 7)
    assert own.optim_wrapper.optimizer.lr == 1e-5
    assert settled(4, epochs=1).param_scheduler == []
    for epochs in (5, 6, 9):  # of four iterations: mmengine's warm-up of a single one would never end
        warmup, cosine = settled(32, epochs=epochs, batch_size=8).param_scheduler
        assert int(warmup.end * 4) == int(cosine.begin * 4) == 2


def test_freeze_does_not_train_the_stages_of_a_classifier():
    from hybridzoo.train.classification import ImageClassifier

    model = ImageClassifier("test_convnext", num_classes=3, frozen_stages=1).train()
    learning = {
        name.split(".")[1] for name, p in model.model.named_parameters() if p.requires_grad and "stages" in name
    }
    assert learning == {"1", "2", "3"}
    assert not model.model.stem.training
    with pytest.raises(UserError, match="freeze 9"):
        ImageClassifier("test_convnext", frozen_stages=9)


# Weights --------------------------------------------------------------------------------------------------------------


def test_unavailable_weights_are_one_line(capsys):
    config = load_config("finetune", model="dinat_mini")
    assert settle.starting_weights(config, None) is None
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("from scratch: no weights of dinat_mini here (")
    assert line.endswith("; give --weights FILE")
    assert settle.starting_weights(config, "none") is None
    assert capsys.readouterr().out == ""


def test_weights_of_a_timm_model_are_requested(monkeypatch):
    config = load_config("finetune", model="test_convnext")
    with pytest.raises(UserError, match=r"weights resnet50.a1_in1k: cannot be downloaded here \("):
        settle.starting_weights(config, "resnet50.a1_in1k")
    monkeypatch.setattr(published, "weights_of", lambda name: Path(f"{name}.safetensors"))
    assert settle.starting_weights(config, "test_convnext.r160_in1k") == Path("test_convnext.r160_in1k.safetensors")


def test_timms_weights_are_downloaded_once_and_fit(tmp_path, monkeypatch):
    """A repository of the hub in the cache, as timm would leave it there."""
    from safetensors.torch import save_file

    name = "test_convnext.r160_in1k"
    file = tmp_path / "model.safetensors"
    save_file(timm.create_model(name).state_dict(), file)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: str(file))
    found = published.weights_of("test_convnext")
    assert found.is_file()
    file.unlink()
    assert published.weights_of("test_convnext") == found  # kept
    with pytest.raises(published.Unavailable, match="none are published"):
        published.weights_of("ascan_tiny")


# Whole runs, and what they leave to the entry points of mmengine, mmdet and mmseg -------------------------------------


def run(*words: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main([str(word) for word in words]) == 0


TINY = ("--epochs", 1, "--workers", 0, "--no-wandb", "--device", "cpu")


@pytest.fixture(scope="module")
def detector(scenes, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("detector")
    run("train", "retinanet", "--model", "test_convnext", "--data", scenes, "--img-size", 96, "--batch-size", 2, *TINY,
        "--work-dir", folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def segmentor(scenes, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("segmentor")
    run("train", "segformer", "--model", "test_resnet", "--data", scenes, "--img-size", 96, "--batch-size", 2, *TINY,
        "--work-dir", folder)  # fmt: skip
    return folder


def saved_config(folder: Path) -> str:
    (file,) = folder.glob("*.py")
    return str(file)


@pytest.mark.parametrize("kind", ["detector", "segmentor"])
def test_a_finished_dense_run_can_be_exported(request, tmp_path, kind):
    """From its folder: the trained weights, with the classes and the size of the run."""
    folder, out = request.getfixturevalue(kind), tmp_path / "network.torchscript"
    run("export", folder, "--to", "torchscript", "--static", "--out", out)
    model = build_for_inference(None, folder, "cpu")
    facts = exporting.read_metadata(out)
    assert tuple(facts["classes"]) == tuple(model.dataset_meta["classes"])
    height, width = facts["input"]["size"]
    image = torch.randn(2, 3, height, width)
    found = FORMATS["torchscript"].open(out)(image)
    with torch.no_grad():
        if kind == "segmentor":
            expected = model.encode_decode(image, [{"img_shape": (height, width)}])
        else:
            assert found[0].shape == (2, found[1].shape[1], 4)
            scores = model.bbox_head(model.extract_feat(image))[0]
            by_anchor = [s.permute(0, 2, 3, 1).reshape(2, -1, len(facts["classes"])) for s in scores]
            expected = torch.cat(by_anchor, 1).sigmoid()
    torch.testing.assert_close(found[-1], expected, rtol=1e-4, atol=1e-4)


def test_a_classifier_in_one_line(images, tmp_path, capsys):
    run("train", "test_convnext", "--data", images, "--img-size", 48, "--freeze", 1, *TINY, "--work-dir", tmp_path)
    assert "from scratch: no weights of test_convnext here" in capsys.readouterr().out
    config = Config.fromfile(saved_config(tmp_path))
    assert config.model.num_classes == 4
    assert config.train_cfg.max_epochs == 1
    assert "settle" not in config
    assert (tmp_path / "final.pth").is_file()


@pytest.fixture(scope="module")
def tiny_pictures(tmp_path_factory) -> Path:
    """Pictures of 20 x 20 pixels for the three tasks: a bright square of one class before a dark ground."""
    root = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        images, objects = [], []
        for index in range(count):
            x, y = rng.integers(2, 8, 2).tolist()
            pixels = rng.integers(0, 90, (20, 20, 3)).astype(np.uint8)
            mask = np.zeros((20, 20), np.uint8)
            mask[y : y + 9, x : x + 8] = 1
            pixels[mask == 1] += 120
            for folder, picture in (
                (f"images/{split}", pixels),
                (f"masks/{split}", mask),
                (f"kinds/{split}/square", pixels),
                (f"kinds/{split}/dark", pixels // 3),
            ):
                (root / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(root / folder / f"{index}.png")
            images.append({"id": index, "file_name": f"{index}.png", "width": 20, "height": 20})
            objects.append({"id": index + 1, "image_id": index, "category_id": 1, "bbox": [x, y, 8, 9]})
        (root / "annotations").mkdir(exist_ok=True)
        content = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "square"}]}
        (root / f"annotations/{split}.json").write_text(json.dumps(content))
    (root / "classes.txt").write_text("ground\nsquare\n")
    return root


@pytest.mark.parametrize(
    ("recipe", "network"), [("finetune", "test_vit"), ("retinanet", "test_vit"), ("segformer", "test_vit")]
)
def test_pictures_of_20_pixels_are_enlarged(recipe, network, tiny_pictures, tmp_path):
    data = tiny_pictures / "kinds" if recipe == "finetune" else tiny_pictures
    run("train", recipe, "--model", network, "--data", data, "--img-size", 64, "--batch-size", 2, *TINY,
        "--weights", "none", "--work-dir", tmp_path)  # fmt: skip
    config = load_config(saved_config(tmp_path))
    with DefaultScope.overwrite_default_scope(config.default_scope):
        sample = DATASETS.build(config.val_dataloader.dataset)[0]
    inputs = sample[0] if recipe == "finetune" else sample["inputs"]
    assert tuple(inputs.shape) == (3, 64, 64)
    picture = next((tiny_pictures / "images/val").iterdir())
    found = predict(config, tmp_path / "final.pth", picture, tmp_path / "drawn", score=0.0, device="cpu")
    with Image.open(found[0].drawn) as drawn:
        assert min(drawn.size) >= 20
    if recipe == "retinanet":
        assert (
            not len(found[0].boxes) or 0 <= found[0].boxes.min() <= found[0].boxes.max() <= 20
        )  # the picture's pixels
    else:
        assert sum(found[0].scores) == pytest.approx(1, abs=1e-4)


def test_an_everyday_run_resumes_with_its_settings(images, tmp_path, capsys):
    line = ("train", "test_convnext", "--data", images, "--img-size", 48, *TINY, "--work-dir", tmp_path)
    run(*line)
    capsys.readouterr()
    run(*line, "--resume")
    printed = capsys.readouterr().out
    assert "resuming from" in printed
    assert "from scratch" not in printed  # nothing is asked of the network a second time
    assert "layer_decay" not in Config.fromfile(saved_config(tmp_path)).optim_wrapper.paramwise_cfg


def test_mmdets_entry_points_accept_a_run(detector, scenes, tmp_path):
    from mmdet.apis import DetInferencer, inference_detector, init_detector

    picture = str(next((scenes / "images/val").iterdir()))
    model = init_detector(saved_config(detector), str(detector / "final.pth"), device="cpu")
    assert model.dataset_meta["classes"] == photographs.COINS
    assert hasattr(inference_detector(model, picture), "pred_instances")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inferencer = DetInferencer(
            saved_config(detector), str(detector / "final.pth"), device="cpu", show_progress=False
        )
        found = inferencer(picture, out_dir=str(tmp_path), no_save_pred=False)
    assert set(found["predictions"][0]) >= {"bboxes", "labels", "scores"}
    assert list((tmp_path / "vis").iterdir())


def test_mmsegs_entry_points_accept_a_run(segmentor, scenes, tmp_path):
    from mmseg.apis import MMSegInferencer, inference_model, init_model

    picture = str(next((scenes / "images/val").iterdir()))
    model = init_model(saved_config(segmentor), str(segmentor / "final.pth"), device="cpu")
    assert inference_model(model, picture).pred_sem_seg.data.shape == (1, 96, 96)
    inferencer = MMSegInferencer(saved_config(segmentor), str(segmentor / "final.pth"), device="cpu")
    inferencer(picture, out_dir=str(tmp_path))
    assert list((tmp_path / "vis").iterdir())


@pytest.mark.parametrize("kind", ["detector", "segmentor"])
def test_mmengines_runner_trains_the_config_of_a_run(kind, request, tmp_path):
    config = Config.fromfile(saved_config(request.getfixturevalue(kind)))
    config.work_dir = str(tmp_path)
    runner = MMRunner.from_cfg(config)
    runner.train()
    assert list(tmp_path.glob("epoch_1.pth"))
    logging.getLogger().handlers.clear()


# Configs of one's own -------------------------------------------------------------------------------------------------


def test_a_users_config_of_two_lines(scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(f'_base_ = "hybridzoo::mask-rcnn"\ndata_root = {str(scenes)!r}\n')
    config = Config.fromfile("mine.py")
    assert config.model.type == "MaskRCNN"
    assert list(config.model.neck.in_channels) == [64, 128, 256, 512]
    composed = load_config("mine.py", model="test_resnet", epochs=2)
    assert composed.data_root == str(scenes)
    assert list(composed.model.neck.in_channels) == [width for width, stride in read_network("test_resnet").levels[1:]]


def test_another_network_in_a_config_that_mmengine_reads(tmp_path):
    """Its widths, layer decay and input follow as `load_config` has them, without which mmdet could not build it."""
    for recipe, name in (("mask-rcnn", "efficientvit_msra_m0"), ("upernet", "test_vit"), ("finetune", "test_vit")):
        place = "name={!r}" if recipe == "finetune" else "backbone=dict(name={!r})"
        file = tmp_path / f"{recipe}.py"
        file.write_text(f'_base_ = "hybridzoo::{recipe}"\nmodel = dict({place.format(name)})\n')
        read, composed = Config.fromfile(file), load_config(file)
        for key in ("model", "optim_wrapper", "train_dataloader", "val_dataloader"):
            assert read[key].to_dict() == composed[key].to_dict()


def test_mmdets_and_mmsegs_entry_points_accept_a_users_config(scenes, tmp_path):
    from mmdet.apis import inference_detector, init_detector
    from mmseg.apis import inference_model, init_model

    picture = str(next((scenes / "images/val").iterdir()))
    for recipe, make, infer in (
        ("retinanet", init_detector, inference_detector),
        ("segformer", init_model, inference_model),
    ):
        file = tmp_path / f"{recipe}.py"
        file.write_text(
            f'_base_ = "hybridzoo::{recipe}"\nmodel = dict(backbone=dict(name="test_resnet", drop_path_rate=None))\n'
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = make(str(file), device="cpu")
            assert infer(model, picture).img_path == picture
        assert model.backbone.name == "test_resnet"
    config = Config.fromfile(file)
    config.work_dir = str(tmp_path)
    assert MMRunner.from_cfg(config).model.backbone.name == "test_resnet"
    logging.getLogger().handlers.clear()


@pytest.mark.parametrize("recipe", ["mask-rcnn_nat_mini_3x_coco", "upernet_nat_tiny_160k_ade20k", "mask-rcnn", "fpn"])
def test_a_network_set_after_the_config_was_read_is_built_correctly(recipe, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(f'_base_ = "hybridzoo::{recipe}"\n')
    config = Config.fromfile(file)
    config.model.backbone = dict(type="PyramidBackbone", name="test_convnext")
    with torch.device("meta"), DefaultScope.overwrite_default_scope(config.default_scope):
        model = MODELS.build(config.model)
    assert "get the widths of test_convnext" in capsys.readouterr().out
    with torch.no_grad():
        maps = model.eval().extract_feat(torch.zeros(1, 3, 64, 96, device="meta"))
        if config.default_scope == "mmseg":
            assert model.decode_head(maps).shape == (1, 150, 16, 24)


def test_correct_widths_in_a_users_config_are_not_changed(capsys):
    prepare(load_config("retinanet"))
    head = dict(type="FCNHead", num_classes=3, channels=8, norm_cfg=dict(type="BN"), align_corners=False)
    backbone = dict(type="PyramidBackbone", name="test_convnext")
    for head_args in (
        dict(in_channels=48, in_index=2),
        dict(in_channels=[24, 64], in_index=[0, 3], input_transform="resize_concat"),
    ):
        with DefaultScope.overwrite_default_scope("mmseg"):
            model = MODELS.build(dict(type="EncoderDecoder", backbone=backbone, decode_head={**head, **head_args}))
        assert model.decode_head.in_channels == (48 if head_args["in_index"] == 2 else 88)
    assert capsys.readouterr().out == ""


def test_a_published_run_as_a_base(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text('_base_ = "hybridzoo::upernet_nat_tiny_160k_ade20k"\ntrain_dataloader = dict(batch_size=1)\n')
    config = Config.fromfile(file)
    assert (config.model.backbone.name, config.model.backbone.drop_path_rate) == ("nat_tiny", 0.3)
    assert config.train_dataloader.batch_size == 1
    file.write_text('_base_ = "hybridzoo::mask-rccn"\n')
    with pytest.raises(UserError, match="mask-rcnn"):
        load_config(file)


@pytest.mark.parametrize(
    "base",
    ["mmdet::_base_/models/retinanet_r50_fpn.py", "mmseg::_base_/datasets/ade20k.py", "mmdet::retinanet/nothing.py"],
)
def test_base_configs_of_openmmlab_are_found_like_in_mmengine(base):
    """Without its parsing of a hundred lists of models; what is not there is mmengine's error."""
    if "nothing" in base:
        with pytest.raises(FileNotFoundError, match="nothing"):
            raw._path_of_base(base, "")
    else:
        assert raw._path_of_base(base, "") == raw._mmengines_path(base, "")
