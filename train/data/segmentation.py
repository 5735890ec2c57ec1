"""Segmentation folders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybridzoo.train.class_names import check_names, compare_with_model
from hybridzoo.train.data.looking import add_split, existing_folder, listed, note_left_out, readable, say_absent
from hybridzoo.train.data.report import IGNORED, SPLIT_NAMES, How, Layout, Place, Report, divided
from hybridzoo.train.errors import UserError
from hybridzoo.train.images import MaskError, check_image, find_images, read_mask, shown_size, without_zero
from hybridzoo.train.notes import Notes

CITYSCAPES = {  # class -> the value in `*_labelIds.png`; the benchmark's 19 classes, by cityscapesScripts
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
    "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26,
    "truck": 27, "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}  # fmt: skip


def ade20k_root(root: Path) -> Path:
    """The folder with ADE20K's two folders: the root, or the published archive's folder inside it."""
    inner = root / "ADEChallengeData2016"
    return inner if inner.is_dir() and not (root / "images").exists() else root


def is_ade20k(root: Path) -> bool:
    """Whether a folder has ADE20K's layout, and not ours."""
    root = ade20k_root(root)
    return not (root / "masks").exists() and all(
        (root / kind / "training").is_dir() for kind in ("images", "annotations")
    )


def ade20k_layout(root: Path, classes: Sequence[str] | None) -> Layout:
    """ADE20K's layout, with its class names or, by default, those of the folder's `classes.txt`."""
    root = ade20k_root(root)
    folders = {"train": "training", "val": "validation", "test": "testing"}
    places = {split: Place(root / "images" / name, root / "annotations" / name) for split, name in folders.items()}
    return Layout(places, classes, zero_is_none=True, name="ADE20K")


def is_cityscapes(root: Path) -> bool:
    """Whether a folder has the layout of Cityscapes."""
    return (root / "leftImg8bit").is_dir() and (root / "gtFine").is_dir()


def cityscapes_layout(root: Path) -> Layout:
    """Cityscapes' layout, with the masks from its scripts (`labelTrainIds`) if they exist."""
    made = next((root / "gtFine").glob("*/*/*_gtFine_labelTrainIds.png"), None) is not None
    places = {split: Place(root / "leftImg8bit" / split, root / "gtFine" / split) for split in SPLIT_NAMES}
    kind = "labelTrainIds" if made else "labelIds"
    return Layout(
        places,
        list(CITYSCAPES),
        suffixes=("_leftImg8bit.png", f"_gtFine_{kind}.png"),
        stored=None if made else list(CITYSCAPES.values()),
        name=f"Cityscapes ({kind})",
    )


def segmentation_layout(root: Path) -> Layout:
    """Cityscapes' layout if the folder has it, otherwise ours."""
    if is_cityscapes(root):
        return cityscapes_layout(root)
    places = {split: Place(root / "images" / split, root / "masks" / split) for split in SPLIT_NAMES}
    return Layout(places, name="images/ and masks/")


def inspect_segmentation(root: Path, how: How | None = None, *, layout: Layout | None = None) -> Report:
    """Check a folder for segmentation.

    Every mask is decoded, because a wrong id is a wrong label. A pair with a broken mask counts as a broken image.

    Args:
        layout: default our own.

    Raises:
        UserError: a missing or empty folder, an image without mask or a mask without image, two images of one name, a
            mask that is not one channel, differs from its image in size or holds a value out of range, masks with only
            one class in them.
    """
    how = how or How()
    root = existing_folder(Path(root), "data root")
    layout = divided(layout or segmentation_layout(root), how, root)
    classes = list(layout.classes or _read_classes(root / "classes.txt"))
    known = list(how.classes or classes)
    compare_with_model(classes, known, f"data {root}" if layout.classes else str(root / "classes.txt"))
    report = Report("segmentation", root, known, layout=_in_order(layout, classes, known))
    found = {split: masked_images(layout.places[split], layout.suffixes, report.notes) for split in how.splits}
    masks = {image: mask for pairs in found.values() for image, mask in pairs}
    pixels: dict[Path, NDArray[np.int64]] = {}

    def check(image: Path, full: bool) -> int | None:
        highest = check_image(image, full=full, white_value=how.white_value)
        pixels[image] = _mask_pixels(image, masks[image], classes, layout)
        return highest

    images = {split: [image for image, _ in pairs] for split, pairs in found.items()}
    keep = readable(images, how, report, check, "checking images, masks")
    for split in how.splits:
        kept = [(image, mask) for image, mask in found[split] if image in keep]
        none = np.zeros(len(classes) + 1, np.int64)
        seen = [pixels[image] for image, _ in kept if image in pixels]
        total, present = sum(seen, none), sum((pixels > 0 for pixels in seen), none)
        counts = Counter({name: int(n) for name, n in zip(classes, present, strict=False)})
        shows = [{name for name, n in zip(classes, pixels.get(image, none), strict=False) if n} for image, _ in kept]
        add_split(report, split, [image for image, _ in kept], [mask for _, mask in kept], shows, counts)
        pixel_counts = dict(zip(classes, map(int, total), strict=False))
        report.splits[-1].pixels = {name: pixel_counts.get(name, 0) for name in known}
        _check_occurrence(split, layout, classes, total, len(kept) - len(seen), report.notes)
        say_absent([name for name in known if name not in classes], "in these data", split, report.notes)
    return report


def masked_images(
    place: Place, suffixes: tuple[str, str] = ("", ""), notes: Notes | None = None
) -> list[tuple[Path, Path]]:
    """(image, mask) of each image of a split, in natural order: files whose paths differ in folder and suffix only.

    Args:
        suffixes: see `Layout`; files with other endings are left out.

    Raises:
        UserError: a missing or empty folder, an image without a mask or the reverse, two files with one name.
    """
    named: dict[str, dict[str, Path]] = {}
    folders = {"images": place.images, "masks": place.labels}
    for (kind, folder), suffix in zip(folders.items(), suffixes, strict=True):
        found = find_images(existing_folder(folder, f"{kind[:-1]} folder"))
        found.others += [
            path for path in found.images if not path.name.endswith(suffix) and "_gtFine_" not in path.name
        ]
        found.images = [path for path in found.images if path.name.endswith(suffix)]
        note_left_out(found, folder, notes)
        if not found.images:
            raise UserError(f"{kind[:-1]} folder {folder} holds no images")
        named[kind] = {}
        for path in found.images:
            name = str(path.relative_to(folder))[: -len(suffix or path.suffix)]
            if name in named[kind]:
                raise UserError(
                    f"{kind[:-1]} {path} and {named[kind][name].name} differ in their suffix only; keep one"
                )
            named[kind][name] = path
    for one, other in (("images", "masks"), ("masks", "images")):
        alone = [name for name in named[one] if name not in named[other]]
        if alone:
            path = named[one][alone[0]]
            raise UserError(f"{one[:-1]} {path} has no {other[:-1]} in {folders[other]}; add or remove one")
    kept = place.holdout.keep(list(named["images"])) if place.holdout is not None else [True] * len(named["images"])
    pairs = [(path, named["masks"][name]) for name, path in named["images"].items()]
    return [pair for pair, keep in zip(pairs, kept, strict=True) if keep]


def _in_order(layout: Layout, classes: Sequence[str], known: Sequence[str]) -> Layout:
    """The same layout with a trained model's classes in its order; `stored` maps the masks' values to them.

    Args:
        classes: the data's, in the order of the masks' values.
        known: the model's classes, which include all of the data's; further ones have no value in the masks.
    """
    if list(classes) == list(known):
        return layout
    values = layout.stored or [number + layout.zero_is_none for number in range(len(classes))]
    value_of = dict(zip(classes, values, strict=True))
    return replace(layout, classes=list(known), stored=[value_of.get(name, -1) for name in known], zero_is_none=False)


def class_ids(ids: NDArray[Any], layout: Layout) -> NDArray[Any]:
    """Class indices of a mask in a layout, `IGNORED` for pixels without a class."""
    if layout.stored is not None:
        return renumbered(ids, layout.stored)
    return without_zero(ids) if layout.zero_is_none else ids


def renumbered(ids: NDArray[Any], stored: Sequence[int]) -> NDArray[np.uint8]:
    """Class indices of a mask with other values: `stored[k]` becomes k, every other value 255."""
    new = np.full(ids.shape, IGNORED, np.uint8)
    for number, value in enumerate(stored):
        new[ids == value] = number
    return new


def _read_classes(file: Path) -> list[str]:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read; write one class name a line in UTF-8, first that of id 0") from error
    names = [line.strip() for line in text.rstrip().split("\n")] if text.strip() else []
    if not 2 <= len(names) <= IGNORED:
        raise UserError(f"{file} names {len(names)} classes; give 2 to {IGNORED}, one a line, first the name of id 0")
    if "" in names:
        line = names.index("") + 1
        raise UserError(f"{file}: line {line} is empty; name the class of id {line - 1} there, or remove the line")
    check_names(names, f"{file}: class")
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise UserError(f"{file}: class {name!r} appears {count} times; give each its own")
    return names


def _mask_pixels(image: Path, mask: Path, classes: Sequence[str], layout: Layout) -> NDArray[np.int64]:
    """Pixels of each class in a mask; the last entry counts ignored pixels.

    Raises:
        MaskError: the mask does not fit its image or the classes.
        UserError: it cannot be decoded.
    """
    try:
        ids = read_mask(mask)
    except MaskError:
        raise
    except UserError as error:
        raise UserError(f"{image}: its {error}") from error
    (width, height), turned = shown_size(image)
    if ids.shape != (height, width):
        because = " as its EXIF orientation shows it" if turned else ""
        raise MaskError(
            f"mask {mask} is {ids.shape[1]}x{ids.shape[0]}, its image {width}x{height}{because}; correct it"
        )
    zero_is_none = layout.zero_is_none
    if layout.stored is not None:
        ids = renumbered(ids, layout.stored)
    learned = ids != IGNORED
    low, high = int(np.min(ids)), int(np.max(ids, where=learned, initial=0))
    if low < 0 or high >= len(classes) + zero_is_none:
        known = (
            f"1..{len(classes)}, and 0 and {IGNORED} are"
            if zero_is_none
            else f"0..{len(classes) - 1}, and {IGNORED} is"
        )
        raise MaskError(f"mask {mask} holds value {low if low < 0 else high}; the classes have ids {known} ignored")
    if zero_is_none:
        ids = without_zero(ids)
    counts = np.bincount(ids.ravel(), minlength=IGNORED + 1)
    return np.append(counts[: len(classes)], counts[IGNORED] if len(classes) <= IGNORED else 0)


def _check_occurrence(
    split: str, layout: Layout, classes: Sequence[str], total: NDArray[np.int64], unseen: int, notes: Notes
) -> None:
    """Report classes that occur in no mask of a split.

    Raises:
        UserError: training masks with fewer than two classes.
    """
    absent = [name for name, pixels in zip(classes, total, strict=False) if not pixels]
    what = f"0 or {IGNORED}, which are" if layout.zero_is_none else f"{IGNORED}, which is"
    ignored = f"; {total[-1] / total.sum():.0%} of the pixels are {what} ignored" if total[-1] else ""
    if split == "train" and len(classes) - len(absent) < 2:
        raise UserError(
            f"masks of {layout.places[split].labels}: {listed(absent)} never occurs{ignored}; "
            f"store the ids {int(layout.zero_is_none)} to {len(classes) - 1 + layout.zero_is_none}"
        )
    if absent and unseen:
        notes.say(f"{listed(absent)} never occurs in the masks of {split} that were checked")
    else:
        say_absent(absent, f"in the masks of {split}{ignored}", split, notes)
