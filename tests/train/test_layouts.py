"""What is wrong with a data folder is named before training starts; what is right passes."""

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hybridzoo.train.data import looking
from hybridzoo.train.digits import CLASSES, digits_root
from hybridzoo.train.errors import UserError
from hybridzoo.train.layouts import check_classification, check_detection, check_segmentation


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return digits_root("scenes", root=tmp_path_factory.mktemp("data"), train=4, val=2)


@pytest.fixture
def scenes(made, tmp_path):
    return shutil.copytree(made, tmp_path / "scenes")


@pytest.fixture
def folders(tmp_path):
    """A classification folder with classes "2" and "10", three images each and split."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("2", "10"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(3):
                picture(rng).save(tmp_path / split / name / f"{index}.png")
    return tmp_path


def picture(rng, size=(40, 30)):
    return Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(scenes: Path, change, split="train"):
    file = scenes / "annotations" / f"{split}.json"
    coco = json.loads(file.read_text())
    change(coco)
    file.write_text(json.dumps(coco))


def refused(check, root, **options) -> str:
    with pytest.raises(UserError) as caught:
        check(root, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_good_folders_give_their_classes(scenes, folders, capsys):
    assert check_classification(folders) == ["2", "10"]  # timm's order, not the alphabet's
    assert check_detection(scenes, masks=True) == list(CLASSES)
    assert check_segmentation(scenes) == ["background", *CLASSES]
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""


def test_class_order_is_the_one_timm_numbers(folders):
    from timm.data import create_dataset

    numbers = create_dataset("", root=str(folders), split="train").reader.class_to_idx
    assert [numbers[name] for name in check_classification(folders)] == [0, 1]


# Classification ---------------------------------------------------------------------------------------------------


def test_missing_and_empty_folders(tmp_path, folders):
    assert "no_such_place does not exist" in refused(check_classification, tmp_path / "no_such_place")
    assert "0.png is not a folder" in refused(check_classification, folders / "train/2/0.png")
    (folders / "train/cat").mkdir()
    assert f"class folder {folders / 'train/cat'} holds no images" in refused(check_classification, folders)
    (folders / "train/cat").rmdir()
    shutil.rmtree(folders / "val")
    assert f"{folders / 'val'} does not exist" in refused(check_classification, folders)
    (folders / "val").mkdir()
    assert f"{folders / 'val'} holds no images" in refused(check_classification, folders)


def test_image_outside_a_class_folder(folders):
    shutil.copy(folders / "val/2/0.png", folders / "val/stray.png")
    assert "stray.png is in no class folder" in refused(check_classification, folders)


def test_a_class_that_only_validation_has(folders):
    shutil.copytree(folders / "val/2", folders / "val/3")
    assert "train has no class '3'" in refused(check_classification, folders)


def test_validation_may_lack_a_class(folders):
    shutil.rmtree(folders / "val/2")
    assert check_classification(folders) == ["2", "10"]


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_unreadable_image_is_named_or_skipped(folders, suffix, damage, capsys):
    bad = folders / "train/10" / f"bad.{suffix}"
    picture(np.random.default_rng(1)).save(bad)
    assert check_classification(folders) == ["2", "10"]
    if damage == "truncated":
        truncate(bad)
    else:
        bad.write_text("<html>not found</html>" if damage == "text" else "")
    message = refused(check_classification, folders)
    assert message.startswith(f"image cannot be read: {bad}: ")
    assert "--on-bad-image skip" in message
    assert ("truncated" in message) == (damage == "truncated")
    skipped: list[Path] = []
    assert check_classification(folders, on_bad="skip", skipped=skipped) == ["2", "10"]
    assert skipped == [bad]
    assert f"skipping 1 of 13 images, which cannot be read; the first: {bad}" in capsys.readouterr().out


def test_several_bad_images_are_counted(folders):
    bad = [folders / "train/10/1.png", folders / "val/2/2.png"]
    for path in bad:
        truncate(path)
    assert "(and 1 more like it)" in refused(check_classification, folders)
    skipped: list[Path] = []
    check_classification(folders, on_bad="skip", skipped=skipped)
    assert skipped == bad


def test_skipping_everything_is_an_error(folders):
    for path in folders.rglob("*.png"):
        truncate(path)
    assert "none of 12 images can be read" in refused(check_classification, folders, on_bad="skip")


def test_large_sets_are_decoded_in_part_and_still_find_truncated_files(folders, monkeypatch):
    monkeypatch.setattr(looking, "FULL_DECODES", 4)
    decoded = []
    load = Image.Image.load
    lock = threading.Lock()

    def count(self):
        with lock:
            decoded.append(self.filename)
        return load(self)

    from PIL import ImageFile

    monkeypatch.setattr(ImageFile.ImageFile, "load", count)
    check_classification(folders)
    assert len(decoded) == 4
    monkeypatch.undo()
    monkeypatch.setattr(looking, "FULL_DECODES", 1)
    bad = folders / "val/2/1.png"
    truncate(bad)
    assert str(bad) in refused(check_classification, folders)


# Detection --------------------------------------------------------------------------------------------------------


def set_first(key, **values):
    return lambda coco: coco[key][0].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_first("images", file_name="gone.png"), "image id 1 names a missing file"),
        (set_first("annotations", category_id=11), "annotation id 1 has category_id 11; the categories are 1..10"),
        (set_first("annotations", category_id=0), "annotation id 1 has category_id 0; the categories are 1..10"),
        (set_first("annotations", image_id=99), "annotation id 1 names image id 99"),
        (set_first("annotations", bbox=[1, 2, 3]), "annotation id 1 has bbox [1, 2, 3]"),
        (set_first("annotations", bbox=[1, 2, -3, 4]), "annotation id 1 has bbox [1, 2, -3, 4]"),
        (set_first("annotations", bbox=[1, 2, float("nan"), 4]), "annotation id 1 has bbox"),
        (set_first("annotations", segmentation=[]), "annotation id 1 has no segmentation"),
        (set_first("annotations", id=2), "id in annotations 2 appears 2 times"),
        (set_first("images", width=17), "its annotation says 17x"),
        (set_first("categories", name="1"), "category '1' appears 2 times"),
        (set_first("categories", name="zero"), "categories of val.json differ from train.json"),
        (lambda coco: coco["images"][1].pop("width"), "images[1] has no 'width'"),
        (lambda coco: coco.pop("categories"), "no list of 'categories'"),
        (lambda coco: coco["annotations"].clear(), "no list of 'annotations', or an empty one"),
    ],
)
def test_broken_annotations(scenes, change, message):
    edit(scenes, change)
    assert message in refused(check_detection, scenes, masks=True)


def test_boxes_need_no_masks(scenes):
    edit(scenes, set_first("annotations", segmentation=[]))
    assert check_detection(scenes) == list(CLASSES)


def test_annotation_file_that_is_no_json(scenes):
    truncate(scenes / "annotations/val.json")
    assert f"{scenes / 'annotations/val.json'} is not JSON" in refused(check_detection, scenes)
    (scenes / "annotations/val.json").unlink()
    assert "val.json cannot be read: No such file" in refused(check_detection, scenes)


def test_detection_folder_without_images(scenes):
    shutil.rmtree(scenes / "images/val")
    assert f"image folder {scenes / 'images/val'} does not exist" in refused(check_detection, scenes)


def test_truncated_image_of_a_scene(scenes, capsys):
    bad = scenes / "images/train/00002.png"
    truncate(bad)
    for check in (check_detection, check_segmentation):
        assert f"image cannot be read: {bad}: " in refused(check, scenes)
        skipped: list[Path] = []
        check(scenes, on_bad="skip", skipped=skipped)
        assert skipped == [bad]
        assert "skipping 1 of 6 images" in capsys.readouterr().out


def test_wrong_labels_stop_even_where_bad_images_are_skipped(scenes):
    edit(scenes, set_first("annotations", category_id=11))
    assert "category_id 11" in refused(check_detection, scenes, on_bad="skip")
    mask = scenes / "masks/train/00000.png"
    Image.fromarray(np.asarray(Image.open(mask)) + 30).save(mask)
    assert "holds value" in refused(check_segmentation, scenes, on_bad="skip")


# Segmentation -----------------------------------------------------------------------------------------------------


def test_image_without_mask_and_mask_without_image(scenes):
    (scenes / "masks/train/00001.png").unlink()
    message = refused(check_segmentation, scenes)
    assert f"image {scenes / 'images/train/00001.png'} has no mask in {scenes / 'masks/train'}" in message
    (scenes / "images/train/00001.png").unlink()
    (scenes / "images/val/00000.png").unlink()
    message = refused(check_segmentation, scenes)
    assert f"mask {scenes / 'masks/val/00000.png'} has no image in {scenes / 'images/val'}" in message


def test_mask_values(scenes):
    mask = scenes / "masks/val/00001.png"
    values = np.asarray(Image.open(mask)).copy()
    values[3, 4] = 255
    Image.fromarray(values).save(mask)
    check_segmentation(scenes)  # 255 is ignored
    values[3, 5] = 11
    Image.fromarray(values).save(mask)
    assert f"mask {mask} holds value 11; the classes have ids 0..10" in refused(check_segmentation, scenes)


def test_mask_that_is_a_colour_picture_or_of_another_size(scenes):
    mask = scenes / "masks/train/00000.png"
    grey = Image.open(mask).copy()
    grey.convert("RGB").save(mask)
    assert f"mask {mask} has 3 channels" in refused(check_segmentation, scenes)
    grey.resize((50, 20)).save(mask)
    assert f"mask {mask} is 50x20, its image {grey.width}x{grey.height}" in refused(check_segmentation, scenes)


def test_palette_masks_pass(scenes):
    """Pascal VOC's kind: the indices are the class ids, whatever the colours."""
    mask = scenes / "masks/train/00000.png"
    coloured = Image.open(mask).copy()
    coloured.putpalette(list(range(256)) * 3)
    coloured.save(mask)
    assert Image.open(mask).mode == "P"
    check_segmentation(scenes)


def test_truncated_mask_is_skipped_with_its_image(scenes):
    truncate(scenes / "masks/train/00003.png")
    assert f"its mask {scenes / 'masks/train/00003.png'}: " in refused(check_segmentation, scenes)
    skipped: list[Path] = []
    check_segmentation(scenes, on_bad="skip", skipped=skipped)
    assert skipped == [scenes / "images/train/00003.png"]


def test_classes_file(scenes):
    file = scenes / "classes.txt"
    file.write_text("background\n")
    assert f"{file} names 1 classes" in refused(check_segmentation, scenes)
    file.write_text("background\none\none\n")
    assert "class 'one' appears 2 times" in refused(check_segmentation, scenes)
    file.unlink()
    assert f"{file} cannot be read" in refused(check_segmentation, scenes)


def test_suffixes_may_differ_and_names_may_not_repeat(scenes):
    picked = scenes / "images/train/00000.png"
    Image.open(picked).save(picked.with_suffix(".JPG"))
    assert "00000.JPG and 00000.png differ in their suffix only" in refused(check_segmentation, scenes).replace(
        f"{scenes}/images/train/", ""
    ).replace("00000.png and 00000.JPG", "00000.JPG and 00000.png")
    picked.unlink()
    check_segmentation(scenes)


def test_empty_image_folder(scenes):
    for path in (scenes / "images/val").iterdir():
        path.unlink()
    assert f"image folder {scenes / 'images/val'} holds no images" in refused(check_segmentation, scenes)
