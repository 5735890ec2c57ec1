"""Tiny data sets of real photographs: the pictures inside scikit-image's wheel, cut into tiles. Nothing is downloaded.

Classification: tiles of a cat, a cup of coffee, an astronaut and a motorcycle; the left of each picture trains, the
right validates. Detection and segmentation: the coins of Pompeii, found by their brightness, large and small ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from skimage import data, filters, morphology

PICTURES = {"astronaut": "astronaut", "cat": "chelsea", "coffee": "coffee", "motorcycle": "motorcycle_left"}
COINS = ("small coin", "large coin")


def _picture(name: str) -> NDArray[np.uint8]:
    if hasattr(data, name):
        return np.asarray(getattr(data, name)())
    return np.asarray(Image.open(Path(data.__file__).parent / f"{name}.png"))


def _tiles(height: int, width: int, side: int, count: int) -> dict[str, list[tuple[int, int]]]:
    """Top left corners of training tiles (left part of a picture) and of validation tiles (right part).

    The border is at two thirds of the width, or further left if a tile needs more than a third.

    Raises:
        ValueError: two tiles of this side do not fit next to each other.
    """
    if side > (largest := min(height, width // 2)):
        raise ValueError(f"side={side}: a picture of {width} x {height} pixels gives tiles of {largest} at most")
    border = min(width * 2 // 3, width - side)
    spans = {"train": (0, border - side), "val": (border, width - side)}
    corners: dict[str, list[tuple[int, int]]] = {}
    for split, (first, last) in spans.items():
        rows = min(count, max(1, round((count * (height - side) / max(1, last - first)) ** 0.5)))
        columns = -(-count // rows)
        grid = [
            (round(y), round(x)) for y in np.linspace(0, height - side, rows) for x in np.linspace(first, last, columns)
        ]
        corners[split] = grid[:count]
    return corners


def image_folder(root: Path, *, side: int = 96, count: int = 12) -> Path:
    """`root/{train,val}/<class>/*.jpg`: per class `count` tiles of `side` pixels for training, half for validation."""
    for label, name in PICTURES.items():
        picture = _picture(name)
        for split, corners in _tiles(*picture.shape[:2], side, count).items():
            folder = root / split / label
            folder.mkdir(parents=True, exist_ok=True)
            for index, (y, x) in enumerate(corners[: count if split == "train" else count // 2]):
                Image.fromarray(picture[y : y + side, x : x + side]).save(folder / f"{index}.jpg", quality=92)
    return root


def _coins() -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """The photograph (H, W), and for each of its pixels the number of its coin, 0 for none."""
    picture = _picture("coins")
    smooth = filters.gaussian(picture, 1.5)
    bright = smooth > filters.threshold_local(smooth, 151, offset=-0.02)
    solid = ndimage.binary_fill_holes(morphology.opening(bright, morphology.disk(4)))
    labels, count = ndimage.label(solid)
    sizes = ndimage.sum_labels(solid, labels, range(1, count + 1))
    for number, size in enumerate(sizes, 1):
        if not 600 < size < 4000:
            labels[labels == number] = 0
    return picture, labels.astype(np.int32)


def scenes(root: Path, *, side: int = 128, count: int = 12) -> Path:
    """A scenes folder: images, COCO boxes and masks, class masks; `count` tiles for training, half for validation."""
    picture, coins = _coins()
    numbers = [int(number) for number in np.unique(coins) if number]
    areas = {number: int((coins == number).sum()) for number in numbers}
    middle = float(np.median(list(areas.values())))
    kinds = {number: int(area > middle) for number, area in areas.items()}
    for split, corners in _tiles(*picture.shape, side, count).items():
        for folder in ("images", "masks"):
            (root / folder / split).mkdir(parents=True, exist_ok=True)
        (root / "annotations").mkdir(exist_ok=True)
        images, annotations = [], []
        for index, (y, x) in enumerate(corners[: count if split == "train" else count // 2]):
            tile, part = picture[y : y + side, x : x + side], coins[y : y + side, x : x + side]
            name = f"{index}.png"
            Image.fromarray(tile).convert("RGB").save(root / "images" / split / name)
            classes = np.zeros(part.shape, np.uint8)
            images.append({"id": index, "file_name": name, "width": side, "height": side})
            for number, mask in _whole(part, areas):
                classes[mask] = 1 + kinds[number]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index,
                        "category_id": 1 + kinds[number],
                        "iscrowd": 0,
                        "area": int(mask.sum()),
                        "bbox": _box(mask),
                        "segmentation": _run_length(mask),
                    }
                )
            Image.fromarray(classes).save(root / "masks" / split / name)
        categories = [{"id": index, "name": name} for index, name in enumerate(COINS, 1)]
        coco = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"{split}.json").write_text(json.dumps(coco))
    (root / "classes.txt").write_text("\n".join(("cloth", *COINS)) + "\n")
    return root


def _whole(part: NDArray[np.int32], areas: dict[int, int]) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """The coins that are visible in a tile by more than a third."""
    for number, area in areas.items():
        mask = part == number
        if mask.sum() > area / 3:
            yield number, mask


def _box(mask: NDArray[np.bool_]) -> list[int]:
    ys, xs = np.nonzero(mask)
    return [int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1]


def _run_length(mask: NDArray[np.bool_]) -> dict[str, object]:
    """COCO's uncompressed run lengths: alternating zeros and ones, column by column."""
    flat = mask.ravel(order="F").astype(np.int8)
    changes = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *changes, len(flat)]).tolist()
    return {"size": list(mask.shape), "counts": runs if flat[0] == 0 else [0, *runs]}
