"""Classification folders."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from hybridzoo.train.class_names import check_names
from hybridzoo.train.data.looking import add_split, existing_folder, note_left_out, readable
from hybridzoo.train.data.report import How, Report
from hybridzoo.train.errors import UserError
from hybridzoo.train.images import check_image, find_images, is_hidden, natural_key
from hybridzoo.train.notes import Notes


def inspect_classification(root: Path, how: How | None = None) -> Report:
    """Look through a classification folder.

    The class names are the folders', in natural order, where "2" comes before "10".

    Raises:
        UserError: a missing or empty folder, a class of val that train lacks, an unreadable image.
    """
    how = how or How()
    root = existing_folder(Path(root), "data root")
    report = Report("classification", root, list(how.classes or ()))
    found: dict[str, list[tuple[Path, str]]] = {}
    if not report.classes and "train" not in how.splits and (root / "train").is_dir():
        report.classes = sorted({name for _, name in classified_images(root, "train")}, key=natural_key)
    for split in how.splits:
        folder = existing_folder(root / split, "image folder")
        found[split] = classified_images(root, split, report.notes)
        if not found[split]:
            raise UserError(f"image folder {folder} holds no images; expected {folder}/<class name>/*.png")
        filled = {name for _, name in found[split]}
        check_names(sorted(filled), f"{folder}: class folder")
        empty = sorted(
            p.name for p in folder.iterdir() if p.is_dir() and not is_hidden(p.name) and p.name not in filled
        )
        if split == "train" and empty:
            raise UserError(f"class folder {folder / empty[0]} holds no images; add some or remove the folder")
        if split == "train" and not how.classes:
            report.classes = sorted(filled, key=natural_key)
        unknown = sorted(filled - set(report.classes)) if report.classes else []
        if unknown:
            who, what = ("the model", "scored") if how.classes else ("train", "learned")
            raise UserError(f"{folder / unknown[0]}: {who} has no class {unknown[0]!r}; it cannot be {what}")
        if not report.classes:
            report.classes = sorted(filled, key=natural_key)
    images = {split: [path for path, _ in found[split]] for split in how.splits}
    keep = readable(images, how, report, lambda path, full: check_image(path, full=full, white_value=how.white_value))
    for split in how.splits:
        kept = [(path, name) for path, name in found[split] if path in keep]
        counts = Counter(name for _, name in kept)
        add_split(
            report, split, [path for path, _ in kept], [name for _, name in kept], [{name} for _, name in kept], counts
        )
    return report


def classified_images(root: Path, split: str, notes: Notes | None = None) -> list[tuple[Path, str]]:
    """(image, class name) of each image of a split, in natural order.

    Raises:
        UserError: an image that lies in no class folder.
    """
    folder = root / split
    found = find_images(folder)
    note_left_out(found, folder, notes)
    named = [(path, path.relative_to(folder).parts[0]) for path in found.images]
    for path, name in named:
        if path == folder / name:
            raise UserError(f"image {path} is in no class folder; expected {folder}/<class name>/*.png")
    return named
