"""Embedded data: real handwritten digits, without a download.

scikit-learn carries 1,797 handwritten digits (the test part of UCI's "Optical Recognition of Handwritten Digits",
8x8 values of 0..16).  This file writes two folders of them, in the layouts of `hybridzoo.train.layouts`, like a user's
data:

- "classification": every stroke on 32x32 pixels of paper, ``{train,val}/<digit>/<index>-<drawing>.png``, six times for
  training (with other ink, paper, size and place, and slanted, stretched and bent like other handwriting), three times
  for validation;
- "scenes": sheets of about 96x96 pixels with 3 to 5 digits, COCO boxes and masks, and semantic maps.

Both have digits of about 22 to 34 pixels in coloured ink, so that the classifier's weights are useful for the other two
tasks.

The strokes are ordered by sheet: every writer copied the same page of about 130 digits. The last three of the fourteen
sheets are held out, so that validation has the handwriting of other people.
"""

from __future__ import annotations

import colorsys
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from hybridzoo.train.errors import UserError

Kind = Literal["classification", "scenes"]
Split = Literal["train", "val"]

VERSION = 3  # increase it if the same seed gives other bytes: it is part of the folders' names
CLASSES = tuple("0123456789")
TRAIN_STROKES = 1415  # strokes 0..1414 are the first eleven sheets, 1415..1796 the last three
SIZES = ((96, 96), (96, 96), (96, 96), (120, 88), (88, 120), (104, 96))  # size of scenes, width x height
MIN_VISIBLE = 0.85  # the least fraction of a digit's pixels that later digits leave uncovered
MAX_BOX_IOU = 0.1  # far below the usual NMS thresholds, so that overlapping digits can both be detected


def digits_root(kind: Kind, *, root: Path | None = None, seed: int = 0, train: int = 600, val: int = 120) -> Path:
    """Folder of the embedded data, generated on first use (about 12 s for 720 scenes on one core).

    The same arguments give the same bytes in every process.  The folder is complete or absent: it is written under
    another name and renamed, so that several processes may call this at once.

    Args:
        kind: "classification" or "scenes" (detection and segmentation).
        root: folder of generated data; default ``$HYBRIDZOO_DATA``, or ``./data``.
        seed: seed of the scenes; no effect on classification.
        train: number of training scenes; no effect on classification.
        val: number of validation scenes; no effect on classification.

    Raises:
        UserError: unknown kind, negative seed, a count below 1, or a folder that cannot be written.
    """
    if kind not in ("classification", "scenes"):
        raise UserError(f"digits: kind is {kind!r}; use 'classification' or 'scenes'")
    for name, value, least in (("seed", seed, 0), ("train", train, 1), ("val", val, 1)):
        if not isinstance(value, int) or value < least:
            raise UserError(f"digits: {name} is {value!r}; give a whole number from {least} up")
    parent = Path(root if root is not None else os.environ.get("HYBRIDZOO_DATA") or "data").absolute()
    if kind == "classification":
        final = parent / f"digits-classification-v{VERSION}"
    else:
        final = parent / f"digits-scenes-{train}+{val}-seed{seed}-v{VERSION}"
    if final.is_dir():
        return final
    partial = parent / f".{final.name}.{uuid.uuid4().hex}"
    for leftover in parent.glob(f".{final.name}.*"):  # left by a process that was killed
        if time.time() - leftover.stat().st_mtime > 3600:
            shutil.rmtree(leftover, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        if kind == "classification":
            _write_classification(partial)
        else:
            _write_scenes(partial, seed, {"train": train, "val": val})
        try:
            partial.rename(final)
        except OSError:
            if not final.is_dir():  # otherwise another process finished first, with the same bytes
                raise
    except OSError as error:
        raise UserError(f"digits: cannot write {final}: {error.strerror or error}; set HYBRIDZOO_DATA") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def load_strokes(split: Split) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Ink of each stroke, (N, 8, 8) in 0..1, and its digit, (N,)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    part = slice(None, TRAIN_STROKES) if split == "train" else slice(TRAIN_STROKES, None)
    return (data.images[part] / 16).astype(np.float32), data.target[part].astype(np.int64)


def _write_classification(folder: Path) -> None:
    side = 32
    drawings: dict[Split, int] = {"train": 6, "val": 3}
    for which, split in enumerate(drawings):
        strokes, labels = load_strokes(split)
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
        for index, (stroke, label) in enumerate(zip(strokes, labels, strict=True)):
            for drawing in range(drawings[split]):
                rng = np.random.default_rng([which, index, drawing])
                image = _background(rng, side, side)
                cover = _draw(rng, stroke, rng.uniform(30, 36), side - 4, side - 4, other_hand=split == "train")
                y, x = (int(rng.integers(2, side - extent - 1)) for extent in cover.shape)
                _paint(image, cover, x, y, _ink_colour(rng, rng.random()))
                name = f"{index:04d}-{drawing}.png"
                Image.fromarray(_finish(rng, image)).save(folder / split / CLASSES[label] / name)


# Drawing ----------------------------------------------------------------------------------------------------------


def _draw(
    rng: np.random.Generator,
    stroke: NDArray[np.float32],
    size: float,
    height: int,
    width: int,
    *,
    other_hand: bool = False,
) -> NDArray[np.float32]:
    """An (8, 8) stroke as coverage in 0..1, cut to its ink, at most (height, width).

    `size` is the height in pixels of the stroke with a margin of one original pixel; width and angle vary a little.
    `other_hand` varies them more, and slant, thickness and shape as well.
    """
    # thick strokes need a higher threshold to keep the holes of an 8, thin ones a lower one to stay connected
    threshold = float(np.clip(0.43 + 2.0 * (stroke.mean() - 0.31), 0.28, 0.62))
    extent = (round(size * rng.uniform(0.85, 1.15)), round(size))
    picture = Image.fromarray(np.pad(stroke, 1)).resize(extent, Image.Resampling.BICUBIC)
    if other_hand:
        picture = _bent(rng, picture)
        threshold += rng.uniform(-0.08, 0.08)
    most = 14 if other_hand else 8
    picture = picture.rotate(rng.uniform(-most, most), Image.Resampling.BICUBIC, expand=True)
    # a smooth step at the threshold turns the blurred grey into a stroke with a sharp edge
    step = np.clip((np.asarray(picture) - threshold) / 0.4 + 0.5, 0, 1).astype(np.float32)
    cover = step * step * (3 - 2 * step)
    rows, columns = np.flatnonzero(cover.max(1) > 0.02), np.flatnonzero(cover.max(0) > 0.02)
    cover = cover[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    if cover.shape[0] <= height and cover.shape[1] <= width:
        return cover
    return _draw(rng, stroke, 0.95 * size, height, width, other_hand=other_hand)


def _bent(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    """Slant, stretch and bend: the corners of a mesh of 4 x 4 cells move; a tenth of margin on each side.

    Such distortions help networks most to read handwriting of other people (Simard, Steinkraus and Platt, "Best
    Practices for Convolutional Neural Networks Applied to Visual Document Analysis", ICDAR 2003).
    """
    cells, wider = 4, 1.2
    width, height = round(wider * picture.width), round(wider * picture.height)
    x, y = (np.round(np.linspace(0, side, cells + 1)).astype(int) for side in (width, height))
    # source position of each corner, in widths and heights around the middle of the picture
    from_y, from_x = np.meshgrid(y / height - 0.5, x / width - 0.5, indexing="ij")
    from_x = wider * (rng.uniform(0.85, 1.15) * from_x + rng.uniform(-0.25, 0.25) * from_y)
    from_y = wider * rng.uniform(0.9, 1.1) * from_y
    from_x, from_y = (axis + 0.5 + 0.05 * rng.standard_normal(axis.shape) for axis in (from_x, from_y))
    corners = np.stack([from_x * picture.width, from_y * picture.height], axis=-1)
    mesh = [
        (
            (int(x[j]), int(y[i]), int(x[j + 1]), int(y[i + 1])),
            tuple(corners[[i, i + 1, i + 1, i], [j, j, j + 1, j + 1]].ravel().tolist()),
        )
        for i in range(cells)
        for j in range(cells)
    ]
    return picture.transform((width, height), Image.Transform.MESH, mesh, Image.Resampling.BICUBIC)


def _finish(rng: np.random.Generator, image: NDArray[np.float32]) -> NDArray[np.uint8]:
    """(H, W, 3) in 0..255, with paper grain, as bytes."""
    grain = 2 * rng.standard_normal((*image.shape[:2], 1), np.float32)
    return np.clip(image + grain, 0, 255).round().astype(np.uint8)


# Scenes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """A composed picture; boxes, masks and the semantic map are all computed from `instances`.

    image: (H, W, 3) uint8.  instances: (H, W) uint8, 0 for background, i + 1 for digits[i].
    """

    image: NDArray[np.uint8]
    instances: NDArray[np.uint8]
    digits: list[int]


def compose_scene(rng: np.random.Generator, strokes: NDArray[np.float32], labels: NDArray[np.int64]) -> Scene:
    """Draw 3 to 5 digits of different sizes and inks on textured paper.

    A later digit covers earlier ones. If it would hide more than `1 - MIN_VISIBLE` of one of them, another place is
    drawn, so that every annotated digit can be read.
    """
    width, height = SIZES[rng.integers(len(SIZES))]
    image = _background(rng, width, height)
    instances = np.zeros((height, width), np.uint8)
    digits: list[int] = []
    full: NDArray[np.int64] = np.zeros(0, np.int64)  # pixels of each digit before anything covered it,
    visible: NDArray[np.int64] = np.zeros(0, np.int64)  # and its visible pixels
    boxes: list[tuple[int, int, int, int]] = []
    hue = rng.random()
    wanted = int(rng.integers(3, 6))
    for _ in range(20 * wanted):
        if len(digits) == wanted:
            break
        which = int(rng.integers(len(labels)))
        cover = _draw(rng, strokes[which], rng.uniform(30, 44), height - 5, width - 5)
        h, w = cover.shape
        x, y = int(rng.integers(2, width - w - 1)), int(rng.integers(2, height - h - 1))
        box = (x, y, x + w, y + h)
        if any(_iou(box, other) > MAX_BOX_IOU for other in boxes):
            continue
        window = (slice(y, y + h), slice(x, x + w))
        ink = cover > 0.5
        hidden = np.bincount(instances[window][ink], minlength=len(digits) + 1)[1:]
        if (visible - hidden < MIN_VISIBLE * full).any():
            continue
        hue += rng.uniform(0.13, 0.37)  # consecutive digits differ in colour
        _paint(image, cover, x, y, _ink_colour(rng, hue))
        digits.append(int(labels[which]))
        instances[window][ink] = len(digits)
        visible = np.append(visible - hidden, ink.sum())
        full = np.append(full, ink.sum())
        boxes.append(box)
    return Scene(_finish(rng, image), instances, digits)


def _background(rng: np.random.Generator, width: int, height: int) -> NDArray[np.float32]:
    """(H, W, 3) float in 0..255: two tints blended by a cloud, then ruled lines, squares, dots or nothing."""
    hue = rng.random()
    tints = []
    for _ in range(2):
        value, saturation = rng.uniform(0.80, 0.97), rng.uniform(0.03, 0.22)
        tints.append(np.array(colorsys.hsv_to_rgb((hue + rng.uniform(-0.12, 0.12)) % 1, saturation, value)) * 255)
    coarse = Image.fromarray(rng.random((5, 5), dtype=np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    cloud = np.clip(np.asarray(coarse), 0, 1)[..., None]
    image = (tints[0] * cloud + tints[1] * (1 - cloud)).astype(np.float32)
    shade = -18 * rng.uniform(0.5, 1.2)
    pitch, shift = int(rng.integers(9, 17)), int(rng.integers(9))
    rows, columns = np.arange(height)[:, None], np.arange(width)[None, :]
    on_row, on_column = (rows + shift) % pitch == 0, (columns + shift) % pitch == 0
    pattern = rng.integers(5)
    if pattern == 0:
        image[np.broadcast_to(on_row, (height, width))] += shade
    elif pattern == 1:
        image[on_row | on_column] += shade
    elif pattern == 2:
        image[((rows % pitch - pitch / 2) ** 2 + (columns % pitch - pitch / 2) ** 2) < 3.5] += 1.5 * shade
    elif pattern == 3:
        image[(rows // pitch + columns // pitch) % 2 == 0] += 0.6 * shade
    return image


def _ink_colour(rng: np.random.Generator, hue: float) -> NDArray[np.float32]:
    """A colour darker than any paper, so that hue is not needed to see the digits."""
    while True:
        value, saturation = rng.uniform(0.2, 0.75), rng.uniform(0.6, 1)
        colour = np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), np.float32) * 255
        if colour @ (0.299, 0.587, 0.114) < 130:
            return colour


def _paint(image: NDArray[np.float32], cover: NDArray[np.float32], x: int, y: int, colour: NDArray[np.float32]) -> None:
    """Blend one digit into `image` in place, over a faint shadow that separates overlapping digits."""
    h, w = cover.shape
    padded = np.pad(cover, 2)
    shadow = Image.fromarray((np.roll(padded, 1, (0, 1)) * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1.2))
    around = (slice(y - 2, y + h + 2), slice(x - 2, x + w + 2))
    image[around] *= 1 - 0.35 * (np.asarray(shadow, np.float32) / 255)[..., None]
    window = (slice(y, y + h), slice(x, x + w))
    image[window] += (colour - image[window]) * cover[..., None]


def _iou(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


# Writing ----------------------------------------------------------------------------------------------------------


def _write_scenes(folder: Path, seed: int, counts: dict[Split, int]) -> None:
    progress = iter(_progress(sum(counts.values()), "Drawing digit scenes"))
    (folder / "annotations").mkdir()
    for which, (split, count) in enumerate(counts.items()):
        strokes, labels = load_strokes(split)
        (folder / "images" / split).mkdir(parents=True)
        (folder / "masks" / split).mkdir(parents=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(count):
            next(progress)
            scene = compose_scene(np.random.default_rng([seed, which, index]), strokes, labels)
            name = f"{index:05d}.png"
            Image.fromarray(scene.image).save(folder / "images" / split / name, compress_level=3)
            # class ids of maps and COCO categories are the same: 0 is background, digit d is d + 1
            class_of = np.array([0, *(digit + 1 for digit in scene.digits)], np.uint8)
            Image.fromarray(class_of[scene.instances]).save(folder / "masks" / split / name)
            height, width = scene.instances.shape
            images.append({"id": index + 1, "file_name": name, "width": width, "height": height})
            for i, digit in enumerate(scene.digits):
                annotation = _annotation(scene.instances == i + 1)
                head = {"id": len(annotations) + 1, "image_id": index + 1, "category_id": digit + 1}
                annotations.append({**head, **annotation})
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
        coco = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(coco, separators=(",", ":")))
    next(progress, None)  # closes the bar
    (folder / "classes.txt").write_text("\n".join(("background", *CLASSES)) + "\n")


def _annotation(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """COCO fields of one (H, W) mask: its area in pixels, box as x, y, width, height, and run lengths.

    The runs are COCO's uncompressed form: down the columns, the first run counts zeros.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x, y = int(columns[0]), int(rows[0])
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    return {
        "bbox": [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1],
        "area": int(mask.sum()),
        "segmentation": {"size": list(mask.shape), "counts": [0, *runs] if flat[0] else runs},
        "iscrowd": 0,
    }


def _progress(total: int, what: str) -> Iterator[int]:
    from rich.console import Console
    from rich.progress import track

    return iter(
        track(range(total), what, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    )
