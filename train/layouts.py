"""Folder layouts of training data, and the checks that run before training starts.

A classification folder::

    ROOT/{train,val}/<class name>/**/*.png    any depth: the first folder is the class

A scenes folder, for detection, segmentation or both::

    ROOT/images/{train,val}/**/*.png
    ROOT/annotations/{train,val}.json   detection: COCO boxes, and polygons or run lengths for masks
    ROOT/masks/{train,val}/**/*.png     segmentation: one channel, the pixel's class id, 255 is ignored
    ROOT/classes.txt                    segmentation: a name per line, the first line names id 0

The published layouts of COCO, ADE20K and Cityscapes are read too, and those in a config's datasets, see `Layout`::

    ROOT/{train,val}2017/*.jpg, or below ROOT/images/; ROOT/annotations/instances_{train,val}2017.json
    ROOT/{train,valid,test}/*.jpg with _annotations.coco.json beside them   (Roboflow's COCO)
    ROOT/images/{training,validation}/*.jpg, ROOT/annotations/{training,validation}/*.png   0 is no class
    ROOT/leftImg8bit/{train,val,test}/<city>/*.png, ROOT/gtFine/...

YOLO is described in `hybridzoo.train.data.yolo`, Pascal VOC in `voc`, ImageNet's archives in `imagenet`.  A third split
is called `test`; `train` may also be `training`, `val` also `valid` or `validation`, `test` also `testing`.

`hybridzoo.train.images` documents which pictures are read, and how; `hybridzoo.train.coco` which annotations are
repaired. Every check raises a UserError for the first error, with its place and what to do. Images that cannot be
decoded stop the run or, with ``on_bad="skip"``, are counted and returned in `Report.skipped`. All other errors stop the
run, because training would continue with wrong labels. In a split with more than `images.MANY` images, only a sample is
opened; errors in the others are found when they are loaded.
"""

from __future__ import annotations

from pathlib import Path

from hybridzoo.train.data.classification import class_folders, classified_images, inspect_classification
from hybridzoo.train.data.detection import detection_layout, inspect_detection
from hybridzoo.train.data.report import IGNORED, SPLITS, How, Layout, OnBad, Place, Report, Split
from hybridzoo.train.data.segmentation import (
    ade20k_layout,
    inspect_segmentation,
    is_ade20k,
    is_cityscapes,
    masked_images,
    segmentation_layout,
)

__all__ = [
    "IGNORED",
    "SPLITS",
    "How",
    "Layout",
    "OnBad",
    "Place",
    "Report",
    "Split",
    "ade20k_layout",
    "check_classification",
    "check_detection",
    "check_segmentation",
    "class_folders",
    "classified_images",
    "detection_layout",
    "inspect_classification",
    "inspect_detection",
    "inspect_segmentation",
    "is_ade20k",
    "is_cityscapes",
    "masked_images",
    "segmentation_layout",
]


def check_classification(root: Path, *, on_bad: OnBad = "stop", skipped: list[Path] | None = None) -> list[str]:
    """Check a classification folder and return its class names in the order of their ids.

    Args:
        on_bad: what to do if an image cannot be decoded: "stop" or "skip".
        skipped: a list that collects skipped images.

    Raises:
        UserError: see `inspect_classification`.
    """
    return _classes(inspect_classification(root, How(on_bad)), skipped)


def check_detection(
    root: Path, *, masks: bool = False, on_bad: OnBad = "stop", skipped: list[Path] | None = None
) -> list[str]:
    """Check a scenes folder for detection, see `inspect_detection` and `check_classification`."""
    return _classes(inspect_detection(root, How(on_bad), masks=masks), skipped)


def check_segmentation(root: Path, *, on_bad: OnBad = "stop", skipped: list[Path] | None = None) -> list[str]:
    """Check a scenes folder for segmentation, see `inspect_segmentation` and `check_classification`."""
    return _classes(inspect_segmentation(root, How(on_bad)), skipped)


def _classes(report: Report, skipped: list[Path] | None) -> list[str]:
    if skipped is not None:
        skipped += report.skipped
    return report.classes
