"""Reads annotations of detection data in any layout into COCO's format, which the rest of the code uses."""

from __future__ import annotations

from typing import Any

from hybridzoo.train import coco
from hybridzoo.train.data import voc, yolo
from hybridzoo.train.data.report import Place
from hybridzoo.train.errors import UserError
from hybridzoo.train.notes import Notes


def read(place: Place, notes: Notes | None = None) -> dict[str, Any]:
    """The images, categories and annotations of a split, as `hybridzoo.train.coco.read` gives them.

    Args:
        place: where they are.
        notes: collects what was left out.

    Raises:
        UserError: they cannot be read, or contradict each other; names file and entry.
    """
    if place.form == "coco":
        content = coco.read(place.labels)
    else:
        try:
            content = yolo.read(place) if place.form == "yolo" else voc.read(place, notes)
        except ModuleNotFoundError as error:
            raise UserError(f"{place.form.upper()} needs {error.name}: pip install 'hybridzoo[detection]'") from error
        coco.check(content, place.labels)
    return content if place.holdout is None else _part(content, place)


def _part(content: dict[str, Any], place: Place) -> dict[str, Any]:
    assert place.holdout is not None
    kept = place.holdout.keep([str(entry["file_name"]) for entry in content["images"]])
    images = [entry for entry, keep in zip(content["images"], kept, strict=True) if keep]
    ids = {entry["id"] for entry in images}
    annotations = [entry for entry in content["annotations"] if entry["image_id"] in ids]
    if not annotations:
        part = "held out" if place.holdout.held else "left for training"
        raise UserError(
            f"{place.labels}: none of the images {part} by --val-fraction {place.holdout.fraction:g} shows an object; "
            "give another fraction or seed"
        )
    return {**content, "images": images, "annotations": annotations}
