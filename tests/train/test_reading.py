"""The data pipelines of all tasks read pictures like `predict`, also with configs of other projects."""

import shutil
from pathlib import Path

import data_folders as folders
import numpy as np
import pytest
import torch
from mmengine import Config
from mmengine.registry import DATASETS, TRANSFORMS, DefaultScope
from PIL import Image
from torch.utils.data import DataLoader

from hybridzoo.train import classified, engine
from hybridzoo.train.config import load_config
from hybridzoo.train.errors import UserError
from hybridzoo.train.images import read_image

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
DEMOS = {"detection": "mask-rcnn_biformer_tiny_digits", "segmentation": "segformer_biformer_tiny_digits"}
PLAIN = {"input_size": 64, "is_training": False}


def dataset(config: Config, root: Path, loader: str = "val_dataloader", **options):
    engine.prepare(config).configure(config, root, **options)
    with DefaultScope.overwrite_default_scope(config.default_scope):
        return DATASETS.build(config[loader].dataset)


def turn(root: Path) -> None:
    """Store every picture turned to the left, with the EXIF orientation that turns it back."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for path in root.rglob("*.png"):
        if "masks" not in path.parts:
            Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


@pytest.mark.parametrize("task", DEMOS)
def test_sideways_pictures_give_the_same_samples(task, tmp_path):
    """Pixels, boxes, masks; and the pixels are those of prediction, in OpenMMLab's order of colours."""
    root = getattr(folders, task)(tmp_path / "plain")
    plain = dataset(load_config(DEMOS[task]), root)
    turned = shutil.copytree(root, tmp_path / "turned")
    turn(turned)
    sideways = dataset(load_config(DEMOS[task]), turned)
    assert len(plain) == len(sideways) == 2
    for i in range(2):
        a, b = plain[i], sideways[i]
        assert torch.equal(a["inputs"], b["inputs"])
        image = read_image(Path(b["data_samples"].img_path))
        assert np.array_equal(b["inputs"].numpy(), np.asarray(image)[:, :, ::-1].transpose(2, 0, 1))
        if task == "detection":
            for key in ("bboxes", "labels"):
                one, other = a["data_samples"].gt_instances[key], b["data_samples"].gt_instances[key]
                assert torch.equal(getattr(one, "tensor", one), getattr(other, "tensor", other))
            assert np.array_equal(*(x["data_samples"].gt_instances.masks.masks for x in (a, b)))
        else:
            assert torch.equal(a["data_samples"].gt_sem_seg.data, b["data_samples"].gt_sem_seg.data)


def test_sideways_photographs_give_the_same_tensors(tmp_path):
    root = folders.classification(tmp_path / "plain")
    turned = shutil.copytree(root, tmp_path / "turned")
    turn(turned)
    plain, sideways = (classified.TimmDataset(PLAIN, root=str(r), split="val") for r in (root, turned))
    assert len(plain) == 4
    assert all(torch.equal(plain[i][0], sideways[i][0]) and plain[i][1] == sideways[i][1] for i in range(4))


def test_16_bit_grey_is_read_as_grey(tmp_path):
    """16-bit copies give the tensors of the 8-bit ones; 12-bit ones do with `white_value`."""

    def save(factor):
        def write(image, path, _):
            values = np.asarray(image.convert("L")).astype(np.uint16 if factor > 1 else np.uint8) * factor
            Image.fromarray(values).save(path.with_suffix(".png"))

        return write

    plain, deep, twelve = (
        classified.TimmDataset(
            PLAIN,
            root=str(folders.classification(tmp_path / str(factor), save=save(factor))),
            split="val",
            white_value=255 * 16 if factor == 16 else None,
        )
        for factor in (1, 257, 16)
    )
    for i in range(4):
        assert torch.equal(plain[i][0], deep[i][0])
        assert torch.equal(plain[i][0], twelve[i][0])


def test_an_openmmlab_config_uses_our_image_reader(tmp_path):
    """A class in the place of a name, and the white value of the run, reach every pipeline."""
    import mmcv.transforms

    config = load_config(DEMOS["segmentation"], ["white_value=4095"])
    config.train_dataloader.dataset.pipeline[0] = {"type": mmcv.transforms.LoadImageFromFile}
    root = folders.segmentation(tmp_path)
    for path in (root / "images").rglob("*.png"):
        Image.fromarray(np.full((80, 96), 4095, np.uint16)).save(path)
    assert dataset(config, root, "train_dataloader")[0]["inputs"].min() == 255
    assert dataset(load_config(DEMOS["segmentation"], ["white_value=4095"]), root)[0]["inputs"].min() == 255


def test_ordinary_pictures_are_read_as_mmcv_reads_them(tmp_path):
    import mmcv

    folders.crop("coffee").save(tmp_path / "x.png")
    with DefaultScope.overwrite_default_scope("mmdet"):
        step = TRANSFORMS.build({"type": "LoadImageFromFile", "to_float32": True})
    results = step({"img_path": str(tmp_path / "x.png")})
    assert results["img"].dtype == np.float32
    assert results["img_shape"] == results["ori_shape"] == (80, 96)
    assert np.array_equal(results["img"], mmcv.imread(str(tmp_path / "x.png")))


def test_a_crop_leaves_no_empty_boxes(tmp_path):
    """Triangles leave a corner of their boxes empty: a crop of that corner alone used to give [0, 0, 0, 0]."""

    def triangles(coco):
        for entry in coco["annotations"]:
            x, y, w, h = entry["bbox"] = [0, entry["category_id"] * 20, 30, 28]
            entry["segmentation"] = [[x, y, x + w, y, x, y + h]]

    root = folders.detection(tmp_path, triangles)
    config = load_config(DEMOS["detection"])
    steps = config.train_dataloader.dataset.pipeline
    crop = next(step for step in steps if step["type"] == "RandomCrop")
    crop.crop_size = (24, 24)

    def boxes(filtered):
        made = dataset(config, root, "train_dataloader")
        if not filtered:
            made.pipeline.transforms = [
                step for step in made.pipeline.transforms if type(step).__name__ != "FilterAnnotations"
            ]
        np.random.seed(0)
        return torch.cat([made[i % 4]["data_samples"].gt_instances.bboxes.tensor for i in range(60)])

    sides = boxes(filtered=True)
    assert ((sides[:, 2:] - sides[:, :2]) > 0).all()
    sides = boxes(filtered=False)
    assert not ((sides[:, 2:] - sides[:, :2]) > 0).all(), "the test would show nothing"


def test_a_missing_picture_is_one_line_from_any_process(tmp_path):
    root = folders.classification(tmp_path)
    data = classified.TimmDataset(PLAIN, root=str(root), split="val")
    (root / "val/coffee/1.png").unlink()
    for workers in (0, 1):
        with pytest.raises(UserError) as caught:
            list(DataLoader(data, num_workers=workers))
        assert str(caught.value) == f"{root / 'val/coffee/1.png'}: no such file"


def test_a_test_checks_the_split_that_it_uses(tmp_path):
    root = folders.segmentation(tmp_path)
    shutil.rmtree(root / "masks/train")
    names = ("background", "cat")
    made = dataset(load_config(DEMOS["segmentation"]), root, splits=("val",), classes=names)
    assert len(made) == 2
    with pytest.raises(UserError, match="the model has"):
        dataset(load_config(DEMOS["segmentation"]), root, splits=("val",), classes=("background", "dog"))
