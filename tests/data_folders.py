"""Small data folders in common layouts, made from photographs inside scikit-image and scikit-learn."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

NAMES = ("chelsea", "coffee", "astronaut", "rocket")


@functools.cache
def photograph(name: str) -> Image.Image:
    skimage = pytest.importorskip("skimage")
    image = Image.open(next((Path(skimage.__file__).parent / "data").glob(f"{name}.*"))).convert("RGB")
    image.thumbnail((256, 256))
    return image


def crop(name: str, seed: int = 0, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """A part of a photograph with the given width and height."""
    image = photograph(name)
    random = np.random.default_rng(seed)
    x, y = (int(random.integers(0, whole - part + 1)) for whole, part in zip(image.size, size, strict=True))
    return image.crop((x, y, x + size[0], y + size[1]))


def save_png(image: Image.Image, path: Path, _: int) -> None:
    image.save(path.with_suffix(".png"))


def save_sideways(image: Image.Image, path: Path, _: int) -> None:
    """Store a picture rotated to the left, with the EXIF orientation that rotates it back."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(path.with_suffix(".png"), exif=exif)


def classification(
    root: Path,
    folders: Sequence[str] = ("chelsea", "coffee"),
    save: Callable[[Image.Image, Path, int], None] = save_png,
    counts: tuple[int, int] = (4, 2),
) -> Path:
    """`root/{train,val}/<folders>`: the first folder has pictures of a cat, the second of a cup."""
    for split, count in zip(("train", "val"), counts, strict=True):
        for name, folder in zip(NAMES, folders, strict=False):
            (root / split / folder).mkdir(parents=True)
            for i in range(count):
                save(crop(name, seed=i + 100 * (split == "val")), root / split / folder / str(i), i)
    return root


def detection(
    root: Path,
    change: Callable[[dict[str, Any]], Any] = lambda coco: None,
    split: str | None = "train",
    **encoding: Any,
) -> Path:
    """Two objects in each image, of categories 1 "cat" and 2 "cup".

    Args:
        change: edits the annotations of `split`, or of both, in place.
        **encoding: of the JSON files.
    """
    (root / "annotations").mkdir(parents=True)
    for part, count in (("train", 4), ("val", 2)):
        (root / "images" / part).mkdir(parents=True)
        images, annotations = [], []
        for i in range(count):
            crop(NAMES[i % 4], seed=i).save(root / "images" / part / f"{i}.png")
            images.append({"id": i + 1, "file_name": f"{i}.png", "width": 96, "height": 80})
            for j in (0, 1):
                x, y, w, h = 8 + 40 * j, 12, 30, 28
                corners = [x, y, x + w, y, x + w, y + h, x, y + h]
                box = {"id": 2 * i + j + 1, "image_id": i + 1, "category_id": j + 1, "bbox": [x, y, w, h]}
                annotations.append({**box, "area": w * h, "iscrowd": 0, "segmentation": [corners]})
        categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "cup"}]
        coco = {"images": images, "annotations": annotations, "categories": categories}
        if split in (part, None):
            change(coco)
        text = json.dumps(coco)
        (root / "annotations" / f"{part}.json").write_text(text, **{"encoding": "utf-8", **encoding})
    return root


def segmentation(
    root: Path,
    save: Callable[[np.ndarray, Path], None] = lambda ids, path: Image.fromarray(ids).save(path.with_suffix(".png")),
    classes: bytes = b"background\ncat\n",
    inner: str = "",
) -> Path:
    """A square of class 1 on a background of class 0."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_bytes(classes)
    for split, count in (("train", 4), ("val", 2)):
        for kind in ("images", "masks"):
            (root / kind / split / inner).mkdir(parents=True)
        for i in range(count):
            crop(NAMES[i % 4], seed=i).save(root / "images" / split / inner / f"{i}.png")
            ids = np.zeros((80, 96), np.uint8)
            ids[20:60, 30:70] = 1
            save(ids, root / "masks" / split / inner / str(i))
    return root


def published_coco(root: Path, change: Callable[[dict[str, Any]], Any] = lambda coco: None) -> Path:
    """Like `detection`, in the layout of the published COCO."""
    detection(root, change)
    for split in ("train", "val"):
        (root / "images" / split).rename(root / f"{split}2017")
        (root / "annotations" / f"{split}.json").rename(root / "annotations" / f"instances_{split}2017.json")
    (root / "images").rmdir()
    return root


def published_ade20k(root: Path) -> Path:
    """Like `segmentation`, in the layout of the published ADE20K: 0 is no class, 1 a wall, 2 a building."""
    segmentation(root, lambda ids, path: Image.fromarray(ids * 2 + (np.arange(96) > 8)).save(path.with_suffix(".png")))
    (root / "classes.txt").unlink()
    (root / "annotations").mkdir()
    for split, name in (("train", "training"), ("val", "validation")):
        (root / "images" / split).rename(root / "images" / name)
        for path in (root / "images" / name).iterdir():
            Image.open(path).save(path.with_suffix(".jpg"))
            path.unlink()
        (root / "masks" / split).rename(root / "annotations" / name)
    (root / "masks").rmdir()
    return root


def yolo(root: Path, style: str = "ultralytics", masks: bool = False) -> Path:
    """Like `detection`, in YOLO's layout: "ultralytics", "roboflow" (train/images, valid/...), or "bare" (no YAML)."""
    detection(root / "coco")
    words = {"train": "train", "val": "valid" if style == "roboflow" else "val"}
    for split, word in words.items():
        inner = (f"{word}/{{}}" if style == "roboflow" else f"{{}}/{word}").format
        content = json.loads((root / "coco" / "annotations" / f"{split}.json").read_text())
        labels = root / inner("labels")
        labels.mkdir(parents=True)
        (root / inner("images")).parent.mkdir(parents=True, exist_ok=True)
        (root / "coco" / "images" / split).rename(root / inner("images"))
        for image in content["images"]:
            lines = []
            for entry in content["annotations"]:
                if entry["image_id"] == image["id"]:
                    x, y, w, h = entry["bbox"]
                    numbers = [(x + w / 2) / 96, (y + h / 2) / 80, w / 96, h / 80]
                    if masks:
                        numbers = [v / (96, 80)[i % 2] for i, v in enumerate(entry["segmentation"][0])]
                    lines.append(" ".join(map(str, [entry["category_id"] - 1, *numbers])))
            (labels / f"{Path(image['file_name']).stem}.txt").write_text("\n".join(lines) + "\n")
    shutil.rmtree(root / "coco")
    if style == "bare":
        (root / "classes.txt").write_text("cat\ncup\n")
    elif style == "roboflow":
        (root / "data.yaml").write_text("train: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['cat', 'cup']\n")
    else:
        (root / "data.yaml").write_text(
            f"path: ../datasets/{root.name}\ntrain: images/train\nval: images/val\nnames:\n  0: cat\n  1: cup\n"
        )
    return root


def voc(root: Path, style: str = "published") -> Path:
    """Like `detection`, in Pascal VOC's layout: "published" (ImageSets), or "beside" (XML beside the pictures)."""
    detection(root / "coco")
    for split, word in (("train", "train"), ("val", "val" if style == "published" else "valid")):
        content = json.loads((root / "coco" / "annotations" / f"{split}.json").read_text())
        names = []
        for image in content["images"]:
            name = f"{split}_{image['id']:06d}"
            names.append(name)
            objects = ""
            for entry in content["annotations"]:
                if entry["image_id"] == image["id"]:
                    x, y, w, h = entry["bbox"]
                    corners = f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax>"
                    label = ["cat", "cup"][entry["category_id"] - 1]
                    objects += (
                        f"<object><name>{label}</name><difficult>0</difficult><bndbox>{corners}</bndbox></object>"
                    )
            size = "<size><width>96</width><height>80</height><depth>3</depth></size>"
            text = f"<annotation><filename>{name}.jpg</filename>{size}{objects}</annotation>"
            pictures = root / ("JPEGImages" if style == "published" else word)
            files = root / ("Annotations" if style == "published" else word)
            for folder in (pictures, files):
                folder.mkdir(exist_ok=True)
            Image.open(root / "coco" / "images" / split / image["file_name"]).save(pictures / f"{name}.jpg")
            (files / f"{name}.xml").write_text(text)
        if style == "published":
            (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
            (root / "ImageSets" / "Main" / f"{word}.txt").write_text("\n".join(names) + "\n")
    shutil.rmtree(root / "coco")
    return root


def cityscapes(root: Path, kind: str = "labelIds") -> Path:
    """A road (7) below the sky (23), a car (26) on the road, a border of ignored ids; two towns."""
    values = {7: 0, 23: 10, 26: 13, 3: 255} if kind == "labelTrainIds" else {7: 7, 23: 23, 26: 26, 3: 3}
    ids = np.full((80, 96), values[23], np.uint8)
    ids[40:], ids[50:60, 30:70], ids[:, :8] = values[7], values[26], values[3]
    for split, count in (("train", 4), ("val", 2)):
        for i in range(count):
            town = ("aachen", "bonn")[i % 2]
            name = f"{town}_{i:06d}_000019"
            for folder in (root / "leftImg8bit" / split / town, root / "gtFine" / split / town):
                folder.mkdir(parents=True, exist_ok=True)
            crop(NAMES[i % 4], seed=i).save(root / "leftImg8bit" / split / town / f"{name}_leftImg8bit.png")
            labels = root / "gtFine" / split / town
            Image.fromarray(ids).save(labels / f"{name}_gtFine_{kind}.png")
            Image.fromarray(ids).convert("RGB").save(labels / f"{name}_gtFine_color.png")
            (labels / f"{name}_gtFine_polygons.json").write_text("{}")
    return root


def imagenet(root: Path, labels: str = "csv") -> Path:
    """Two synsets; validation images in one folder, their classes in Kaggle's "csv", "xml" files or the "devkit"."""
    synsets = ("n01440764", "n01443537")
    base = root if labels == "devkit" else root / "ILSVRC" / "Data" / "CLS-LOC"
    classification(base, synsets)
    rows = ["ImageId,PredictionString"]
    for number, path in enumerate(sorted((base / "val").glob("*/*.png")), 1):
        name, synset = f"ILSVRC2012_val_{number:08d}", path.parent.name
        Image.open(path).save(base / "val" / f"{name}.JPEG", "JPEG")
        rows.append(f"{name},{synset} 1 2 30 40 ")
        if labels == "xml":
            folder = root / "ILSVRC" / "Annotations" / "CLS-LOC" / "val"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.xml").write_text(f"<annotation><object><name>{synset}</name></object></annotation>")
    for synset in synsets:
        shutil.rmtree(base / "val" / synset)
    if labels == "csv":
        (root / "LOC_val_solution.csv").write_text("\n".join(rows) + "\n")
    elif labels == "devkit":
        from scipy.io import savemat

        folder = root / "ILSVRC2012_devkit_t12" / "data"
        folder.mkdir(parents=True)
        table = np.array([(2, synsets[0]), (1, synsets[1])], dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O")])
        savemat(folder / "meta.mat", {"synsets": table})
        (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n2\n1\n1\n")
    return root
