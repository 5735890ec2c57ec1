"""Results of each class, for the three tasks: confusion counts, and scores computed from them.

Scores have the unit of the task's metrics: percent for classification (accuracy) and segmentation (IoU), 0 to 1 for
detection (AP). The score of a class that never occurs is NaN here and null in `results.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
SCORE = 0.3  # least confidence of a detector's object in the confusion matrix, as in the pictures of `predict`
IOU = 0.5  # least overlap of an object with its matched annotation
NOTHING = "(nothing)"  # label in the confusion matrix for missed objects and false detections


@dataclass
class Details:
    """Results of a validation or test in addition to its metrics.

    Attributes:
        images: number of images.
        rows: for each class its `class` and its scores by name, in the order of the classes.
        counts: (true, predicted) numbers of images, objects or pixels.
        labels: names of the rows and columns of `counts`; the last one is `NOTHING` for detectors.
        unit: what is counted: "images", "objects" or "pixels".
        curves: name ("box", "mask") -> class -> precision at recall 0, 0.01 ... 1 and an IoU of 0.5; detection only.
    """

    images: int
    rows: list[dict[str, Any]]
    counts: Counts
    labels: list[str]
    unit: str
    curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)


def shares(counts: Counts, scale: float) -> dict[str, NDArray[np.float64]]:
    """precision, recall and f1 of each class.

    Args:
        counts: (true, predicted) numbers; further columns and rows count missed objects and false detections.
        scale: 100 for percent.
    """
    right = np.diagonal(counts).astype(float)
    precision, recall = _ratio(right, counts.sum(0)), _ratio(right, counts.sum(1))
    return {
        "precision": scale * precision,
        "recall": scale * recall,
        "f1": scale * _ratio(2 * right, counts.sum(0) + counts.sum(1)),
    }


def _ratio(part: NDArray[Any], whole: NDArray[Any]) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)


def counted(true: Sequence[int], predicted: Sequence[int], classes: int) -> Counts:
    """(true, predicted) numbers from two lists of class indices."""
    pairs = np.asarray(true, np.int64) * classes + np.asarray(predicted, np.int64)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def classification(true: Sequence[int], predicted: Sequence[int], names: Sequence[str]) -> Details:
    """Images, precision, recall and F1 of each class, in percent; recall is the class's accuracy."""
    counts = counted(true, predicted, len(names))
    scores = shares(counts, 100)
    rows = [
        {"class": name, "images": int(counts[i].sum()), **{key: float(value[i]) for key, value in scores.items()}}
        for i, name in enumerate(names)
    ]
    return Details(len(true), rows, counts, list(names), "images")


def segmentation(images: int, counts: Counts, names: Sequence[str]) -> Details:
    """Pixels, IoU, accuracy (recall), precision and F1 (Dice) of each class, in percent.

    Args:
        images: that were looked at.
        counts: (true, predicted) numbers of pixels, without ignored ones.
        names: of the classes.
    """
    right = np.diagonal(counts).astype(float)
    iou = 100 * _ratio(right, counts.sum(0) + counts.sum(1) - right)
    scores = shares(counts, 100)
    rows = [
        {
            "class": name,
            "pixels": int(counts[i].sum()),
            "iou": float(iou[i]),
            "accuracy": float(scores["recall"][i]),
            "precision": float(scores["precision"][i]),
            "f1": float(scores["f1"][i]),
        }
        for i, name in enumerate(names)
    ]
    return Details(images, rows, counts, list(names), "pixels")


def detection(images: int, counts: Counts, names: Sequence[str], evaluated: Mapping[str, Mapping[str, Any]]) -> Details:
    """Objects, AP, AP50, precision, recall and F1 of each class, 0 to 1.

    Args:
        images: that were looked at.
        counts: (true, predicted) numbers of objects, a last row and column for nothing, see `matched`.
        names: of the classes.
        evaluated: "box" and "mask" -> what `pycocotools` accumulated: `precision`, (IoU, recall, class, area, number),
            and its `params`.
    """
    scores = shares(counts, 1)
    rows: list[dict[str, Any]] = [{"class": name, "objects": int(counts[i].sum())} for i, name in enumerate(names)]
    curves: dict[str, dict[str, list[float]]] = {}
    for kind, result in evaluated.items():
        precision = result["precision"][:, :, :, 0, -1]  # of objects of any size
        known = np.where(precision > -1, precision, np.nan)
        half = np.flatnonzero(np.isclose(result["params"].iouThrs, IOU))
        for i, row in enumerate(rows):
            row[f"{kind} AP"] = _mean(known[:, :, i])
            row[f"{kind} AP50"] = _mean(known[half, :, i])
        curves[kind] = {
            name: known[half[0], :, i].round(4).tolist()
            for i, name in enumerate(names)
            if half.size and np.isfinite(known[half[0], :, i]).any()
        }
    for i, row in enumerate(rows):
        row.update({key: float(value[i]) for key, value in scores.items()})
    return Details(images, rows, counts, [*names, NOTHING], "objects", curves)


def _mean(values: NDArray[np.float64]) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")


def matched(
    true: NDArray[np.int64], found: NDArray[np.int64], overlaps: NDArray[np.float64], crowd: NDArray[np.bool_]
) -> list[tuple[int, int]]:
    """(true, predicted) classes of an image's objects; -1 is nothing.

    In the order of confidence, each object is matched with the annotation that it overlaps most, by `IOU` or more, of
    any class. So a correct box with a wrong class counts as a confusion.

    Args:
        true: (N,) class indices of the annotations.
        found: (M,) class indices of the detected objects, highest confidence first.
        overlaps: (M, N) intersection over union.
        crowd: (N,) whether an annotation means many objects; detections on it are ignored.
    """
    free = ~crowd
    pairs: list[tuple[int, int]] = []
    for index, label in enumerate(found.tolist()):
        left = np.where(free, overlaps[index], -1.0) if len(true) else np.zeros(0)
        best = int(left.argmax()) if len(left) else -1
        if best >= 0 and left[best] >= IOU:
            free[best] = False
            pairs.append((int(true[best]), label))
        elif not (crowd & (overlaps[index] >= IOU)).any():
            pairs.append((-1, label))
    return pairs + [(int(label), -1) for label in true[free]]
