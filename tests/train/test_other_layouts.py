"""Data in the layouts that people have: YOLO, Pascal VOC, Cityscapes, ImageNet's archives; and a held-out share."""

import io
import json
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

import data_folders as folders
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mmengine import Config
from mmengine.registry import DATASETS, METRICS, DefaultScope
from PIL import Image

from hybridzoo.__main__ import main
from hybridzoo.train import check, coco, engine, preparing
from hybridzoo.train.config import load_config
from hybridzoo.train.data import labels
from hybridzoo.train.data.holdout import Holdout
from hybridzoo.train.data.report import place_of
from hybridzoo.train.errors import UserError
from hybridzoo.train.layouts import How, detection_layout, inspect_classification, inspect_detection

MAKERS = {
    "YOLO": lambda root: folders.yolo(root),
    "YOLO, Roboflow's folders": lambda root: folders.yolo(root, "roboflow"),
    "YOLO without YAML": lambda root: folders.yolo(root, "bare"),
    "VOC": lambda root: folders.voc(root),
    "VOC, XML beside pictures": lambda root: folders.voc(root, "beside"),
}


def boxes(root: Path, split: str = "train") -> list[tuple[str, list[float]]]:
    place = detection_layout(root).places[split]
    content = labels.read(place)
    fixed = coco.repaired(content, place.labels, place.images, classes=["cat", "cup"], masks=False)
    names = {entry["id"]: entry["name"] for entry in fixed["categories"]}
    return [(names[entry["category_id"]], np.round(entry["bbox"], 3).tolist()) for entry in fixed["annotations"]]


@pytest.mark.parametrize("made", MAKERS)
def test_the_same_objects_in_every_layout(made, tmp_path):
    root = MAKERS[made](tmp_path / "data")
    assert check.find_tasks(root) == ["detection"]
    assert boxes(root) == [("cat", [8, 12, 30, 28]), ("cup", [48, 12, 30, 28])] * 4
    report = check.inspect(root, "detection", How())
    assert report.classes == ["cat", "cup"]
    assert [(split.name, len(split.images)) for split in report.splits] == [("train", 4), ("val", 2)]
    assert report.layout.name.startswith(made.split(",")[0].split()[0] if "VOC" not in made else "Pascal VOC")
    assert report.notes.lines() == []


@pytest.mark.parametrize("made", MAKERS)
def test_a_dataset_config_reads_what_was_checked(made, tmp_path):
    """What a run's config keeps of a place is enough to read it again."""
    place = detection_layout(MAKERS[made](tmp_path / "data")).places["val"]
    again = place_of(place.images, place.labels, json.loads(json.dumps(place.source())))
    assert labels.read(again) == labels.read(place)


def test_outlines_of_yolo_are_masks(tmp_path):
    root = folders.yolo(tmp_path, masks=True)
    report = inspect_detection(root, masks=True)
    first = report.splits[0].labels[0][0]
    assert np.allclose(first["segmentation"], [[8, 12, 38, 12, 38, 40, 8, 40]])
    assert np.isclose(first["area"], 30 * 28)


def test_test_sets_are_found(tmp_path):
    root = folders.yolo(tmp_path / "yolo", "roboflow")
    shutil.copytree(root / "valid", root / "test")
    assert [split.name for split in check.inspect(root, "detection", How()).splits] == ["train", "val", "test"]
    root = folders.classification(tmp_path / "images")
    shutil.copytree(root / "val", root / "test")
    assert [split.name for split in check.inspect(root, "classification", How()).splits] == ["train", "val", "test"]
    root = folders.segmentation(tmp_path / "masks")
    for kind in ("images", "masks"):
        shutil.copytree(root / kind / "val", root / kind / "test")
    assert [split.name for split in check.inspect(root, "segmentation", How()).splits] == ["train", "val", "test"]


LABEL = "labels/train/1.txt"
WRONG_YOLO = {
    "a class without a name": ("2 0.5 0.5 0.2 0.2", f"{LABEL}: line 1 has class 2; data.yaml names 0..1"),
    "a class that is no number": ("cat 0.5 0.5 0.2 0.2", f"{LABEL}: line 1 has class 'cat'"),
    "too few values": ("0 0.5 0.5 0.2", f"{LABEL}: line 1 has 4 values"),
    "pixels": ("0 48 40 30 28", "fractions of the image's width and height"),
    "text": ("0 0.5 0.5 0.2 wide", "not a number"),
    "not a number": ("0 0.5 nan 0.2 0.2", "not finite"),
    "a negative width": ("0 0.5 0.5 -0.2 0.2", "below 0"),
    "a point without y": ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", f"{LABEL}: line 1 has 8 values"),
    "a box outside": ("0 1.5 1.5 0.2 0.2", "outside its image"),
}


@pytest.mark.parametrize("wrong", WRONG_YOLO)
def test_errors_in_yolo_labels_are_named(wrong, tmp_path):
    root = folders.yolo(tmp_path)
    line, message = WRONG_YOLO[wrong]
    (root / LABEL).write_text(line + "\n")
    with pytest.raises(UserError) as caught:
        check.inspect(root, "detection", How())
    assert message in str(caught.value)


def test_yolo_labels_as_written_by_tools(tmp_path):
    """A class written as 1.0, a confidence, an empty line, a picture without labels, a classes.txt beside them."""
    root = folders.yolo(tmp_path)
    (root / LABEL).write_text("1.000e+00 0.5 0.5 0.25 0.25 0.9\n\n0 0.99 0.5 0.25 0.25\r\n")
    (root / "labels/train/2.txt").unlink()
    (root / "labels/train/classes.txt").write_text("cat\ncup\n")
    report = check.inspect(root, "detection", How())
    assert sorted(report.splits[0].counts.values()) == [3, 3]
    notes = "\n".join(report.notes.lines())
    assert "1 images of train without an object" in notes
    assert "1 boxes that reach beyond their image: clipped" in notes
    assert f"{LABEL}: line 3" in notes


def test_yolo_turns_boxes_with_the_picture_that_is_shown(tmp_path):
    """Shares are of the upright picture, as Ultralytics reads them."""
    root = folders.yolo(tmp_path)
    image = Image.open(root / "images/train/0.png")
    folders.save_sideways(image, root / "images/train/0.png", 0)
    assert boxes(root)[0] == ("cat", [8, 12, 30, 28])


def test_yolo_lists_several_folders_and_files(tmp_path):
    root = folders.yolo(tmp_path)
    names = sorted(str(path) for path in (root / "images/val").iterdir())
    (root / "more.txt").write_text("\n".join(f"./images/val/{Path(name).name}" for name in names) + "\n")
    (root / "data.yaml").write_text("train: [images/train, more.txt]\nval: images/val\nnames: [cat, cup]\n")
    report = check.inspect(root, "detection", How())
    assert [len(split.images) for split in report.splits] == [6, 2]


def test_a_label_without_a_picture_is_refused(tmp_path):
    root = folders.yolo(tmp_path / "yolo")
    (root / "labels/train/9.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    with pytest.raises(UserError, match=r"label .*9\.txt has no image"):
        check.inspect(root, "detection", How())
    root = folders.voc(tmp_path / "voc", "beside")
    (root / "train/train_000001.jpg").unlink()
    with pytest.raises(UserError, match=r"train_000001\.xml has no image"):
        check.inspect(root, "detection", How())


def replace_in(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


XML = "Annotations/train_000001.xml"
WRONG_VOC = {
    "corners exchanged": ("<xmax>38</xmax>", "<xmax>3</xmax>", f"{XML}: object 1 has bndbox"),
    "a corner missing": ("<xmax>38</xmax>", "", f"{XML}: object 1 has bndbox"),
    "no XML": ("</annotation>", "", f"{XML} is not XML"),
    "another size": ("<width>96", "<width>97", "is 96x80, its annotation says 97x80"),
    "no name": ("<name>cat</name>", "", f"{XML}: object 1 has no name"),
}


@pytest.mark.parametrize("wrong", WRONG_VOC)
def test_errors_in_voc_labels_are_named(wrong, tmp_path):
    root = folders.voc(tmp_path)
    old, new, message = WRONG_VOC[wrong]
    replace_in(root / XML, old, new)
    with pytest.raises(UserError) as caught:
        check.inspect(root, "detection", How())
    assert message in str(caught.value)


def test_voc_labels_as_written_by_tools(tmp_path):
    """Difficult objects, a size of 0, corners from 0, an image that no list names."""
    root = folders.voc(tmp_path)
    replace_in(root / XML, "<difficult>0", "<difficult>1")
    replace_in(root / XML, "<width>96", "<width>0")
    replace_in(root / "Annotations/train_000002.xml", "<xmin>9<", "<xmin>0<")
    shutil.copy(root / "JPEGImages/train_000001.jpg", root / "JPEGImages/other.jpg")
    report = check.inspect(root, "detection", How())
    notes = "\n".join(report.notes.lines())
    assert "1 objects marked difficult: ignored in training and scoring" in notes
    assert "1 XML files without a size: taken from the picture" in notes
    assert report.splits[0].labels[0][0]["iscrowd"] == 1
    assert report.splits[0].labels[1][0]["bbox"] == [0, 12, 38, 28]
    assert "clipped" not in notes


def test_a_devkit_of_several_years(tmp_path):
    folders.voc(tmp_path / "VOC2007")
    folders.voc(tmp_path / "VOC2012")
    report = check.inspect(tmp_path, "detection", How())
    assert [len(split.images) for split in report.splits] == [8, 4]


def test_cocos_files_of_roboflow(tmp_path):
    folders.detection(tmp_path / "made")
    for split, word in (("train", "train"), ("val", "valid")):
        (tmp_path / "made/images" / split).rename(tmp_path / word)
        (tmp_path / f"made/annotations/{split}.json").rename(tmp_path / word / "_annotations.coco.json")
    shutil.rmtree(tmp_path / "made")
    assert check.find_tasks(tmp_path) == ["detection"]
    report = check.inspect(tmp_path, "detection", How())
    assert [len(split.images) for split in report.splits] == [4, 2]


@pytest.mark.parametrize("kind", ["labelIds", "labelTrainIds"])
def test_cityscapes(kind, tmp_path):
    root = folders.cityscapes(tmp_path, kind)
    assert check.find_tasks(root) == ["segmentation"]
    report = check.inspect(root, "segmentation", How())
    assert len(report.classes) == 19
    shown = {name for name, pixels in report.splits[0].pixels.items() if pixels}
    assert shown == {"road", "sky", "car"}
    assert report.splits[0].pixels["car"] == 4 * 10 * 40
    assert [len(split.images) for split in report.splits] == [4, 2]


@pytest.mark.parametrize("labels", ["csv", "xml", "devkit"])
def test_imagenets_archives(labels, tmp_path):
    root = folders.imagenet(tmp_path, labels)
    assert check.find_tasks(root) == ["classification"]
    report = check.inspect(root, "classification", How())
    assert report.classes == ["n01440764", "n01443537"]
    assert report.splits[1].labels == ["n01440764"] * 2 + ["n01443537"] * 2
    assert report.layout.name == "ImageNet's archives"


def test_imagenets_validation_images_without_classes_are_refused(tmp_path):
    root = folders.imagenet(tmp_path)
    (root / "LOC_val_solution.csv").unlink()
    with pytest.raises(UserError, match=r"expected LOC_val_solution\.csv"):
        check.inspect(root, "classification", How())


# As a run reads them --------------------------------------------------------------------------------------------------


def configured(recipe: str, root: Path, **options):
    config = load_config(recipe, model="efficientvit_mit_b0", **options)
    task = engine.prepare(config)
    preparing.hold_out(config, None, 3)
    task.configure(config, root)
    config = Config.fromstring(config.pretty_text, ".py")  # as a run leaves it behind
    scope = config.get("default_scope", "mmengine")
    with DefaultScope.overwrite_default_scope(scope):
        loaders = [config[f"{split}_dataloader"].dataset for split in ("train", "val")]
        return config, [DATASETS.build(loader) for loader in loaders]


@pytest.mark.parametrize("made", ["YOLO", "VOC, XML beside pictures"])
def test_detectors_read_other_layouts(made, tmp_path):
    config, (train, val) = configured("retinanet", MAKERS[made](tmp_path / "data"))
    assert (len(train), len(val)) == (4, 2)
    assert train.metainfo["classes"] == ("cat", "cup")
    assert sorted(train[0]["data_samples"].gt_instances.labels.tolist()) == [0, 1]
    with DefaultScope.overwrite_default_scope("mmdet"):
        metric = METRICS.build(config.val_evaluator)
    assert len(metric._coco_api.dataset["annotations"]) == 4


def test_segmentors_read_cityscapes(tmp_path):
    _, (train, val) = configured("fpn", folders.cityscapes(tmp_path))
    assert (len(train), len(val)) == (4, 2)
    ids = {int(value) for i in range(4) for value in train[i]["data_samples"].gt_sem_seg.data.unique()}
    assert {0, 10} < ids <= {0, 10, 13, 255}


def test_classifiers_read_imagenets_archives(tmp_path):
    _, (train, val) = configured("finetune", folders.imagenet(tmp_path))
    assert (len(train), [label for _, label in val.samples]) == (8, [0, 0, 1, 1])


@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
def test_a_run_divides_its_training_images(task, tmp_path):
    root = getattr(folders, task)(tmp_path / "data")
    for name in ("val", "images/val", "masks/val", "annotations/val.json"):
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    before = sorted(root.rglob("*"))
    recipe = {"classification": "finetune", "detection": "retinanet", "segmentation": "fpn"}[task]
    config, (train, val) = configured(recipe, root, val_fraction=0.25)
    assert config.val_fraction == {"fraction": 0.25, "seed": 3, "held": False}
    assert (len(train), len(val)) == ((6, 2) if task == "classification" else (3, 1))
    assert sorted(root.rglob("*")) == before
    state = SimpleNamespace(holdout=Holdout(0.25, 3))
    config.pop("val_fraction")
    preparing.hold_out(config, state, 9)
    assert config.val_fraction == {"fraction": 0.25, "seed": 3, "held": False}, "a resumed run goes on as it began"
    config.val_fraction = 0.5
    with pytest.raises(UserError, match=r"--val-fraction 0\.5: the run started with --val-fraction 0\.25"):
        preparing.hold_out(config, state, None)


@pytest.mark.parametrize("task", ["classification", "yolo", "segmentation"])
def test_the_test_split_is_read(task, tmp_path):
    root = getattr(folders, task)(tmp_path / "data")
    for name in ("", "images/", "masks/", "labels/"):
        if (root / f"{name}val").is_dir():
            shutil.copytree(root / f"{name}val", root / f"{name}test")
    next(path for path in root.rglob("test/**/*1.png") if "masks" not in path.parts).unlink()
    for path in (root / "masks/test/1.png", root / "labels/test/1.txt"):
        path.unlink(missing_ok=True)
    recipe = {"classification": "finetune", "yolo": "retinanet", "segmentation": "fpn"}[task]
    config = load_config(recipe, model="efficientvit_mit_b0")
    names = {"yolo": ("cat", "cup"), "segmentation": ("background", "cat")}.get(task, ("chelsea", "coffee"))
    engine.prepare(config).configure(config, root, splits=("test",), classes=names)
    with DefaultScope.overwrite_default_scope(config.get("default_scope", "mmengine")):
        assert len(DATASETS.build(config.val_dataloader.dataset)) == (3 if task == "classification" else 1)
    shutil.rmtree(root / "val" if task == "classification" else root / "images/val")
    shutil.rmtree(root / "test" if task == "classification" else root / "images/test")
    with pytest.raises(UserError, match="test"):
        engine.prepare(config).configure(config, root, splits=("test",), classes=names)


def test_a_run_with_a_held_out_share_is_tested_on_it_and_on_a_test_set(run_config, image_folder, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(image_folder / "train", root / "train")
    shutil.copytree(image_folder / "val", root / "test")
    config = run_config("train_cfg.max_epochs=1", "val_fraction=0.25")
    metrics = engine.train(config, work_dir=tmp_path / "run", data=root, wandb=False)
    assert json.loads((tmp_path / "run/results.json").read_text())["images"] == 9
    assert engine.test(None, tmp_path / "run") == metrics
    engine.test(None, tmp_path / "run", split="test", work_dir=tmp_path / "tested")
    found = json.loads((tmp_path / "tested/results.json").read_text())
    assert (found["split"], found["images"]) == ("test", 15)


# A held-out share -----------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=60), st.floats(0.01, 0.99), st.integers(0, 5))
def test_every_class_has_its_share_of_held_out_images(groups, fraction, seed):
    groups = groups + sorted(set(groups))  # at least two of each
    names = [f"{group}/{i}.png" for i, group in enumerate(groups)]
    holdout = Holdout(fraction, seed)
    left, held = holdout.keep(names, groups), holdout.part(True).keep(names, groups)
    assert [one != other for one, other in zip(left, held, strict=True)] == [True] * len(names)
    for group in set(groups):
        count, share = groups.count(group), sum(h for h, g in zip(held, groups, strict=True) if g == group)
        assert 1 <= share < count
        assert abs(share - fraction * count) <= 1
    turned = holdout.part(True).keep(names[::-1], groups[::-1])
    assert turned[::-1] == held, "the order of the files does not matter"


def test_another_seed_holds_out_other_images():
    names = [f"{i}.png" for i in range(100)]
    assert Holdout(0.5, 0).keep(names) != Holdout(0.5, 1).keep(names)
    assert sum(Holdout(0.2, 0, True).keep(names)) == 20


@pytest.mark.parametrize("task", ["classification", "detection", "segmentation", "yolo", "voc"])
def test_a_share_is_held_out_where_there_is_no_validation_set(task, tmp_path):
    root = getattr(folders, task)(tmp_path / "data")
    kind = task if task in ("classification", "segmentation") else "detection"
    how = How(holdout=Holdout(0.25))
    with pytest.raises(UserError, match=r"--val-fraction 0\.25: data .* has a validation set"):
        check.inspect(root, kind, how)
    for path in (
        root / "val",
        root / "images/val",
        root / "masks/val",
        root / "labels/val",
        root / "annotations/val.json",
    ):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (root / "ImageSets/Main/val.txt").unlink(missing_ok=True)
    if (root / "data.yaml").exists():
        replace_in(root / "data.yaml", "val: images/val\n", "")
    report = check.inspect(root, kind, how)
    train, val = report.splits
    assert not set(train.images) & set(val.images)
    assert len(train.images) + len(val.images) == {"classification": 8}.get(kind, 4)
    assert len(val.images) == {"classification": 2}.get(kind, 1)
    held = f"{len(val.images)} of {len(train.images) + len(val.images)} training images are held out for validation"
    assert held in "\n".join(report.notes.lines())
    again = check.inspect(root, kind, how)
    assert [split.images for split in again.splits] == [train.images, val.images]


def test_folders_of_classes_alone_are_enough_for_a_share(tmp_path):
    root = folders.classification(tmp_path)
    for name in ("chelsea", "coffee"):
        (root / "train" / name).rename(root / name)
    shutil.rmtree(root / "train")
    shutil.rmtree(root / "val")
    report = inspect_classification(root, How(holdout=Holdout(0.25)))
    assert [len(split.images) for split in report.splits] == [6, 2]


def test_a_class_of_one_image_cannot_be_divided(tmp_path):
    root = folders.classification(tmp_path)
    shutil.rmtree(root / "val")
    for path in sorted((root / "train/coffee").iterdir())[1:]:
        path.unlink()
    with pytest.raises(UserError, match="class 'coffee' has one image"):
        inspect_classification(root, How(holdout=Holdout(0.25)))


def test_check_reports_the_layout(tmp_path, capsys):
    root = folders.yolo(tmp_path / "data")
    assert main(["check", str(root), "--out", str(tmp_path / "out")]) == 0
    assert "layout: YOLO (data.yaml)" in capsys.readouterr().out
    assert (tmp_path / "out/detection.png").is_file()


# Packed data ----------------------------------------------------------------------------------------------------------


def tar_files(root: Path, images: Path) -> Path:
    """The images of a classification folder in WebDataset's tar files, two of training."""
    info = {}
    root.mkdir()
    for split, word in (("train", "train"), ("val", "validation")):
        paths = sorted((images / split).glob("*/*.png"))
        info[word] = {"name": word, "filenames": [], "shard_lengths": [], "num_samples": len(paths)}
        for number, part in enumerate((paths[::2], paths[1::2]) if split == "train" else (paths,)):
            file = f"data-{word}-{number:04d}.tar"
            with tarfile.open(root / file, "w") as tar:
                for i, path in enumerate(part):
                    tar.add(path, f"{i:04d}.png")
                    label = str(["chelsea", "coffee"].index(path.parent.name)).encode()
                    entry = tarfile.TarInfo(f"{i:04d}.cls")
                    entry.size = len(label)
                    tar.addfile(entry, io.BytesIO(label))
            info[word]["filenames"].append(file)
            info[word]["shard_lengths"].append(len(part))
    (root / "_info.json").write_text(json.dumps({"splits": info}))
    (root / "classes.txt").write_text("chelsea\ncoffee\n")
    return root


@pytest.mark.parametrize("kind", ["wds", "hfds"])
def test_classifiers_train_on_packed_data(kind, run_config, tmp_path, monkeypatch):
    pytest.importorskip({"wds": "webdataset", "hfds": "datasets"}[kind])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    images = folders.classification(tmp_path / "images")
    root = tar_files(tmp_path / "shards", images) if kind == "wds" else images
    if kind == "hfds":
        import datasets.config

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    config = run_config("train_cfg.max_epochs=1", "train_dataloader.batch_size=4")
    metrics = engine.train(config, work_dir=tmp_path / "run", data=f"{kind}/{root}", wandb=False)
    assert 0 <= metrics["accuracy/top1"] <= 100
    assert engine.class_names(tmp_path / "run/final.pth") == ("chelsea", "coffee")
    assert metrics == engine.test(config, tmp_path / "run/final.pth", data=f"{kind}/{root}", work_dir=tmp_path / "t")


def test_packed_data_that_cannot_be_read(tmp_path, run_config):
    images = folders.classification(tmp_path / "images")
    root = tar_files(tmp_path / "shards", images)
    (root / "classes.txt").unlink()
    wrong = {f"wds/{root}": "has no class names", "tfds/mnist": "tfds is not read", f"wds/{images}": "has no splits"}
    for data, message in wrong.items():
        with pytest.raises(UserError, match=message):
            engine.train(run_config(), work_dir=tmp_path / "run", data=data, wandb=False)
