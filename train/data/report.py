"""How a data folder is checked, where its parts lie, and what was found in it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hybridzoo.train.notes import Notes

OnBad = Literal["stop", "skip"]
SPLITS = ("train", "val")
IGNORED = 255  # pixels of a mask that neither train nor score


def first_process() -> bool:
    """Whether this process speaks for all that run together."""
    return int(os.environ.get("RANK", 0)) == 0


@dataclass
class Split:
    """What a check found in one split.

    Attributes:
        name: "train" or "val".
        images: files, in the order of training, the skipped ones left out.
        sizes: (width, height) -> number of images.
        counts: class name -> images (classification, segmentation) or objects (detection) of it, in the classes' order.
        labels: an image's class (classification), its annotations (detection), or its mask's file (segmentation).
        shows: the classes that each image shows.
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
    """What a check found in a data folder.

    Attributes:
        task: "classification", "detection" or "segmentation".
        root: the folder.
        classes: names in the order of their labels.
        splits: those that were looked through.
        notes: what was repaired, left out or noticed.
        skipped: images that cannot be decoded.
    """

    task: str
    root: Path
    classes: list[str]
    splits: list[Split] = field(default_factory=list)
    notes: Notes = field(default_factory=Notes)
    skipped: list[Path] = field(default_factory=list)

    def tell(self) -> None:
        """Print the notes, once however many processes there are."""
        if first_process():
            for line in self.notes.lines():
                print(f"data: {line}")


@dataclass(frozen=True)
class How:
    """How a folder is checked.

    Attributes:
        on_bad: what to do about an image that cannot be decoded: "stop" or "skip".
        splits: the parts that are looked through.
        classes: the class names that a model knows, in order; default those of the data's training split, else of the
            first that is looked through.
        white_value: see `hybridzoo.train.images`.
    """

    on_bad: OnBad = "stop"
    splits: Sequence[str] = SPLITS
    classes: Sequence[str] | None = None
    white_value: float | None = None


@dataclass(frozen=True)
class Place:
    """Where a split lies: the folder of its images, and their JSON file or the folder of their masks."""

    images: Path
    labels: Path


@dataclass(frozen=True)
class Layout:
    """Where the splits of a detection or segmentation folder lie, and what its labels mean.

    Attributes:
        places: split -> where it lies.
        classes: names in the order of their labels; default those of the JSON files, or of `classes.txt`. A detection
            folder keeps its own categories unless all of them are among these.
        zero_is_none: in masks 0 is ignored as 255 is, and 1 is the first class (ADE20K).
        suffixes: ends of the names of images and masks that belong together; default any picture's.
    """

    places: Mapping[str, Place]
    classes: Sequence[str] | None = None
    zero_is_none: bool = False
    suffixes: tuple[str, str] = ("", "")
