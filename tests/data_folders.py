"""Small data folders as people have them, cut from photographs that come with scikit-image and scikit-learn."""

from __future__ import annotations

import functools
import json
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
    """A piece of a photograph, `size` wide and high."""
    image = photograph(name)
    random = np.random.default_rng(seed)
    x, y = (int(random.integers(0, whole - part + 1)) for whole, part in zip(image.size, size, strict=True))
    return image.crop((x, y, x + size[0], y + size[1]))


def save_png(image: Image.Image, path: Path, _: int) -> None:
    image.save(path.with_suffix(".png"))


def save_sideways(image: Image.Image, path: Path, _: int) -> None:
    """Stored turned to the left, with EXIF's "turn to the right"."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(path.with_suffix(".png"), exif=exif)


def classification(
    root: Path,
    folders: Sequence[str] = ("chelsea", "coffee"),
    save: Callable[[Image.Image, Path, int], None] = save_png,
    counts: tuple[int, int] = (4, 2),
) -> Path:
    """`root/{train,val}/<folders>`, of which the first shows a cat, the second a cup."""
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
    """Two objects an image, of categories 1 "cat" and 2 "cup".

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
    """A square of class 1 in a background of 0."""
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
    """As `detection`, in the layout in which COCO is published."""
    detection(root, change)
    for split in ("train", "val"):
        (root / "images" / split).rename(root / f"{split}2017")
        (root / "annotations" / f"{split}.json").rename(root / "annotations" / f"instances_{split}2017.json")
    (root / "images").rmdir()
    return root


def published_ade20k(root: Path) -> Path:
    """As `segmentation`, in the layout in which ADE20K is published: 0 is no class, 1 a wall, 2 a building."""
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
