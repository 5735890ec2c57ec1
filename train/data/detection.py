"""Detection folders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybridzoo.train import coco
from hybridzoo.train.data.looking import add_split, existing_folder, note_left_out, readable, say_absent
from hybridzoo.train.data.report import SPLITS, How, Layout, Place, Report
from hybridzoo.train.errors import UserError
from hybridzoo.train.images import check_image, find_images


def detection_layout(root: Path) -> Layout:
    """COCO's own layout if that is what lies there, else ours, whether it lies there or not."""
    places = {}
    for split in SPLITS:
        places[split] = Place(root / "images" / split, root / "annotations" / f"{split}.json")
        if places[split].labels.exists():
            continue
        for file in sorted((root / "annotations").glob(f"instances_{split}*.json")):
            name = file.stem.removeprefix("instances_")
            folder = next((above / name for above in (root, root / "images") if (above / name).is_dir()), None)
            if folder is not None:
                places[split] = Place(folder, file)
    return Layout(places)


def inspect_detection(
    root: Path, how: How | None = None, *, masks: bool = False, layout: Layout | None = None
) -> Report:
    """Look through a folder for detection.

    Args:
        layout: default what `detection_layout` finds.
        masks: also ask for a mask (polygons or run lengths) in every annotation, for instance segmentation.

    Raises:
        UserError: a missing or empty folder, a JSON file that is no COCO, an annotation that names a missing image or
            category or cannot be repaired, an image that is missing, unreadable or of another size than the JSON says.
    """
    how = how or How()
    root = existing_folder(Path(root), "data root")
    layout = layout or detection_layout(root)
    report = Report("detection", root, list(how.classes or ()))
    found: dict[str, tuple[Path, Path, dict[str, Any]]] = {}
    images: dict[str, list[Path]] = {}
    training = layout.places["train"].labels if "train" in layout.places else None
    if not report.classes and "train" not in how.splits and training and training.is_file():
        report.classes = _with_all(coco.class_names(coco.read(training)), layout.classes)
    for split in how.splits:
        folder, file = existing_folder(layout.places[split].images, "image folder"), layout.places[split].labels
        content = coco.read(file)
        found[split] = folder, file, content
        names = coco.class_names(content)
        if not report.classes:
            report.classes = _with_all(names, layout.classes)
        elif set(names) - set(report.classes) and not how.classes:
            extra = sorted(set(names) - set(report.classes))[0]
            first = training.name if training else "the first"
            raise UserError(
                f"{file.parent}: categories of {file.name} differ from {first}, which has no {extra!r}; "
                "give both the same list"
            )
        lying = find_images(folder)
        note_left_out(lying, folder, report.notes)
        images[split] = [folder / entry["file_name"] for entry in content["images"]]
        rest = set(images[split]) - set(lying.images)
        for path, entry in zip(images[split], content["images"], strict=True):
            if path in rest and not path.is_file():
                raise UserError(f"{file}: image id {entry['id']} names a missing file, {path}; add it or fix file_name")
        elsewhere = {path.resolve() for path in rest}  # named by another way, such as "../train/1.png"
        listed = set(images[split])
        for path in lying.images:
            if path not in listed and not (elsewhere and path.resolve() in elsewhere):
                report.notes.add(f"images that {file.name} does not list: left out", path)
    keep = readable(images, how, report, lambda path, full: check_image(path, full=full, white_value=how.white_value))
    for split, (folder, file, content) in found.items():
        fixed = coco.repaired(
            content, file, folder, classes=report.classes, masks=masks, skipped=report.skipped, notes=report.notes
        )
        labels = {category["id"]: category["name"] for category in fixed["categories"]}
        objects: dict[int, list[dict[str, Any]]] = {entry["id"]: [] for entry in fixed["images"]}
        for entry in fixed["annotations"]:
            objects[entry["image_id"]].append({**entry, "class": labels[entry["category_id"]]})
        counts = Counter(labels[entry["category_id"]] for entry in fixed["annotations"])
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


def _with_all(names: list[str], known: Sequence[str] | None) -> list[str]:
    """Known names in their order if they hold all of the data's names, else the data's."""
    return list(known) if known and set(names) <= set(known) else names
