"""COCO annotation files: read, repaired in memory by stated rules, or refused with file and entry.

The user's file is never changed. Checking, training and scoring all use the annotations that `repaired` returns.
Repairs:

- a byte order mark, UTF-16, CRLF: read; ids of annotations are renumbered (for scoring, an id 0 means "no match");
- `area` missing or not positive: computed from the mask, else the box; `iscrowd` missing: 0;
- `bbox` missing or without area, but with a mask: computed from the mask;
- a box that reaches beyond its picture is clipped; one narrower than a pixel is left out;
- categories in another order, with gaps in their ids, or only some of the training categories: matched by name;
- a flat list of coordinates, or a list of points: read as one polygon;
- polygons with fewer than three points, flat ones, and ones outside the picture are left out; an object without any
  other polygon is ignored in training and scoring (COCO's crowd), and more than one such object in ten is an error;
- `width` and `height` exchanged, because a tool ignored the EXIF orientation: taken from the picture, if all its boxes
  are inside the picture as it is shown.
"""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from hybridzoo.train import outlines
from hybridzoo.train.class_names import check_names
from hybridzoo.train.errors import UserError
from hybridzoo.train.images import looked_at, shown_size
from hybridzoo.train.notes import Notes
from hybridzoo.train.outlines import Size, is_finite

_NEEDED = {
    "images": ("id", "file_name", "width", "height"),
    "categories": ("id", "name"),
    "annotations": ("image_id", "category_id"),
}
WHERE = "_where"  # file and line of an annotation that comes from another format, for errors
_UNUSABLE = 0.1  # with a larger fraction of objects without a usable mask, the whole file is refused


def read(file: Path) -> dict[str, Any]:
    """Read an annotation file and check its lists, ids and references.

    Raises:
        UserError: not JSON, not COCO, a repeated id, a reference to a missing entry; names file and entry.
    """
    collecting = gc.isenabled()
    gc.disable()  # garbage collection among COCO's millions of new lists doubles the time
    try:
        coco = json.loads(file.read_bytes())  # detects UTF-8 and UTF-16
    except OSError as error:
        raise UserError(f"annotation file {file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        raise UserError(f"annotation file {file} is not JSON: {reason}") from error
    finally:
        if collecting:
            gc.enable()
    check(coco, file)
    return coco


def check(coco: Any, file: Path) -> None:
    """Check the lists, ids and references of an annotation file's content.

    Raises:
        UserError: one of them is wrong; names file and entry.
    """
    for key, needed in _NEEDED.items():
        entries = coco.get(key) if isinstance(coco, dict) else None
        if not isinstance(entries, list) or not entries:
            raise UserError(f"annotation file {file} has no list of {key!r}, or an empty one; expected COCO's format")
        for index, entry in enumerate(entries):
            missing = [name for name in needed if not isinstance(entry, dict) or name not in entry]
            if missing:
                raise UserError(f"{file}: {key}[{index}] has no {missing[0]!r}")
            for name in {"id", "image_id", "category_id"} & entry.keys():
                if not isinstance(entry[name], int | str) and not (is_finite(entry[name]) and entry[name] % 1 == 0):
                    raise UserError(f"{file}: {key}[{index}] has {name} {entry[name]!r}; expected a whole number")
    for key in _NEEDED:
        _unique([entry["id"] for entry in coco[key] if "id" in entry], f"{file}: id in {key}")
    for index, entry in enumerate(coco["images"]):
        if not isinstance(entry["file_name"], str) or not entry["file_name"] or "\0" in entry["file_name"]:
            raise UserError(f"{file}: images[{index}] has file_name {entry['file_name']!r}; expected a path")
        if not all(is_finite(entry[side]) and entry[side] > 0 for side in ("width", "height")):
            sides = f"{entry['width']!r} x {entry['height']!r}"
            raise UserError(f"{file}: images[{index}] has width and height {sides}; expected pixels")
    _unique([entry["file_name"] for entry in coco["images"]], f"{file}: file_name")
    for index, entry in enumerate(coco["categories"]):
        if not isinstance(entry["name"], str | int | float):
            raise UserError(f"{file}: categories[{index}] has name {entry['name']!r}; expected text")
    names = class_names(coco)
    check_names(names, f"{file}: category")
    _unique(names, f"{file}: category")
    _check_annotations(coco, file)


def class_names(coco: dict[str, Any]) -> list[str]:
    """The categories' names, in the file's order."""
    return [str(category["name"]) for category in coco["categories"]]


def repaired(
    coco: dict[str, Any],
    file: Path,
    folder: Path,
    *,
    classes: Sequence[str],
    masks: bool,
    skipped: Collection[Path] = (),
    notes: Notes | None = None,
) -> dict[str, Any]:
    """The result of `read`, repaired as mmdet and pycocotools need it.

    Args:
        file: its path, for errors.
        folder: the folder of its images.
        classes: names in the order of their labels; names that the file does not have get a new id.
        masks: whether the masks are used.
        skipped: images to leave out, with their annotations.
        notes: collects what was repaired.

    Raises:
        UserError: something that cannot be repaired; names file and entry.
    """
    notes = notes if notes is not None else Notes()
    names = {entry["id"]: str(entry["name"]) for entry in coco["categories"]}
    unknown = sorted(set(names.values()) - set(classes))
    if unknown:
        raise UserError(f"{file}: category {unknown[0]!r} is not among the classes {', '.join(classes)}")
    category_ids = _whole_numbers(names)
    by_name = {names[given]: number for given, number in category_ids.items()}
    free = max(by_name.values(), default=0)
    for name in classes:
        if name not in by_name:
            free += 1
            by_name[name] = free

    image_ids = _whole_numbers([entry["id"] for entry in coco["images"]])
    images, frames = [], {}
    left_out = {path.resolve() for path in skipped}
    paths = [folder / entry["file_name"] for entry in coco["images"]]
    measured = set(looked_at(paths))
    if len(measured) < len(paths) and any(
        path in measured and not (left_out and path.resolve() in left_out) and _size(path, entry)[1]
        for path, entry in zip(paths, coco["images"], strict=True)
    ):
        measured = set(paths)  # it is unknown which of them are turned
    for path, entry in zip(paths, coco["images"], strict=True):
        if left_out and path.resolve() in left_out:
            continue
        said = int(entry["width"]), int(entry["height"])
        size, exchanged = _size(path, entry) if path in measured else (said, False)
        if exchanged:
            notes.add("images whose width and height are exchanged: taken from the picture as it is shown", path)
        images.append({**entry, "id": image_ids[entry["id"]], "width": size[0], "height": size[1]})
        frames[entry["id"]] = (path, size, exchanged)

    annotations: list[dict[str, Any]] = []
    unusable: list[str] = []
    for index, entry in enumerate(coco["annotations"]):
        if entry["image_id"] not in frames:
            continue
        where = _where(file, entry, index)
        path, size, exchanged = frames[entry["image_id"]]
        outline, problem = outlines.read(entry.get("segmentation"), size, where, masks, notes)
        box = _box(entry, outline, size, where, path, exchanged, notes)
        if box is None:
            continue
        crowd = entry.get("iscrowd")
        if crowd is None:
            notes.add("annotations without iscrowd: 0", where)
        area = entry.get("area")
        if not (is_finite(area) and area > 0):
            notes.add("annotations without area: computed from mask or box", where)
            area = outlines.area(outline) or box[2] * box[3]
        fixed = {**entry, "id": len(annotations) + 1, "image_id": image_ids[entry["image_id"]]}
        fixed.update(category_id=by_name[names[entry["category_id"]]], bbox=box, area=area, iscrowd=int(crowd or 0))
        if outline is not None:
            fixed["segmentation"] = outline
        elif masks:
            unusable.append(f"{where}: {problem}")
            x, y, w, h = box
            fixed.update(segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]], iscrowd=1)
        else:
            fixed.pop("segmentation", None)
        annotations.append(fixed)
    if len(unusable) > _UNUSABLE * len(annotations):
        more = f" (and {len(unusable) - 1} more like it)" if len(unusable) > 1 else ""
        raise UserError(f"{unusable[0]}{more}; correct the outlines, or choose a detector without masks")
    for line in unusable:
        notes.add("objects without a usable mask: ignored in training and scoring", line)
    if not annotations:
        raise UserError(f"{file}: no box is at least a pixel wide; bbox is [left, top, width, height] in pixels")
    listed = [{"id": by_name[name], "name": name} for name in classes]
    return {"images": images, "annotations": annotations, "categories": listed}


# Parts ------------------------------------------------------------------------------------------------------------


def _check_annotations(coco: dict[str, Any], file: Path) -> None:
    images = {entry["id"] for entry in coco["images"]}
    ids = [entry["id"] for entry in coco["categories"]]
    known = set(ids)
    for index, entry in enumerate(coco["annotations"]):
        where = _where(file, entry, index)
        if entry["image_id"] not in images:
            raise UserError(f"{where} names image id {entry['image_id']}, which is not in 'images'; add or remove one")
        if entry["category_id"] not in known:
            numbers = len(ids) > 1 and not any(isinstance(given, str) for given in ids)
            span = f"{min(ids)}..{max(ids)}" if numbers else ", ".join(map(repr, ids))
            raise UserError(f"{where} has category_id {entry['category_id']}; the categories are {span}")
        box = entry.get("bbox")
        good = isinstance(box, list) and len(box) == 4 and all(is_finite(side) for side in box) and min(box[2:]) >= 0
        if not good and not (box is None and entry.get("segmentation")):
            raise UserError(f"{where} has bbox {box!r}; expected [left, top, width, height] in pixels")
        if entry.get("iscrowd") not in (None, 0, 1):
            raise UserError(f"{where} has iscrowd {entry['iscrowd']!r}; expected 0 or 1")


def _where(file: Path, entry: dict[str, Any], index: int) -> str:
    if isinstance(entry.get(WHERE), str):
        return entry[WHERE]
    return f"{file}: annotation id {entry['id']}" if "id" in entry else f"{file}: annotations[{index}]"


def _size(path: Path, entry: dict[str, Any]) -> tuple[Size, bool]:
    """The size of the picture, and whether the entry has width and height exchanged."""
    size, _ = shown_size(path)
    said = (entry["width"], entry["height"])
    if said == size:
        return size, False
    if said == size[::-1]:
        return size, True
    raise UserError(f"image {path} is {size[0]}x{size[1]}, its annotation says {said[0]:g}x{said[1]:g}; correct it")


def _box(
    entry: dict[str, Any], outline: Any, size: Size, where: str, path: Path, exchanged: bool, notes: Notes
) -> list[float] | None:
    """The box clipped to the picture, or None if nothing of it is left."""
    box = entry.get("bbox")
    if outline is not None and (box is None or min(box[2:]) < 1):
        kind = "annotations without bbox" if box is None else "boxes narrower than a pixel"
        box = outlines.box(outline)
        notes.add(f"{kind}: computed from the mask", where)
    if box is None:
        raise UserError(f"{where} has no bbox, and no mask to compute it from")
    left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
    width, height = size
    if exchanged and (min(left, top) < -1 or right > width + 1 or bottom > height + 1):
        raise UserError(
            f"{where} has bbox {box}, which does not fit {path} as it is shown, {width}x{height}: the boxes seem to "
            "belong to the picture before its EXIF orientation is applied; store it upright, or turn the boxes"
        )
    if min(box[2:]) < 1:
        notes.add("boxes narrower than a pixel: left out", where)
        return None
    inner = [max(left, 0), max(top, 0), min(right, width), min(bottom, height)]
    if inner[0] >= inner[2] or inner[1] >= inner[3]:
        raise UserError(f"{where} has bbox {box}, outside its image {path}, {width}x{height}; correct or remove it")
    if (inner[0], inner[1], inner[2], inner[3]) == (left, top, right, bottom):
        return list(box)
    notes.add("boxes that reach beyond their image: clipped", where)
    clipped = [inner[0], inner[1], inner[2] - inner[0], inner[3] - inner[1]]
    if min(clipped[2:]) < 1:
        notes.add("boxes narrower than a pixel: left out", where)
        return None
    return clipped


def _whole_numbers(ids: Collection[Any]) -> dict[Any, int]:
    """The ids unchanged, or numbered from 1 if one is not a whole number (pycocotools treats text as a list)."""
    if all(isinstance(given, int) for given in ids):
        return {given: given for given in ids}
    return {given: number for number, given in enumerate(ids, 1)}


def _unique(values: Sequence[Any], what: str) -> None:
    value, count = Counter(values).most_common(1)[0] if values else (None, 0)
    if count > 1:
        raise UserError(f"{what} {value!r} appears {count} times; use different ones")
