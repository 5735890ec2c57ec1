"""The demo configs of detection and segmentation through the engine: training, testing, prediction, own data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import data_folders as folders
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._pytree import tree_leaves

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
from mmengine.registry import DATASETS, DefaultScope

from hybridzoo.layers.inference import FusedError
from hybridzoo.train import engine, resuming, runner
from hybridzoo.train.config import load_config
from hybridzoo.train.digits import digits_root
from hybridzoo.train.errors import UserError

DEMOS = {"detection": "mask-rcnn_biformer_tiny_digits", "segmentation": "segformer_biformer_tiny_digits"}
EACH = pytest.mark.parametrize("task", ["detection", "segmentation"])
METRIC = {"detection": "coco/bbox_mAP_50", "segmentation": "mIoU"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return digits_root("scenes", root=tmp_path_factory.mktemp("data"), train=4, val=2)


@pytest.fixture
def own(data, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(data, tmp_path / "own"))


def demo(task, *options):
    return load_config(DEMOS[task], ["train_dataloader.batch_size=2", "train_cfg.max_epochs=1", *options])


def configured(config, data):
    engine.prepare(config).configure(config, data)
    return config


def build_dataset(config, loader="train_dataloader"):
    with DefaultScope.overwrite_default_scope(config.default_scope):
        return DATASETS.build(config[loader].dataset)


@EACH
def test_train_test_and_predict(task, data, tmp_path):
    metrics = engine.train(demo(task), work_dir=tmp_path / "run", data=data, wandb=False)
    assert 0 <= metrics[METRIC[task]] <= 100
    checkpoint = tmp_path / "run" / "final.pth"
    again = engine.test(demo(task), checkpoint, work_dir=tmp_path / "test", data=data)
    assert again[METRIC[task]] == pytest.approx(metrics[METRIC[task]])

    state = resuming.find(tmp_path / "run")
    assert state is not None
    state.check(configured(demo(task), data))  # the run would go on
    state.content["meta"]["class_names"] = state.content["meta"]["class_names"][::-1]
    with pytest.raises(UserError, match=r"was trained on \d+ classes \(9, 8, .* the data has \d+ \("):
        state.check(configured(demo(task), data))

    model = engine.build_for_inference(demo(task), checkpoint, "cpu")
    names = ("background", *map(str, range(10))) if task == "segmentation" else tuple(map(str, range(10)))
    assert tuple(model.dataset_meta["classes"]) == names
    config = configured(demo(task), data)
    sample = build_dataset(config, "test_dataloader")[0]
    with torch.no_grad():
        result = model.test_step({"inputs": [sample["inputs"]], "data_samples": [sample["data_samples"]]})[0]
    height, width = result.ori_shape
    if task == "detection":
        found = result.pred_instances
        assert found.bboxes.shape == (len(found), 4)
        assert found.masks.shape == (len(found), height, width)
    else:
        assert result.pred_sem_seg.data.shape == (1, height, width)
        assert result.pred_sem_seg.data.max() <= 10


@EACH
def test_one_step_changes_backbone_and_heads(task, data):
    config = configured(demo(task), data)
    config.optim_wrapper.paramwise_cfg = dict(layer_decay=0.8)
    with DefaultScope.overwrite_default_scope(config.default_scope):
        from mmengine.registry import MODELS

        torch.manual_seed(0)
        model = MODELS.build(config.model)
        model.init_weights()
    dataset = build_dataset(config)
    samples = [dataset[0], dataset[1]]
    batch = {key: [sample[key] for sample in samples] for key in ("inputs", "data_samples")}
    before = {name: value.clone() for name, value in model.named_parameters()}
    optim_wrapper = runner.MMRunner.build_optim_wrapper.__get__(_Holder(model))(config.optim_wrapper)
    losses = model.train().train_step(batch, optim_wrapper)
    assert all(torch.isfinite(value).all() for value in losses.values())
    unchanged = {name for name, value in model.named_parameters() if torch.equal(value, before[name])}
    assert unchanged <= {"neck.fpn_convs.3.conv.bias"}  # no region was drawn from the coarsest level
    rates = {name: group["lr"] for group in optim_wrapper.param_groups for name in _names(model, group)}
    assert rates["backbone.model.stem.conv1.weight"] < rates["backbone.model.stages.3.blocks.1.mlp.fc1.weight"]
    assert {rates[name] for name in rates if not name.startswith("backbone.")} == {max(rates.values())}


@EACH
def test_a_detectors_or_segmentors_network_can_be_fused(task, data):
    """Features and answers stay; the heads, which are mmdet's and mmseg's, are as they were."""
    config = configured(demo(task), data)
    with DefaultScope.overwrite_default_scope(config.default_scope):
        from mmengine.registry import MODELS

        torch.manual_seed(0)
        model = MODELS.build(config.model).eval()
    image = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = tree_leaves(model.extract_feat(image))
        heads = {name: value for name, value in model.named_parameters() if not name.startswith("backbone.model.")}
        model.backbone.model.fuse((96, 128))
        for got, wanted in zip(tree_leaves(model.extract_feat(image)), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * wanted.std().item())
        sample = build_dataset(config, "test_dataloader")[0]
        (answer,) = model.test_step({"inputs": [sample["inputs"]], "data_samples": [sample["data_samples"]]})
    assert ("pred_instances" if task == "detection" else "pred_sem_seg") in answer
    assert dict(model.named_parameters()).keys() == heads.keys()
    with pytest.raises(FusedError, match="train"):
        model.train()


class _Holder:
    def __init__(self, model):
        self.model = model


def _names(model, group):
    inside = {id(parameter) for parameter in group["params"]}
    return [name for name, parameter in model.named_parameters() if id(parameter) in inside]


def test_detection_takes_the_classes_of_the_data(own):
    for split in ("train", "val"):
        path = own / "annotations" / f"{split}.json"
        coco = json.loads(path.read_text())
        coco["categories"] = [*coco["categories"], {"id": 99, "name": "nothing"}]
        path.write_text(json.dumps(coco))
    config = configured(demo("detection"), own)
    assert config.model.roi_head.bbox_head.num_classes == config.model.roi_head.mask_head.num_classes == 11
    assert build_dataset(config).metainfo["classes"][-1] == "nothing"
    assert config.val_evaluator.ann_file == str(own / "annotations" / "val.json")


def test_segmentation_takes_the_classes_of_the_data(own):
    (own / "classes.txt").write_text((own / "classes.txt").read_text().rstrip() + "\nnothing\n")
    config = configured(demo("segmentation"), own)
    assert config.model.decode_head.num_classes == 12
    assert build_dataset(config).metainfo["classes"][-1] == "nothing"


def test_published_segmentation_recipe_on_own_data_keeps_class_zero(data):
    """ADE20K's recipe maps id 0 to "ignore"; with a folder of one's own, id 0 is a class like the others."""
    config = configured(load_config("upernet_biformer_small_160k_ade20k"), data)
    assert config.model.auxiliary_head.num_classes == 11
    train, val = build_dataset(config), build_dataset(config, "val_dataloader")
    assert len(train) == 4
    labels = val[0]["data_samples"].gt_sem_seg.data
    mask = np.array(Image.open(sorted((data / "masks/val").iterdir())[0]))
    assert np.array_equal(labels[0].numpy(), mask)


def test_published_detection_recipe_on_own_data(data):
    config = configured(load_config("retinanet_biformer_small_1x_coco"), data)
    assert config.model.bbox_head.num_classes == 10
    assert len(build_dataset(config)) == 4
    assert config.test_evaluator.type == "CocoScenesMetric"


def test_a_folder_in_cocos_own_layout_is_repaired_and_keeps_cocos_classes(tmp_path):
    folders.published_coco(tmp_path, lambda content: [entry.pop("area") for entry in content["annotations"]])
    config = configured(load_config("mask-rcnn_biformer_small_1x_coco"), tmp_path)
    assert config.model.roi_head.bbox_head.num_classes == 80
    train, val = build_dataset(config), build_dataset(config, "val_dataloader")
    assert (len(train), len(val)) == (4, 2)
    assert config.train_dataloader.dataset.type == "CocoScenes"
    names = train.metainfo["classes"]
    assert names[:2] == ("person", "bicycle")
    assert {names[entry["bbox_label"]] for entry in train.get_data_info(0)["instances"]} == {"cat", "cup"}
    assert config.val_evaluator.ann_file == str(tmp_path / "annotations/instances_val2017.json")
    assert config.val_evaluator.folder == str(tmp_path / "val2017")
    val[0]


def test_everyday_recipe_takes_cocos_own_layout(tmp_path):
    config = configured(demo("detection"), folders.published_coco(tmp_path))
    assert config.model.roi_head.bbox_head.num_classes == 2
    assert len(build_dataset(config)) == 4


def test_bad_data_in_cocos_own_layout_is_refused_in_training_and_test(tmp_path):
    folders.published_coco(tmp_path, lambda content: content["annotations"][0].update(bbox=[200, 3, 9, 9]))
    config = load_config("retinanet_biformer_small_1x_coco")
    task = engine.prepare(config)
    with pytest.raises(UserError, match=r"train2017\.json: annotation id 1 has bbox \[200, 3, 9, 9\]"):
        configured(config, tmp_path)
    copy = load_config("retinanet_biformer_small_1x_coco")
    task.configure(copy, tmp_path, splits=("val",))  # a test needs no training data
    (tmp_path / "val2017/0.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"val2017/0.png: is empty"):
        task.configure(config, tmp_path, splits=("val",))


def test_a_folder_in_ade20ks_own_layout_is_checked_and_keeps_its_classes(tmp_path):
    folders.published_ade20k(tmp_path)
    config = configured(load_config("fpn_biformer_small_80k_ade20k"), tmp_path)
    assert config.model.decode_head.num_classes == 150
    assert {config[f"{split}_dataloader"].dataset.data_root for split in ("train", "val", "test")} == {str(tmp_path)}
    val = build_dataset(config, "val_dataloader")
    assert val.metainfo["classes"][:2] == ("wall", "building")
    labels = val[0]["data_samples"].gt_sem_seg.data[0].numpy()
    stored = np.array(Image.open(tmp_path / "annotations/validation/0.png"))
    assert np.array_equal(labels, np.where(stored == 0, 255, stored - 1))
    everyday = configured(demo("segmentation"), tmp_path)
    assert everyday.model.decode_head.num_classes == 150
    assert np.array_equal(build_dataset(everyday, "val_dataloader")[0]["data_samples"].gt_sem_seg.data[0], labels)


def test_bad_masks_in_ade20ks_own_layout_are_refused(tmp_path):
    folders.published_ade20k(tmp_path)
    mask = tmp_path / "annotations/training/1.png"
    for array, words in (
        (np.full((80, 96), 151, np.uint8), "holds value 151; the classes have ids 1..150, and 0 and 255 are ignored"),
        (np.ones((96, 80), np.uint8), "is 80x96, its image 96x80"),
    ):
        Image.fromarray(array).save(mask)
        with pytest.raises(UserError, match=words):
            configured(load_config("fpn_biformer_small_80k_ade20k"), tmp_path)
    mask.unlink()
    with pytest.raises(UserError, match=r"training/1.jpg has no mask in"):
        configured(load_config("fpn_biformer_small_80k_ade20k"), tmp_path)


def test_large_folders_are_checked_in_part_and_the_rest_during_training(tmp_path, monkeypatch, capsys):
    from hybridzoo.train import images

    monkeypatch.setattr(images, "MANY", 3)
    monkeypatch.setattr(images, "SAMPLE", 2)
    root = folders.detection(tmp_path / "d")
    Image.new("RGB", (50, 50)).save(root / "images/train/1.png")  # the first and the third are looked at
    config = configured(demo("detection"), root)
    assert "2 of 4 images of train, evenly spaced, are checked now" in capsys.readouterr().out
    dataset = build_dataset(config)
    dataset[0]
    with pytest.raises(UserError, match=r"1\.png is 50x50, its annotation says 96x80"):
        dataset[1]

    root = folders.segmentation(tmp_path / "s")
    Image.new("L", (50, 50)).save(root / "masks/train/1.png")
    Image.new("L", (96, 80), 7).save(root / "masks/train/3.png")
    dataset = build_dataset(configured(demo("segmentation"), root))
    dataset[0]
    with pytest.raises(UserError, match=r"1\.png is 50x50, its image 96x80"):
        dataset[1]
    with pytest.raises(UserError, match=r"3\.png holds a value beyond its 2 classes, 7"):
        dataset[3]


@EACH
def test_unreadable_image_stops_or_is_skipped(task, own):
    broken = sorted((own / "images/train").iterdir())[1]
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(UserError, match=broken.name):
        configured(demo(task), own)
    config = configured(demo(task, "on_bad=skip"), own)
    dataset = build_dataset(config)
    assert len(dataset) == 3
    assert broken.name not in {Path(dataset.get_data_info(i)["img_path"]).name for i in range(3)}


@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
def test_an_image_that_vanishes_in_training_stops_it_or_is_skipped_and_named(task, tmp_path, capfd):
    """Named once over all workers; in validation nothing takes its place."""
    from torch.utils.data import DataLoader

    root = getattr(folders, task)(tmp_path / "d")
    name = {"classification": "biformer_tiny_digits"}.get(task) or DEMOS[task]
    folder, val = (
        (root / "train/chelsea", root / "val/chelsea")
        if task == "classification"
        else (root / "images/train", root / "images/val")
    )
    made = {}
    for on_bad in ("stop", "skip"):
        config = load_config(name, [f"on_bad={on_bad}"])
        configured(config, root)
        made[on_bad] = build_dataset(config), build_dataset(config, "val_dataloader")
    (folder / "1.png").unlink()
    (val / "1.png").unlink()
    count = len(made["skip"][0])

    def read(dataset, workers=0):
        return [None for _ in range(2) for _ in DataLoader(dataset, 1, num_workers=workers, collate_fn=len)]

    for dataset, workers in ((made["stop"][0], 1), (made["stop"][1], 0), (made["skip"][1], 0)):
        with pytest.raises(UserError, match=r"1\.png: no such file") as caught:
            read(dataset, workers)
        assert "\n" not in str(caught.value)
    capfd.readouterr()
    assert len(read(made["skip"][0], workers=1)) == 2 * count  # another worker in the second epoch
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1, said
    assert said[0].startswith(f"skipping an image that cannot be read any more, 1 so far: {folder / '1.png'}: ")
    for path in [path for path in root.rglob("*.png") if "train" in path.parts and "masks" not in path.parts]:
        path.unlink()
    with pytest.raises(UserError, match=rf"of {count} training images cannot be read any more; the last"):
        read(made["skip"][0])


def test_skipped_images_do_not_count_as_missed(own, tmp_path):
    """A detector that finds everything in the readable images scores 1 although one image is unreadable."""
    from mmengine.registry import METRICS

    broken = sorted((own / "images/val").iterdir())[0]
    broken.write_bytes(broken.read_bytes()[:100])
    config = configured(demo("detection", "on_bad=skip"), own)
    dataset = build_dataset(config, "val_dataloader")
    with DefaultScope.overwrite_default_scope("mmdet"):
        metric = METRICS.build({**config.val_evaluator, "metric": "bbox"})
    metric.dataset_meta = dataset.metainfo
    for i in range(len(dataset)):
        info = dataset.get_data_info(i)
        boxes = torch.tensor([instance["bbox"] for instance in info["instances"]])
        labels = torch.tensor([instance["bbox_label"] for instance in info["instances"]])
        found = {"bboxes": boxes, "labels": labels, "scores": torch.ones(len(boxes))}
        metric.process({}, [{"img_id": info["img_id"], "ori_shape": (1, 1), "pred_instances": found}])
    assert metric.evaluate(len(dataset))["coco/bbox_mAP"] == pytest.approx(1.0)


@EACH
def test_missing_data_says_so(task, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        configured(demo(task), tmp_path / "nowhere")
    config = demo(task)
    config.digits = None
    with pytest.raises(UserError, match="--data"):
        configured(config, None)


def test_a_detector_that_finds_nothing_scores_zero(own):
    """mmdet leaves it without a score, so that a run would keep no best checkpoint and print an empty table."""
    from hybridzoo.train.detection import CocoScenesMetric

    file = own / "annotations" / "val.json"
    images = json.loads(file.read_text())["images"]
    nothing = {"bboxes": np.zeros((0, 4)), "scores": np.zeros(0), "labels": np.zeros(0, int), "masks": []}
    metric = CocoScenesMetric(
        str(file), str(file.parent.parent / "images/val"), _classes(file), metric=["bbox", "segm"]
    )
    metric.dataset_meta = {"classes": _classes(file)}
    found = metric.compute_metrics([({"img_id": image["id"]}, nothing | {"img_id": image["id"]}) for image in images])
    assert found["bbox_mAP"] == found["segm_mAP_50"] == 0.0
    assert len(found) == 12


def _classes(file):
    return tuple(category["name"] for category in json.loads(file.read_text())["categories"])
