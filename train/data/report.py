"""How a data folder is checked, where its parts are, and what was found in it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from hybridzoo.train.data.holdout import Holdout, holdout_of
from hybridzoo.train.errors import UserError
from hybridzoo.train.notes import Notes

OnBad = Literal["stop", "skip"]
Form = Literal["coco", "yolo", "voc"]
SPLITS = ("train", "val")  # splits of training; a folder may also have "test"
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
IGNORED = 255  # mask value that training and scoring ignore


def first_process() -> bool:
    """Whether this is the process that prints for all."""
    return int(os.environ.get("RANK", 0)) == 0


@dataclass
class Split:
    """Results of a check of one split.

    Attributes:
        name: "train" or "val".
        images: files in the order of training, without skipped ones.
        sizes: (width, height) -> number of images.
        counts: class name -> images (classification, segmentation) or objects (detection) of it, in the classes' order.
        labels: an image's class (classification), its annotations (detection), or its mask's file (segmentation).
        shows: the classes in each image.
        pixels: class name -> pixels; segmentation only.
    """

    name: str
    images: list[Path]
    sizes: Counter[tuple[int, int]]
    counts: dict[str, int]
    labels: list[Any]
    shows: list[set[str]]
    pixels: dict[str, int] = field(default_factory=dict)


@dataclass
class Report:
    """Results of a check of a data folder.

    Attributes:
        task: "classification", "detection" or "segmentation".
        root: the folder.
        classes: names in the order of their labels.
        splits: the splits that were checked.
        notes: what was repaired, left out or noticed.
        skipped: images that cannot be decoded.
        layout: the folder's layout.
    """

    task: str
    root: Path
    classes: list[str]
    splits: list[Split] = field(default_factory=list)
    notes: Notes = field(default_factory=Notes)
    skipped: list[Path] = field(default_factory=list)
    layout: Layout = field(default_factory=lambda: Layout({}))

    def tell(self) -> None:
        """Print the notes, in the first process only."""
        if first_process():
            for line in self.notes.lines():
                print(f"data: {line}", flush=True)


@dataclass(frozen=True)
class How:
    """How a folder is checked.

    Attributes:
        on_bad: what to do if an image cannot be decoded: "stop" or "skip".
        splits: the splits to check.
        classes: a model's class names, in order; default those of the training split, or of the first checked split.
        white_value: see `hybridzoo.train.images`.
        holdout: how a validation set is taken from the training images, for data without one.
    """

    on_bad: OnBad = "stop"
    splits: Sequence[str] = SPLITS
    classes: Sequence[str] | None = None
    white_value: float | None = None
    holdout: Holdout | None = None


def how_of(config: Mapping[str, Any], splits: Sequence[str], classes: Sequence[str] | None) -> How:
    """The `How` of a run's config."""
    holdout = holdout_of(config.get("val_fraction"))
    return How(config.get("on_bad") or "stop", splits, classes, config.get("white_value"), holdout)


@dataclass(frozen=True)
class Place:
    """The files of a split.

    Attributes:
        images: the folder of its images.
        labels: their JSON file, the folder of their masks, YOLO's file of class names, or VOC's list or folder.
        form: format of a detection folder's labels.
        split: its name, for YOLO and VOC, if `labels` alone does not determine it.
        root: the data folder, for YOLO and VOC.
        holdout: the part of the images that is used.
    """

    images: Path
    labels: Path
    form: Form = "coco"
    split: str = ""
    root: Path = Path()
    holdout: Holdout | None = None

    def source(self) -> dict[str, Any] | None:
        """Further values for a dataset's config; None for plain COCO."""
        if self.form == "coco" and self.holdout is None:
            return None
        return {
            "form": self.form,
            "split": self.split,
            "root": str(self.root),
            "holdout": self.holdout.options() if self.holdout is not None else None,
        }


def place_of(images: Path, labels: Path, source: Mapping[str, Any] | None) -> Place:
    """The place in a dataset's config, see `Place.source`."""
    if not source:
        return Place(images, labels)
    holdout = holdout_of(source["holdout"])
    return Place(images, labels, source["form"], source["split"], Path(source["root"]), holdout)


@dataclass(frozen=True)
class Layout:
    """Where the splits of a detection or segmentation folder are, and what its labels mean.

    Attributes:
        places: split -> its place, whether it exists or not.
        classes: names in the order of their labels; default those of the JSON files, or of `classes.txt`. A detection
            folder keeps its own categories unless all of them are among these.
        zero_is_none: 0 in masks is ignored like 255, and 1 is the first class (ADE20K).
        suffixes: endings of the names of images and masks that belong together; default any picture's suffix.
        stored: the value in masks for each class, in the classes' order; other values are ignored (Cityscapes).
        name: for messages.
    """

    places: Mapping[str, Place]
    classes: Sequence[str] | None = None
    zero_is_none: bool = False
    suffixes: tuple[str, str] = ("", "")
    stored: Sequence[int] | None = None
    name: str = ""


def divided(layout: Layout, how: How, root: Path) -> Layout:
    """The layout with a validation set taken from the training set, if that is asked for.

    Raises:
        UserError: the training data has a validation set; a test uses that set.
    """
    holdout = how.holdout
    if holdout is None or layout.places["train"].holdout is not None:
        return layout
    train, val = layout.places["train"], layout.places["val"]
    same = (val.images, val.labels) == (train.images, train.labels) and val.images != train.root
    if val.images.is_dir() and val.labels.exists() and not same:
        if "train" not in how.splits:
            return layout
        raise has_validation(holdout, root)
    parts = {"train": replace(train, holdout=holdout.part(False)), "val": replace(train, holdout=holdout.part(True))}
    return replace(layout, places={**layout.places, **parts})


def no_split(root: Path, split: str) -> UserError:
    """The error for data without a split, with a way to correct it."""
    held = "; --val-fraction 0.2 holds out one training image in five" if split == "val" else ""
    return UserError(f"data {root}: has no folder {split}/; expected {root}/{{train,val}}/<class name>/*{held}")


def has_validation(holdout: Holdout, root: Path) -> UserError:
    """The error for data that has a validation set already."""
    return UserError(f"--val-fraction {holdout.fraction:g}: data {root} has a validation set; leave the option out")
