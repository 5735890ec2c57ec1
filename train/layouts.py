"""Folder layouts of training data, and the checks that run before training starts.

A classification folder::

    ROOT/{train,val}/<class name>/*.png

A scenes folder, for detection, segmentation or both::

    ROOT/images/{train,val}/*.png
    ROOT/annotations/{train,val}.json   detection: COCO boxes, and polygons or run lengths for masks
    ROOT/masks/{train,val}/*.png        segmentation: one channel, the pixel's class id, 255 is ignored
    ROOT/classes.txt                    segmentation: a name per line, the first line names id 0

Every check names the first thing that is wrong, where, and what to do, as a UserError.  Images that cannot be decoded
stop the run or, with ``on_bad="skip"``, are counted, printed and handed back in `skipped`; everything else that is
wrong always stops it, because training would go on with wrong labels.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import track
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.utils.misc import natural_key

from hybridzoo.train.errors import UserError

OnBad = Literal["stop", "skip"]
SPLITS = ("train", "val")
IGNORED = 255  # pixels of a mask that neither train nor score
FULL_DECODES = 10_000  # of a larger set this many, evenly spaced, are decoded; of the others the two ends are read

_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises for broken files
_END_MARKS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9"}
_COCO_KEYS = {
    "images": ("id", "file_name", "width", "height"),
    "categories": ("id", "name"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
}


def check_classification(root: Path, *, on_bad: OnBad = "stop", skipped: list[Path] | None = None) -> list[str]:
    """Check a classification folder.

    Args:
        on_bad: what to do about an image that cannot be decoded: "stop" or "skip".
        skipped: a list that collects those images when they are skipped.

    Returns:
        Class names in the order of their ids: timm's order, where "2" comes before "10".

    Raises:
        UserError: a missing or empty folder, a class of val that train lacks, an unreadable image.
    """
    root = _folder(Path(root), "data root")
    images: list[Path] = []
    names: dict[str, set[str]] = {}
    for split in SPLITS:
        folder = _folder(root / split, "image folder")
        found, classes = find_images_and_targets(str(folder))
        if not found:
            raise UserError(f"image folder {folder} holds no images; expected {folder}/<class name>/*.png")
        if "" in classes:
            first = next(path for path, label in found if label == classes[""])
            raise UserError(f"image {first} is in no class folder; expected {folder}/<class name>/*.png")
        paths = [Path(path) for path, _ in found]
        filled = {path.relative_to(folder).parts[0] for path in paths}
        empty = sorted(inner.name for inner in folder.iterdir() if inner.is_dir() and inner.name not in filled)
        if split == "train" and empty:
            raise UserError(f"class folder {folder / empty[0]} holds no images; add some or remove the folder")
        names[split] = set(classes)
        images += paths
    unknown = sorted(names["val"] - names["train"])
    if unknown:
        raise UserError(f"{root / 'val' / unknown[0]}: train has no class {unknown[0]!r}; it cannot be learned")
    problems = _problems(len(images), lambda i, full: _image_problem(images[i], full), "checking images")
    _settle(problems, images, on_bad, skipped)
    return sorted(names["train"], key=natural_key)


def check_detection(
    root: Path, *, masks: bool = False, on_bad: OnBad = "stop", skipped: list[Path] | None = None
) -> list[str]:
    """Check a scenes folder for detection.

    Args:
        masks: also ask for a mask (polygons or run lengths) in every annotation, for instance segmentation.
        on_bad, skipped: as in `check_classification`.

    Returns:
        Class names in the order of the JSON's categories.

    Raises:
        UserError: a missing or empty folder, a JSON file that is no COCO, an annotation that names a missing image or
            category, a box that is no box, an image that is missing, unreadable or of another size than the JSON says.
    """
    root = _folder(Path(root), "data root")
    categories: dict[str, list[tuple[int, str]]] = {}
    images: list[Path] = []
    sizes: list[tuple[int, int]] = []
    for split in SPLITS:
        folder = _folder(root / "images" / split, "image folder")
        file = root / "annotations" / f"{split}.json"
        coco = _read_coco(file)
        categories[split] = _check_coco(coco, file, masks)
        for entry in coco["images"]:
            path = folder / entry["file_name"]
            if not path.is_file():
                raise UserError(f"{file}: image id {entry['id']} names a missing file, {path}; add it or fix file_name")
            images.append(path)
            sizes.append((entry["width"], entry["height"]))
    if categories["train"] != categories["val"]:
        raise UserError(f"{root}/annotations: categories of val.json differ from train.json; give both the same list")
    problems = _problems(len(images), lambda i, full: _image_problem(images[i], full, sizes[i]), "checking images")
    _settle(problems, images, on_bad, skipped)
    return [name for _, name in categories["train"]]


def check_segmentation(root: Path, *, on_bad: OnBad = "stop", skipped: list[Path] | None = None) -> list[str]:
    """Check a scenes folder for segmentation.

    Args:
        on_bad, skipped: as in `check_classification`; a pair with a broken mask counts as a broken image.

    Returns:
        Class names, the lines of classes.txt: name i belongs to the mask value i.

    Raises:
        UserError: a missing or empty folder, an image without mask or a mask without image, images of two suffixes in
            one folder, a mask that is not one channel, differs from its image in size or holds a value out of range.
    """
    root = _folder(Path(root), "data root")
    classes = _read_classes(root / "classes.txt")
    pairs: list[tuple[Path, Path]] = []
    suffixes: dict[str, set[str]] = {"images": set(), "masks": set()}
    for split in SPLITS:
        found: dict[str, dict[str, Path]] = {}
        for kind in ("images", "masks"):
            folder = _folder(root / kind / split, f"{kind[:-1]} folder")
            files = sorted(path for path in folder.iterdir() if path.suffix.lower() in get_img_extensions())
            found[kind] = {path.stem: path for path in files}
            suffixes[kind].update(path.suffix for path in files)
            if not files:
                raise UserError(f"{kind[:-1]} folder {folder} holds no images")
            if len(suffixes[kind]) > 1:
                raise UserError(f"{root / kind} mixes {' and '.join(sorted(suffixes[kind]))}; use one suffix")
        for one, other in (("images", "masks"), ("masks", "images")):
            alone = sorted(found[one].keys() - found[other].keys())
            if alone:
                path = found[one][alone[0]]
                raise UserError(f"{one[:-1]} {path} has no {other[:-1]} in {root / other / split}; add or remove one")
        pairs += [(found["images"][stem], found["masks"][stem]) for stem in sorted(found["images"])]
    problems = _problems(len(pairs), lambda i, full: _pair_problem(*pairs[i], full, classes), "checking images, masks")
    _settle(problems, [image for image, _ in pairs], on_bad, skipped)
    return classes


# Files of a scenes folder ------------------------------------------------------------------------------------------


def _read_classes(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read; write one class name a line, first the name of id 0") from error
    names = [line.strip() for line in lines if line.strip()]
    if not 2 <= len(names) <= IGNORED:
        raise UserError(f"{file} names {len(names)} classes; give 2 to {IGNORED}, one a line, first the name of id 0")
    _unique(names, f"{file}: class")
    return names


def _read_coco(file: Path) -> dict[str, Any]:
    try:
        coco = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"annotation file {file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"annotation file {file} is no JSON: {error}") from error
    for key, needed in _COCO_KEYS.items():
        entries = coco.get(key) if isinstance(coco, dict) else None
        if not isinstance(entries, list) or not entries:
            raise UserError(f"annotation file {file} has no list of {key!r}, or an empty one; expected COCO's format")
        for index, entry in enumerate(entries):
            missing = [name for name in needed if not isinstance(entry, dict) or name not in entry]
            if missing:
                raise UserError(f"{file}: {key}[{index}] has no {missing[0]!r}")
    return coco


def _check_coco(coco: dict[str, Any], file: Path, masks: bool) -> list[tuple[int, str]]:
    """(id, name) of each category, after looking at everything that needs no image."""
    for key in _COCO_KEYS:
        _unique([entry["id"] for entry in coco[key]], f"{file}: id in {key}")
    _unique([category["name"] for category in coco["categories"]], f"{file}: category")
    images = {entry["id"] for entry in coco["images"]}
    categories = [(int(category["id"]), str(category["name"])) for category in coco["categories"]]
    ids = [category for category, _ in categories]
    for entry in coco["annotations"]:
        where = f"{file}: annotation id {entry['id']}"
        if entry["image_id"] not in images:
            raise UserError(f"{where} names image id {entry['image_id']}, which is not in 'images'; add or remove one")
        if entry["category_id"] not in ids:
            span = f"{min(ids)}..{max(ids)}" if len(ids) > 1 else f"{ids[0]}"
            raise UserError(f"{where} has category_id {entry['category_id']}; the categories are {span}")
        box = entry["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and all(_finite(side) for side in box) and min(box[2:]) >= 0):
            raise UserError(f"{where} has bbox {box!r}; expected [left, top, width, height] in pixels")
        if masks and not entry.get("segmentation"):
            raise UserError(f"{where} has no segmentation; add polygons or run lengths, or choose a detector of boxes")
    return categories


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _unique(values: Sequence[Any], what: str) -> None:
    value, count = Counter(values).most_common(1)[0]
    if count > 1:
        raise UserError(f"{what} {value!r} appears {count} times; give each its own")


def _folder(path: Path, what: str) -> Path:
    if not path.is_dir():
        raise UserError(f"{what} {path} {'is not a folder' if path.exists() else 'does not exist'}")
    return path


# Images -----------------------------------------------------------------------------------------------------------


def _image_problem(path: Path, full: bool, size: tuple[int, int] | None = None) -> str | None:
    """Why an image cannot be decoded, or None.

    Args:
        full: decode every pixel; else the header, and the end mark of a PNG or JPEG.
        size: width and height that the annotations give.
    """
    try:
        with Image.open(path) as image:
            actual = image.size
            if full or not _ends_well(path, image.format):
                image.load()
    except _UNREADABLE as error:
        return _reason(error)
    if size is not None and sorted(size) != sorted(actual):  # sorted: a camera's rotation flag swaps the two
        raise UserError(f"image {path} is {actual[0]}x{actual[1]}, its annotation says {size[0]}x{size[1]}; correct it")
    return None


def _pair_problem(image: Path, mask: Path, full: bool, classes: Sequence[str]) -> str | None:
    """Why an image or its mask cannot be decoded, or None."""
    problem = _image_problem(image, full)
    if problem is not None:
        return problem
    try:
        with Image.open(image) as picture, Image.open(mask) as labels:
            sizes, channels = (picture.size, labels.size), len(labels.getbands())
            highest = _highest_id(np.asarray(labels)) if full and channels == 1 else 0
    except _UNREADABLE as error:
        return f"its mask {mask}: {_reason(error)}"
    if channels != 1:
        raise UserError(f"mask {mask} has {channels} channels; expected one, which holds class ids")
    if sorted(sizes[0]) != sorted(sizes[1]):
        raise UserError(
            f"mask {mask} is {sizes[1][0]}x{sizes[1][1]}, its image {sizes[0][0]}x{sizes[0][1]}; correct it"
        )
    if highest >= len(classes):
        raise UserError(
            f"mask {mask} holds value {highest}; classes.txt names ids 0..{len(classes) - 1}, and {IGNORED} is ignored"
        )
    return None


def _highest_id(mask: NDArray[Any]) -> int:
    return int(np.max(mask, where=mask != IGNORED, initial=0))


def _ends_well(path: Path, image_format: str | None) -> bool:
    mark = _END_MARKS.get(image_format or "")
    if mark is None:
        return False
    with path.open("rb") as file:
        file.seek(-len(mark), os.SEEK_END)
        return file.read() == mark


def _reason(error: BaseException) -> str:
    return "not an image" if isinstance(error, UnidentifiedImageError) else str(error).splitlines()[0]


def _problems(count: int, problem: Callable[[int, bool], str | None], what: str) -> list[str | None]:
    """`problem(index, full)` for 0..count-1, on threads (decoding releases the GIL) and with a progress bar."""
    stride = max(1, math.ceil(count / FULL_DECODES))
    chunk = 64
    parts = [range(first, min(first + chunk, count)) for first in range(0, count, chunk)]

    def work(part: range) -> list[str | None]:
        return [problem(index, index % stride == 0) for index in part]

    quiet = Console(stderr=True)
    bar = track(range(len(parts)), what, console=quiet, transient=True, disable=not quiet.is_terminal)
    pool = ThreadPoolExecutor(min(16, (os.cpu_count() or 1) + 2))
    try:
        results = pool.map(work, parts)
        return [found for _ in bar for found in next(results)]
    finally:
        pool.shutdown(cancel_futures=True)


def _settle(problems: Sequence[str | None], images: Sequence[Path], on_bad: OnBad, skipped: list[Path] | None) -> None:
    """Stop at images that cannot be decoded, or print their number and add them to `skipped`."""
    bad = [(path, problem) for path, problem in zip(images, problems, strict=True) if problem is not None]
    if not bad:
        return
    first = f"{bad[0][0]}: {bad[0][1]}"
    if on_bad == "stop":
        more = f" (and {len(bad) - 1} more like it)" if len(bad) > 1 else ""
        raise UserError(f"image cannot be read: {first}{more}; replace it, or train without with --on-bad-image skip")
    if len(bad) == len(images):
        raise UserError(f"none of {len(images)} images can be read; the first: {first}")
    print(f"skipping {len(bad)} of {len(images)} images, which cannot be read; the first: {first}")
    if skipped is not None:
        skipped += [path for path, _ in bad]
