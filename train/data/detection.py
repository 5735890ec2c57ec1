"""Detection folders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybridzoo.train import coco
from hybridzoo.train.class_names import compare_with_model
from hybridzoo.train.data import labels, voc, yolo
from hybridzoo.train.data.looking import add_split, existing_folder, note_left_out, readable, say_absent
from hybridzoo.train.data.report import SPLIT_NAMES, How, Layout, Place, Report, divided
from hybridzoo.train.errors import UserError
from hybridzoo.train.images import check_image, find_images
from hybridzoo.train.notes import Notes


def detection_layout(root: Path) -> Layout:
    """The layout of a folder: COCO's own, Roboflow's, YOLO, Pascal VOC; otherwise ours, even if nothing is there."""
    found = _coco_layout(root)
    if any(place.labels.exists() for place in found.places.values()):
        return found
    return yolo.layout(root) or voc.layout(root) or found


def _coco_layout(root: Path) -> Layout:
    places, name = {}, "images/ and annotations/"
    for split, words in SPLIT_NAMES.items():
        places[split] = Place(root / "images" / split, root / "annotations" / f"{split}.json")
        if places[split].labels.exists():
            continue
        for file in sorted((root / "annotations").glob(f"instances_{split}*.json")):
            year = file.stem.removeprefix("instances_")
            folder = next((above / year for above in (root, root / "images") if (above / year).is_dir()), None)
            if folder is not None:
                places[split], name = Place(folder, file), "COCO"
        for word in words:
            if (root / word / "_annotations.coco.json").is_file():
                places[split], name = Place(root / word, root / word / "_annotations.coco.json"), "COCO (Roboflow)"
    return Layout(places, name=name)


def inspect_detection(
    root: Path, how: How | None = None, *, masks: bool | None = False, layout: Layout | None = None
) -> Report:
    """Check a folder for detection.

    Args:
        layout: default the result of `detection_layout`.
        masks: whether every annotation must have a mask (polygons or run lengths), for instance segmentation; None: if
            every annotation has one.

    Raises:
        UserError: a missing or empty folder, a JSON file that is not COCO's format, an annotation with a missing image
            or category or that cannot be repaired, an image that is missing, unreadable or of another size than in the
            JSON.
    """
    how = how or How()
    root = existing_folder(Path(root), "data root")
    layout = divided(layout or detection_layout(root), how, root)
    report = Report("detection", root, list(how.classes or ()), layout=layout)
    found: dict[str, tuple[Path, Path, dict[str, Any]]] = {}
    images: dict[str, list[Path]] = {}
    training = layout.places.get("train")
    if not report.classes and "train" not in how.splits and training and training.labels.exists():
        report.classes = _with_all(coco.class_names(labels.read(training)), layout.classes)
    for split in how.splits:
        place = layout.places[split]
        folder, file = existing_folder(place.images, "image folder"), place.labels
        content = labels.read(place, report.notes)
        found[split] = folder, file, content
        names = coco.class_names(content)
        if how.classes:
            compare_with_model(names, how.classes, str(file))
        if not report.classes:
            report.classes = _with_all(names, layout.classes)
        elif set(names) - set(report.classes) and not how.classes:
            extra = sorted(set(names) - set(report.classes))[0]
            first = training.labels.name if training else "the first"
            raise UserError(
                f"{file.parent}: categories of {file.name} differ from {first}, which has no {extra!r}; "
                "give both the same list"
            )
        lying = find_images(folder)
        if place.form == "coco":  # the other formats keep labels next to the images
            note_left_out(lying, folder, report.notes)
        images[split] = [folder / entry["file_name"] for entry in content["images"]]
        rest = set(images[split]) - set(lying.images)
        for path, entry in zip(images[split], content["images"], strict=True):
            if path in rest and not path.is_file():
                what = f"image id {entry['id']} names a missing file, {path}"
                raise UserError(f"{file}: {what}; add it or fix file_name")
        elsewhere = {path.resolve() for path in rest}  # another path to the same file, such as "../train/1.png"
        listed = set(images[split])
        for path in lying.images if place.form == "coco" and place.holdout is None else ():
            if path not in listed and not (elsewhere and path.resolve() in elsewhere):
                report.notes.add(f"images that {file.name} does not list: left out", path)
    if masks is None:
        masks = _all_have_masks([content for *_, content in found.values()], report.notes)
    keep = readable(images, how, report, lambda path, full: check_image(path, full=full, white_value=how.white_value))
    for split, (folder, file, content) in found.items():
        fixed = coco.repaired(
            content, file, folder, classes=report.classes, masks=masks, skipped=report.skipped, notes=report.notes
        )
        named = {category["id"]: category["name"] for category in fixed["categories"]}
        objects: dict[int, list[dict[str, Any]]] = {entry["id"]: [] for entry in fixed["images"]}
        for entry in fixed["annotations"]:
            objects[entry["image_id"]].append({**entry, "class": named[entry["category_id"]]})
        counts = Counter(named[entry["category_id"]] for entry in fixed["annotations"])
        paths = {entry["id"]: folder / entry["file_name"] for entry in fixed["images"]}
        kept = [number for number, path in paths.items() if path in keep]
        shows = [{entry["class"] for entry in objects[number]} for number in kept]
        kept_paths, sizes = (
            [paths[number] for number in kept],
            {entry["id"]: (entry["width"], entry["height"]) for entry in fixed["images"]},
        )
        add_split(report, split, kept_paths, [objects[number] for number in kept], shows, counts)
        report.splits[-1].sizes = Counter(sizes[number] for number in kept)
        for number in kept:
            if not objects[number]:
                report.notes.add(f"images of {split} without an object", paths[number])
        say_absent([name for name in report.classes if not counts[name]], f"in {file.name}", split, report.notes)
    return report


def _all_have_masks(contents: Sequence[dict[str, Any]], notes: Notes) -> bool:
    having = [bool(entry.get("segmentation")) for content in contents for entry in content["annotations"]]
    if any(having) and not all(having):
        notes.add(
            "annotations without a mask, while others have one: for detectors without masks only",
            count=having.count(False),
        )
    return all(having)


def _with_all(names: list[str], known: Sequence[str] | None) -> list[str]:
    """The known names if they contain all of the data's names, else the data's names."""
    return list(known) if known and set(names) <= set(known) else names
