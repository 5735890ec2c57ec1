"""Checks a data folder as training does: counts, what is repaired or left out, and a sheet of samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hybridzoo.train import draw, layouts, outlines
from hybridzoo.train.data import yolo
from hybridzoo.train.data.segmentation import class_ids
from hybridzoo.train.errors import UserError
from hybridzoo.train.images import is_hidden, read_image, read_mask
from hybridzoo.train.layouts import How, Layout, Place, Report, Split

SHOWN = {"train": 8, "val": 4}  # samples on a sheet
CELL = 420  # px, the longer side of a sample on it


def find_tasks(root: Path) -> list[str]:
    """The tasks whose layout a folder has (`hybridzoo.train.layouts`).

    Raises:
        UserError: it has the layout of no task.
    """
    if not root.is_dir():
        raise UserError(f"data root {root} {'is not a folder' if root.exists() else 'does not exist'}")
    if layouts.is_ade20k(root) or layouts.is_cityscapes(root):
        return ["segmentation"]
    places = layouts.detection_layout(root).places.values()
    lying = [place for place in places if place.labels.exists()]
    found = ["detection"] if lying or (root / "annotations").exists() else []
    if (root / "masks").exists() or ((root / "classes.txt").exists() and not any(p.form != "coco" for p in lying)):
        found.append("segmentation")
    train = layouts.class_folders(root, "train")
    if train is not None and not any(place.images.is_relative_to(train) for place in lying):
        found.insert(0, "classification")
    if not found:
        raise UserError(
            f"data root {root} has none of the layouts: train/<class>/ for classification; images/train/ with "
            "annotations/train.json for detection, or with masks/train/ and classes.txt for segmentation; or those of "
            "COCO, YOLO, Pascal VOC, ADE20K, Cityscapes and ImageNet"
        )
    return found


def inspect(root: Path, task: str, how: How) -> Report:
    """Check a folder for one task with the checks that run before training.

    Masks of a detection folder are checked if every annotation has one.

    Raises:
        UserError: see `hybridzoo.train.layouts`.
    """
    if task == "classification":
        test = layouts.class_folders(root, "test")
        if test is not None and all(path.is_dir() for path in test.iterdir() if not is_hidden(path.name)):
            how = replace(how, splits=(*how.splits, "test"))  # a set without folders has no labels
        return layouts.inspect_classification(root, how)
    if task == "segmentation":
        layout = _ade20k(root) if layouts.is_ade20k(root) else layouts.segmentation_layout(root)
    else:
        layout = layouts.detection_layout(root)
    if has_labels(layout.places["test"]):
        how = replace(how, splits=(*how.splits, "test"))
    if task == "segmentation":
        return layouts.inspect_segmentation(root, how, layout=layout)
    return layouts.inspect_detection(root, how, masks=None, layout=layout)


def has_labels(place: Place) -> bool:
    """Whether a place has images and labels."""
    if place.form == "yolo" and not yolo.label_file(place.images / "any").parent.is_dir():
        return False
    return place.images.is_dir() and place.labels.exists()


def _ade20k(root: Path) -> Layout:
    if (root / "classes.txt").exists():
        return layouts.ade20k_layout(root, None)
    try:
        from hybridzoo.train import segmentation  # mmseg knows the names of ADE20K's classes
    except ModuleNotFoundError as error:
        raise UserError(f"ADE20K's class names need {error.name}: pip install 'hybridzoo[segmentation]'") from error
    return segmentation.layout_of(root)


def sheet(report: Report, white_value: float | None = None) -> Image.Image:
    """Samples of every split with their labels, chosen so that many classes are shown."""
    cells = []
    for split in report.splits:
        for i in _samples(split, SHOWN.get(split.name, 4)):
            path = split.images[i]
            image = read_image(path, white_value=white_value)
            drawn = _drawn(report, image, split.labels[i])
            drawn.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
            name = split.labels[i] if report.task == "classification" else path.name
            cells.append(draw.captioned(drawn, f"{split.name}: {name}"))
    return draw.grid([cells[i : i + 4] for i in range(0, len(cells), 4)])


def save_sheet(report: Report, out: Path, white_value: float | None = None) -> Path:
    """Write `sheet` to `out/<task>.png`.

    Raises:
        UserError: it cannot be written, or would be inside the data folder.
    """
    path = out / f"{report.task}.png"
    if out.resolve().is_relative_to(report.root.resolve()):
        raise UserError(f"--out {out}: is inside the data folder and would count as data; choose another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        sheet(report, white_value).save(path)
    except OSError as error:
        raise UserError(f"--out: cannot write {path} ({error.strerror or error})") from error
    return path


def _samples(split: Split, count: int) -> list[int]:
    """Indices of images: one for each class, the rarest class first, then evenly spaced ones."""
    chosen: list[int] = []
    seen: set[str] = set()
    for name in sorted(split.counts, key=lambda name: split.counts[name]):
        if split.counts[name] and name not in seen and len(chosen) < count:
            place = next(i for i, shown in enumerate(split.shows) if name in shown)
            chosen.append(place)
            seen |= split.shows[place]
    others = [i for i in range(len(split.images)) if i not in chosen]
    missing = min(count - len(chosen), len(others))
    chosen += [others[i * len(others) // missing] for i in range(missing)]
    return sorted(chosen)


def _drawn(report: Report, image: Image.Image, label: Any) -> Image.Image:
    if report.task == "classification":
        return image.copy()
    if report.task == "segmentation":
        return draw.draw_segmentation(image, class_ids(read_mask(label), report.layout), report.classes)
    boxes = np.array([entry["bbox"] for entry in label], float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    masks = None
    if label and all("segmentation" in entry for entry in label):
        masks = np.stack([outlines.mask(entry["segmentation"], image.size) for entry in label])
    names: Sequence[str] = report.classes
    return draw.draw_boxes(image, boxes, [names.index(entry["class"]) for entry in label], None, masks, names)
