"""Folder layouts of training data, and the checks that run before training starts.

A classification folder::

    ROOT/{train,val}/<class name>/**/*.png    any depth: the first folder is the class

A scenes folder, for detection, segmentation or both::

    ROOT/images/{train,val}/**/*.png
    ROOT/annotations/{train,val}.json   detection: COCO boxes, and polygons or run lengths for masks
    ROOT/masks/{train,val}/**/*.png     segmentation: one channel, the pixel's class id, 255 is ignored
    ROOT/classes.txt                    segmentation: a name per line, the first line names id 0

COCO and ADE20K as they are published count too, and whatever a config's datasets name, see `Layout`::

    ROOT/{train,val}2017/*.jpg, or below ROOT/images/; ROOT/annotations/instances_{train,val}2017.json
    ROOT/images/{training,validation}/*.jpg, ROOT/annotations/{training,validation}/*.png   0 is no class

Which pictures are read, and how, says `hybridzoo.train.images`; what annotations are repaired, `hybridzoo.train.coco`.
Every check names the first thing that is wrong, where, and what to do, as a UserError.  Images that cannot be decoded
stop the run or, with ``on_bad="skip"``, are counted and handed back in `Report.skipped`; everything else that is wrong
always stops it, because training would go on with wrong labels.  Of a split of more than `images.MANY` only a sample is
opened; what is wrong with the others shows when they are loaded.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from hybridzoo.train import coco
from hybridzoo.train.class_names import check_names
from hybridzoo.train.errors import UserError
from hybridzoo.train.images import (
    DARK,
    SAMPLE,
    Found,
    MaskError,
    check_image,
    find_images,
    is_hidden,
    looked_at,
    natural_key,
    read_mask,
    shown_size,
    without_zero,
)
from hybridzoo.train.notes import Notes

OnBad = Literal["stop", "skip"]
SPLITS = ("train", "val")
IGNORED = 255  # pixels of a mask that neither train nor score
FULL_DECODES = SAMPLE  # of a larger set this many, evenly spaced, are decoded; of the others the two ends are read
BAR_AFTER = 2.0  # seconds
Result = TypeVar("Result")


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
        if _first_process():
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


def is_ade20k(root: Path) -> bool:
    """Whether a folder has the layout of ADE20K, and not ours."""
    return not (root / "masks").exists() and all(
        (root / kind / "training").is_dir() for kind in ("images", "annotations")
    )


def ade20k_layout(root: Path, classes: Sequence[str] | None) -> Layout:
    """ADE20K's layout, with its class names or, by default, those of the folder's `classes.txt`."""
    folders = {"train": "training", "val": "validation"}
    places = {split: Place(root / "images" / name, root / "annotations" / name) for split, name in folders.items()}
    return Layout(places, classes, zero_is_none=True)


def segmentation_layout(root: Path) -> Layout:
    """Our own layout."""
    return Layout({split: Place(root / "images" / split, root / "masks" / split) for split in SPLITS})


def check_classification(root: Path, *, on_bad: OnBad = "stop", skipped: list[Path] | None = None) -> list[str]:
    """Check a classification folder and return its class names in the order of their ids.

    Args:
        on_bad: what to do about an image that cannot be decoded: "stop" or "skip".
        skipped: a list that collects those images when they are skipped.

    Raises:
        UserError: see `inspect_classification`.
    """
    return _classes(inspect_classification(root, How(on_bad)), skipped)


def check_detection(
    root: Path, *, masks: bool = False, on_bad: OnBad = "stop", skipped: list[Path] | None = None
) -> list[str]:
    """Check a scenes folder for detection, see `inspect_detection`; the rest as in `check_classification`."""
    return _classes(inspect_detection(root, How(on_bad), masks=masks), skipped)


def check_segmentation(root: Path, *, on_bad: OnBad = "stop", skipped: list[Path] | None = None) -> list[str]:
    """Check a scenes folder for segmentation, see `inspect_segmentation`; the rest as in `check_classification`."""
    return _classes(inspect_segmentation(root, How(on_bad)), skipped)


def inspect_classification(root: Path, how: How | None = None) -> Report:
    """Look through a classification folder.

    The class names are the folders', in natural order, where "2" comes before "10".

    Raises:
        UserError: a missing or empty folder, a class of val that train lacks, an unreadable image.
    """
    how = how or How()
    root = _folder(Path(root), "data root")
    report = Report("classification", root, list(how.classes or ()))
    found: dict[str, list[tuple[Path, str]]] = {}
    if not report.classes and "train" not in how.splits and (root / "train").is_dir():
        report.classes = sorted({name for _, name in classified_images(root, "train")}, key=natural_key)
    for split in how.splits:
        folder = _folder(root / split, "image folder")
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
    keep = _readable(images, how, report, lambda path, full: check_image(path, full=full, white_value=how.white_value))
    for split in how.splits:
        kept = [(path, name) for path, name in found[split] if path in keep]
        counts = Counter(name for _, name in kept)
        _add(
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
    _note_left_out(found, folder, notes)
    named = [(path, path.relative_to(folder).parts[0]) for path in found.images]
    for path, name in named:
        if path == folder / name:
            raise UserError(f"image {path} is in no class folder; expected {folder}/<class name>/*.png")
    return named


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
    root = _folder(Path(root), "data root")
    layout = layout or detection_layout(root)
    report = Report("detection", root, list(how.classes or ()))
    found: dict[str, tuple[Path, Path, dict[str, Any]]] = {}
    images: dict[str, list[Path]] = {}
    training = layout.places["train"].labels if "train" in layout.places else None
    if not report.classes and "train" not in how.splits and training and training.is_file():
        report.classes = _with_all(coco.class_names(coco.read(training)), layout.classes)
    for split in how.splits:
        folder, file = _folder(layout.places[split].images, "image folder"), layout.places[split].labels
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
        _note_left_out(lying, folder, report.notes)
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
    keep = _readable(images, how, report, lambda path, full: check_image(path, full=full, white_value=how.white_value))
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
        _add(report, split, kept_paths, [objects[number] for number in kept], shows, counts)
        report.splits[-1].sizes = Counter(sizes[number] for number in kept)
        for number in kept:
            if not objects[number]:
                report.notes.add(f"images of {split} without an object", paths[number])
        _say_absent([name for name in report.classes if not counts[name]], f"in {file.name}", split, report.notes)
    return report


def inspect_segmentation(root: Path, how: How | None = None, *, layout: Layout | None = None) -> Report:
    """Look through a folder for segmentation.

    Every mask is decoded: a wrong id is a wrong label.  A pair with a broken mask counts as a broken image.

    Args:
        layout: default our own.

    Raises:
        UserError: a missing or empty folder, an image without mask or a mask without image, two images of one name, a
            mask that is not one channel, differs from its image in size or holds a value out of range, masks with only
            one class in them.
    """
    how = how or How()
    root = _folder(Path(root), "data root")
    layout = layout or segmentation_layout(root)
    classes = list(layout.classes or _read_classes(root / "classes.txt"))
    if how.classes and list(how.classes) != classes:
        whose = f"data {root} has classes" if layout.classes else f"{root / 'classes.txt'} names"
        raise UserError(f"{whose} {', '.join(classes)}; the model knows {', '.join(how.classes)}")
    report = Report("segmentation", root, classes)
    found = {split: masked_images(layout.places[split], layout.suffixes, report.notes) for split in how.splits}
    masks = {image: mask for pairs in found.values() for image, mask in pairs}
    pixels: dict[Path, NDArray[np.int64]] = {}

    def check(image: Path, full: bool) -> int | None:
        highest = check_image(image, full=full, white_value=how.white_value)
        pixels[image] = _mask_pixels(image, masks[image], classes, layout.zero_is_none)
        return highest

    images = {split: [image for image, _ in pairs] for split, pairs in found.items()}
    keep = _readable(images, how, report, check, "checking images, masks")
    for split in how.splits:
        kept = [(image, mask) for image, mask in found[split] if image in keep]
        none = np.zeros(len(classes) + 1, np.int64)
        seen = [pixels[image] for image, _ in kept if image in pixels]
        total, present = sum(seen, none), sum((pixels > 0 for pixels in seen), none)
        counts = Counter({name: int(n) for name, n in zip(classes, present, strict=False)})
        shows = [{name for name, n in zip(classes, pixels.get(image, none), strict=False) if n} for image, _ in kept]
        _add(report, split, [image for image, _ in kept], [mask for _, mask in kept], shows, counts)
        report.splits[-1].pixels = {name: int(n) for name, n in zip(classes, total, strict=False)}
        _check_occurrence(split, layout, classes, total, len(kept) - len(seen), report.notes)
    return report


def masked_images(
    place: Place, suffixes: tuple[str, str] = ("", ""), notes: Notes | None = None
) -> list[tuple[Path, Path]]:
    """(image, mask) of each image of a split, in natural order: files of one path but for folder and suffix.

    Args:
        suffixes: see `Layout`; files with other ends are left out.

    Raises:
        UserError: a missing or empty folder, an image or mask without the other, two of one name.
    """
    named: dict[str, dict[str, Path]] = {}
    folders = {"images": place.images, "masks": place.labels}
    for (kind, folder), suffix in zip(folders.items(), suffixes, strict=True):
        found = find_images(_folder(folder, f"{kind[:-1]} folder"))
        found.others += [path for path in found.images if not path.name.endswith(suffix)]
        found.images = [path for path in found.images if path.name.endswith(suffix)]
        _note_left_out(found, folder, notes)
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
    return [(path, named["masks"][name]) for name, path in named["images"].items()]


# Parts ------------------------------------------------------------------------------------------------------------


def _classes(report: Report, skipped: list[Path] | None) -> list[str]:
    if skipped is not None:
        skipped += report.skipped
    return report.classes


def _first_process() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


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


def _folder(path: Path, what: str) -> Path:
    if not path.is_dir():
        raise UserError(f"{what} {path} {'is not a folder' if path.exists() else 'does not exist'}")
    return path


def _with_all(names: list[str], known: Sequence[str] | None) -> list[str]:
    """Known names in their order if they hold all of the data's names, else the data's."""
    return list(known) if known and set(names) <= set(known) else names


def _note_left_out(found: Found, folder: Path, notes: Notes | None) -> None:
    if notes is None:
        return
    for path in found.hidden:
        notes.add("hidden or system files or folders: left out", path)
    for path in found.others:
        notes.add("files that are no pictures by their suffix, or links in a circle: left out", path)


def _add(
    report: Report, split: str, images: list[Path], labels: list[Any], shows: list[set[str]], counts: Counter[str]
) -> None:
    sizes = Counter(shown_size(path)[0] for path in looked_at(images))
    by_class = {name: counts[name] for name in report.classes}
    report.splits.append(Split(split, images, sizes, by_class, labels, shows))


def _mask_pixels(image: Path, mask: Path, classes: Sequence[str], zero_is_none: bool) -> NDArray[np.int64]:
    """Pixels of each class in a mask, and last those that are ignored.

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
    """Say which classes the masks of a split never show.

    Raises:
        UserError: training masks with fewer than two classes, of which nothing can be learned.
    """
    absent = [name for name, pixels in zip(classes, total, strict=False) if not pixels]
    what = f"0 or {IGNORED}, which are" if layout.zero_is_none else f"{IGNORED}, which is"
    ignored = f"; {total[-1] / total.sum():.0%} of the pixels are {what} ignored" if total[-1] else ""
    if split == "train" and len(classes) - len(absent) < 2:
        raise UserError(
            f"masks of {layout.places[split].labels}: {_listed(absent)} never occurs{ignored}; "
            f"store the ids {int(layout.zero_is_none)} to {len(classes) - 1 + layout.zero_is_none}"
        )
    if absent and unseen:
        notes.say(f"{_listed(absent)} never occurs in the masks of {split} that were looked at")
    else:
        _say_absent(absent, f"in the masks of {split}{ignored}", split, notes)


def _say_absent(absent: Sequence[str], where: str, split: str, notes: Notes) -> None:
    if absent:
        lost = "it cannot be learned" if split == "train" else "it is not measured"
        notes.say(f"{_listed(absent)} never occurs {where}: {lost}")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return "class " + ", ".join(map(repr, names[:20])) + more


def _readable(
    splits: Mapping[str, Sequence[Path]],
    how: How,
    report: Report,
    check: Callable[[Path, bool], int | None],
    what: str = "checking images",
) -> set[Path]:
    """The images that can be decoded; stop at others, or note them and add them to `report.skipped`.

    Those of a large split that are not looked at count as good.

    Args:
        splits: images of each split.
        check: (image, whether to decode it) -> the highest value if it is deep, see `Picture.highest`.

    Raises:
        UserError: an image that cannot be decoded, unless such are skipped; none that can; 16-bit images that are dark.
        MaskError: a wrong label.
    """
    images: list[Path] = []
    for split, all_of_it in splits.items():
        chosen = looked_at(all_of_it)
        images += chosen
        if len(chosen) < len(all_of_it):
            report.notes.say(
                f"{len(chosen):,} of {len(all_of_it):,} images of {split}, evenly spaced, are looked at now, "
                "the others when they are loaded"
            )
    stride = max(1, math.ceil(len(images) / FULL_DECODES))
    bad: list[tuple[Path, str]] = []
    deep: list[tuple[int, Path]] = []

    def work(index: int) -> int | UserError | None:
        try:
            return check(images[index], index % stride == 0)
        except MaskError:
            raise
        except UserError as error:
            return error

    for path, result in zip(images, _each(len(images), work, what), strict=True):
        if isinstance(result, UserError):
            bad.append((path, str(result)))
        elif result is not None:
            deep.append((result, path))
    if bad:
        _settle(bad, len(images), how.on_bad, report)
    highest = max(deep)[0] if deep else 0
    if 0 < highest < 4 * DARK and how.white_value is None:
        guess = 2 ** highest.bit_length() - 1
        raise UserError(
            f"{len(deep)} of {len(images)} images hold 16 bits and no value above {highest}, so that all of them would "
            f"be dark; the first: {deep[0][1]}; set white_value={guess}, or what else is white in them"
        )
    left = {path for path, _ in bad}
    return {path for paths in splits.values() for path in paths if path not in left}


def _settle(bad: Sequence[tuple[Path, str]], count: int, on_bad: OnBad, report: Report) -> None:
    first = bad[0][1]
    if on_bad == "stop":
        more = f" (and {len(bad) - 1} more like it)" if len(bad) > 1 else ""
        raise UserError(f"image cannot be read: {first}{more}; replace it, or train without with --on-bad-image skip")
    if len(bad) == count:
        raise UserError(f"none of {count} images can be read; the first: {first}")
    if _first_process():
        print(f"skipping {len(bad)} of {count} images, which cannot be read; the first: {first}")
    report.skipped += [path for path, _ in bad]


def _each(count: int, work: Callable[[int], Result], what: str) -> Iterator[Result]:
    """`work(index)` for 0..count-1 on threads (decoding releases the GIL), in order, with a bar if it takes longer."""
    chunk = 64
    parts = [range(first, min(first + chunk, count)) for first in range(0, count, chunk)]
    console = Console(stderr=True)
    bar = Progress(console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(what, total=count)
    began = time.monotonic()
    pool = ThreadPoolExecutor(min(16, (os.cpu_count() or 1) + 2))
    try:
        for results in pool.map(lambda part: [work(index) for index in part], parts):
            if not bar.live.is_started and time.monotonic() - began > BAR_AFTER:
                bar.start()
            bar.update(task, advance=len(results))
            yield from results
    finally:
        bar.stop()
        pool.shutdown(cancel_futures=True)
