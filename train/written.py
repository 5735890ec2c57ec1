"""Writes predictions as JSON and CSV files for other programs, one by one; the file is complete or absent.

Detection's JSON is COCO's format of results, so that pycocotools reads it: a list of `image_id` (1, 2, ... in the order
of the images), `category_id` (1 + the index of the class), `bbox` (left, top, width, height), `score`, `segmentation`
(compressed run lengths, where the detector has masks), and beside them `file_name` and `category`. `docs/results.md`
describes all formats.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from hybridzoo.train.errors import UserError
from hybridzoo.train.predict import Prediction

COLUMNS = {
    "classification": ("image", "rank", "class", "index", "probability"),
    "detection": ("image", "class", "index", "score", "left", "top", "right", "bottom", "mask_pixels"),
    "segmentation": ("image", "class", "index", "pixels", "share"),
}


class Written:
    """A file of predictions, JSON or CSV by its `kind`; if the context ends with an error, no file is left.

    Args:
        path: of the file.
        kind: "json" or "csv".
        task: of the predictions.

    Raises:
        UserError: it cannot be written.
    """

    def __init__(self, path: Path, kind: str, task: str) -> None:
        self.path, self.kind, self.task = path, kind, task
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._images = self._entries = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: TextIO = self._temporary.open("w", encoding="utf-8", newline="")
        except OSError as error:
            raise UserError(f"--{kind} {path}: cannot be written ({error.strerror})") from error
        self._table = csv.writer(self._file, lineterminator="\n")

    def __enter__(self) -> Written:
        if self.kind == "csv":
            self._table.writerow(COLUMNS[self.task])
        else:
            self._file.write("[")
        return self

    def add(self, found: Prediction) -> None:
        """Write the prediction for one image."""
        self._images += 1
        try:
            if self.kind == "csv":
                self._table.writerows(_rows(found))
                return
            for entry in _entries(found, self._images):
                self._file.write(f"{',' if self._entries else ''}\n{json.dumps(entry, ensure_ascii=False)}")
                self._entries += 1
        except OSError as error:
            raise UserError(f"--{self.kind} {self.path}: cannot be written ({error.strerror})") from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None and self.kind == "json":
                self._file.write("\n]\n")
            self._file.close()
            if error is None:
                os.replace(self._temporary, self.path)
        except OSError as problem:
            raise UserError(f"--{self.kind} {self.path}: cannot be written ({problem.strerror})") from problem
        finally:
            self._temporary.unlink(missing_ok=True)


def _entries(found: Prediction, number: int) -> Iterator[dict[str, Any]]:
    """An image's entries in the list of a JSON file."""
    if found.task == "detection":
        yield from _objects(found, number)
        return
    width, height = found.size
    entry: dict[str, Any] = {"file_name": found.name, "width": width, "height": height}
    rows = zip(found.labels, found.indices, found.scores, strict=True)
    if found.task == "classification":
        entry["predictions"] = [
            {"class": label, "index": index, "probability": round(score, 6)} for label, index, score in rows
        ]
    else:
        entry["classes"] = [
            {"class": label, "index": index, "share": round(score, 6), "pixels": round(score * width * height)}
            for label, index, score in rows
        ]
        for part, runs in zip(entry["classes"], found.runs or (), strict=False):
            part["segmentation"] = runs
    yield entry


def _objects(found: Prediction, number: int) -> Iterator[dict[str, Any]]:
    assert found.boxes is not None
    for i, (left, top, right, bottom) in enumerate(found.boxes.tolist()):
        entry: dict[str, Any] = {
            "image_id": number,
            "category_id": found.indices[i] + 1,
            "bbox": [round(value, 2) for value in (left, top, right - left, bottom - top)],
            "score": round(found.scores[i], 6),
        }
        if found.runs is not None:
            entry["segmentation"] = found.runs[i]
        yield {**entry, "file_name": found.name, "category": found.labels[i]}


def _rows(found: Prediction) -> Iterator[tuple[Any, ...]]:
    """An image's rows in a CSV file; none if nothing was detected."""
    for i, (label, index, score) in enumerate(zip(found.labels, found.indices, found.scores, strict=True)):
        if found.task == "classification":
            yield found.name, i + 1, label, index, round(score, 6)
        elif found.task == "detection":
            assert found.boxes is not None
            edges = [round(edge, 2) for edge in found.boxes[i].tolist()]
            yield found.name, label, index, round(score, 6), *edges, "" if found.areas is None else found.areas[i]
        else:
            yield found.name, label, index, round(score * found.size[0] * found.size[1]), round(score, 6)
