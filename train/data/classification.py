"""Classification folders: the first folder below a split is the class; ImageNet's own archives too."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from hybridzoo.train.class_names import check_names, compare_with_model
from hybridzoo.train.data import imagenet
from hybridzoo.train.data.holdout import Holdout
from hybridzoo.train.data.looking import add_split, existing_folder, note_left_out, readable, say_absent
from hybridzoo.train.data.report import SPLIT_NAMES, How, Layout, Report, has_validation
from hybridzoo.train.errors import UserError
from hybridzoo.train.images import check_image, find_images, is_hidden, natural_key
from hybridzoo.train.notes import Notes


def inspect_classification(root: Path, how: How | None = None) -> Report:
    """Check a classification folder.

    The class names are the folders', in natural order, where "2" comes before "10".

    Raises:
        UserError: a missing or empty folder, a class in val that is not in train, an unreadable image.
    """
    how = how or How()
    root = existing_folder(Path(root), "data root")
    report = Report("classification", root, list(how.classes or ()))
    holdout = used_holdout(root, how)
    found: dict[str, list[tuple[Path, str]]] = {}
    if not report.classes and "train" not in how.splits and class_folders(root, "train") is not None:
        report.classes = sorted({name for _, name in classified_images(root, "train")}, key=natural_key)
    for split in how.splits:
        part = holdout.part(split == "val") if holdout is not None and split != "test" else None
        folder = existing_folder(split_folder(root, split, part), "image folder")
        found[split] = classified_images(root, split, report.notes, part)
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
        if how.classes:
            compare_with_model(sorted(filled, key=natural_key), how.classes, str(folder / "".join(unknown[:1])))
        if unknown:
            raise UserError(f"{folder / unknown[0]}: train has no class {unknown[0]!r}; it cannot be learned")
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
        if how.classes:
            say_absent([name for name in how.classes if not counts[name]], f"in {root / split}", split, report.notes)
    flat = any(imagenet.is_flat(split.images, split_folder(root, split.name)) for split in report.splits)
    report.layout = Layout({}, name="ImageNet's archives" if flat else "one folder for each class")
    return report


def class_folders(root: Path, split: str) -> Path | None:
    """The folder of a split, or None."""
    words = [*SPLIT_NAMES[split], f"ILSVRC2012_img_{split}"]
    return next((base / word for base in imagenet.roots(root) for word in words if (base / word).is_dir()), None)


def used_holdout(root: Path, how: How) -> Holdout | None:
    """How the training images are divided; a test needs no division if there is a validation set.

    Raises:
        UserError: a division is asked for, but the training data has a validation set.
    """
    if how.holdout is None or class_folders(root, "val") is None:
        return how.holdout
    if "train" in how.splits:
        raise has_validation(how.holdout, root)
    return None


def split_folder(root: Path, split: str, part: Holdout | None = None) -> Path:
    """The folder in which a split's images are, or should be.

    Args:
        part: a part of the training images, which may be in the root itself.
    """
    if part is not None and split != "test":
        return class_folders(root, "train") or root
    return class_folders(root, split) or root / split


def classified_images(
    root: Path, split: str, notes: Notes | None = None, part: Holdout | None = None
) -> list[tuple[Path, str]]:
    """(image, class name) of each image of a split, or of a part of the training images, in natural order.

    Raises:
        UserError: an image outside the class folders; a class with one image, which cannot be in both parts.
    """
    folder = split_folder(root, split, part)
    found = find_images(folder)
    note_left_out(found, folder, notes)
    if imagenet.is_flat(found.images, folder):
        return list(zip(found.images, imagenet.synsets(found.images, root), strict=True))
    named = [(path, path.relative_to(folder).parts[0]) for path in found.images]
    for path, name in named:
        if path == folder / name:
            raise UserError(f"image {path} is in no class folder; expected {folder}/<class name>/*.png")
    if part is None:
        return named
    kept = part.keep([str(path.relative_to(folder)) for path, _ in named], [name for _, name in named])
    return [pair for pair, keep in zip(named, kept, strict=True) if keep]
