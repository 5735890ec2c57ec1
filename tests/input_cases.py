"""What is done with data as people have them: one list for the tests and for the table in docs/input.md.

A case is a data folder, what it is, and what is done with it; `right` is the number of training images that are used,
or the words of the refusal; `said` is what the check says beside.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import data_folders as folders
import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Case:
    task: str
    what: str
    done: str
    make: Callable[[Path], Any]
    right: int | str
    said: str = ""


def cases(task: str) -> list[Case]:
    return [case for case in CASES if case.task == task]


# Classification ---------------------------------------------------------------------------------------------------


def hidden(root: Path) -> None:
    folders.classification(root)
    for inner in ("train/.ipynb_checkpoints", "train/chelsea/.ipynb_checkpoints", "train/@eaDir"):
        (root / inner).mkdir()
        folders.crop("coffee").save(root / inner / "0-checkpoint.png")
    (root / "train/chelsea/._0.png").write_bytes(b"\0\5\x16\7 no picture")
    (root / "train/chelsea/Thumbs.db").touch()


def suffixes(root: Path) -> None:
    kinds = (".png", ".webp", ".tif", ".JPG")
    folders.classification(root, save=lambda image, path, i: image.save(path.with_suffix(kinds[i % 4])))


def deep(factor: int) -> Callable[[Path], Any]:
    def save(image: Image.Image, path: Path, _: int) -> None:
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * factor).save(path.with_suffix(".png"))

    return lambda root: folders.classification(root, save=save)


def linked(root: Path) -> None:
    folders.classification(root)
    shutil.move(root / "train/chelsea", root / "elsewhere")
    (root / "train/chelsea").symlink_to(root / "elsewhere")
    (root / "elsewhere" / "circle").symlink_to(root / "train")


def with_file(name: str, content: bytes) -> Callable[[Path], Any]:
    def make(root: Path) -> None:
        folders.classification(root)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)

    return make


def long_picture(root: Path) -> None:
    folders.classification(root)
    Image.new("L", (100_000, 1)).save(root / "train/chelsea/long.png")


CLASSIFICATION = [
    Case(
        "classification",
        "an EXIF orientation",
        "pictures and masks are turned upright, in every task",
        lambda root: folders.classification(root, save=folders.save_sideways),
        8,
    ),
    Case(
        "classification",
        "hidden and system files and folders (`.ipynb_checkpoints`, `._x.png`, `@eaDir`)",
        "never data; counted, the first named",
        hidden,
        8,
        "5 hidden or system files or folders: left out",
    ),
    Case(
        "classification",
        "folders inside a class folder",
        "belong to the class",
        lambda root: folders.classification(root, ("chelsea/2023", "coffee/2023/may")),
        8,
    ),
    Case(
        "classification",
        "PNG, JPEG, WebP, TIFF, BMP, PNM, JPEG 2000, AVIF, with suffixes in any case",
        "read, in every task",
        suffixes,
        8,
    ),
    Case(
        "classification",
        "other files (`x.gif`, `notes.txt`)",
        "left out; counted, the first named",
        with_file("train/chelsea/x.gif", b"GIF89a"),
        8,
        "1 files without a picture's suffix",
    ),
    Case("classification", "links to files and folders", "followed, except circular ones", linked, 8, "circular links"),
    Case("classification", "grey pictures of 16 bits", "0 to 65535 become 0 to 255", deep(257), 8),
    Case(
        "classification",
        "16-bit pictures whose values use 10 to 14 bits in the whole set",
        "refused; give `white_value`",
        deep(16),
        "set white_value=4095",
    ),
    Case(
        "classification",
        "a file that is empty, cut off or not a picture",
        "refused, or left out with `--on-bad-image skip`",
        with_file("train/coffee/0.jpg", b""),
        "coffee/0.jpg: is empty",
    ),
    Case(
        "classification",
        "another format (GIF, EPS, HEIC) with the suffix of a supported one",
        "like a picture that is cut off",
        with_file("train/coffee/0.jpg", b"%!PS-Adobe-3.0 EPSF"),
        "coffee/0.jpg: holds PostScript",
    ),
    Case(
        "classification",
        "more than 100 million pixels, or one side more than 100 times the other",
        "like a picture that is cut off; found from the header",
        long_picture,
        "long.png: 100000x1, one side more than 100 times",
    ),
    Case(
        "classification",
        "class names with brackets, spaces, umlauts",
        "appear whole in tables and pictures",
        lambda root: folders.classification(root, ("katze [grau], ü", "tank [mk2]")),
        8,
    ),
    Case(
        "classification",
        "class names with control characters",
        "refused",
        lambda root: folders.classification(root, ("katze\x1b[31m", "tank")),
        "holds control characters",
    ),
    Case(
        "classification",
        "a picture outside the class folders",
        "refused",
        with_file("train/0.png", b""),
        "is in no class folder",
    ),
    Case(
        "classification",
        "a class that only validation has",
        "refused",
        with_file("val/dog/0.png", b""),
        "train has no class 'dog'",
    ),
]


# Detection --------------------------------------------------------------------------------------------------------


def every(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    """Change every annotation of train."""
    return lambda root: folders.detection(root, lambda coco: [change(entry) for entry in coco["annotations"]])


def first(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    """Change the first annotation of train (of eight; a usable mask is missing to one in ten at most)."""

    def edit(coco: dict[str, Any]) -> None:
        template = coco["annotations"]
        template += [{**copy.deepcopy(entry), "id": 100 + entry["id"]} for entry in template]
        change(template[0])

    return lambda root: folders.detection(root, edit)


def outline(value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda entry: entry.update(segmentation=value)


def sideways(root: Path, boxes: Callable[[dict[str, Any]], Any] = lambda coco: None) -> None:
    folders.detection(root, boxes)
    exif = Image.Exif()
    exif[0x0112] = 6
    for path in (root / "images").rglob("*.png"):  # stored 96 x 80, shown 80 x 96
        Image.open(path).save(path, exif=exif)


def renumbered(coco: dict[str, Any]) -> None:
    coco["categories"] = [{"id": 7, "name": "cup"}, {"id": 3, "name": "cat"}]
    for entry in coco["annotations"]:
        entry["category_id"] = {1: 3, 2: 7}[entry["category_id"]]


def without_objects(coco: dict[str, Any]) -> None:
    coco["annotations"] = [entry for entry in coco["annotations"] if entry["image_id"] != 1]


def detect(change: Callable[[dict[str, Any]], Any], split: str = "train", **encoding: Any) -> Callable[[Path], Any]:
    return lambda root: folders.detection(root, change, split, **encoding)


def narrow(coco: dict[str, Any]) -> None:
    for entry in coco["annotations"]:
        del entry["segmentation"]
    coco["annotations"][0]["bbox"] = [9, 9, 0.5, 9]


def crlf(root: Path) -> None:
    folders.detection(root, encoding="utf-8-sig")
    for path in (root / "annotations").iterdir():
        path.write_bytes(path.read_bytes().replace(b", ", b",\r\n"))


WHOLE = "annotation id 1"
DETECTION = [
    Case(
        "detection",
        "no `area`, or one that is not positive",
        "computed from the mask, else the box",
        every(lambda entry: entry.pop("area")),
        4,
        "8 annotations without area",
    ),
    Case(
        "detection", "no `iscrowd`", "0", every(lambda entry: entry.pop("iscrowd")), 4, "8 annotations without iscrowd"
    ),
    Case(
        "detection",
        "`iscrowd` that is neither 0 nor 1",
        "refused",
        first(lambda entry: entry.update(iscrowd="0")),
        f"{WHOLE} has iscrowd '0'",
    ),
    Case(
        "detection",
        "no `bbox`, or an empty one, with a mask",
        "computed from the mask",
        every(lambda entry: entry.pop("bbox")),
        4,
        "8 annotations without bbox",
    ),
    Case(
        "detection",
        "a segmentation that is one flat list, or a list of points",
        "read as one polygon",
        every(outline([10, 10, 40, 10, 40, 40])),
        4,
        "8 segmentations that are one list",
    ),
    Case(
        "detection",
        "an object whose polygons all have fewer than three points, are flat or outside",
        "ignored in training and scoring (COCO's crowd)",
        first(outline([[10, 10, 40, 40]])),
        4,
        "1 objects without a usable mask",
    ),
    Case(
        "detection",
        "more than one such object in ten",
        "refused, for detectors with masks",
        every(outline([[]])),
        f"{WHOLE}: has a polygon of 0 points (and 7 more like it)",
    ),
    Case(
        "detection",
        "a polygon without three points, if the object has a good one",
        "left out",
        first(lambda entry: entry["segmentation"].append([1, 2])),
        4,
        "1 polygons without an area",
    ),
    Case(
        "detection",
        "a polygon with an odd count of numbers, or with all points on one line",
        "like one without three points",
        every(outline([[10, 10, 20, 20, 30, 30]])),
        "a flat polygon",
    ),
    Case(
        "detection",
        "coordinates far from the picture, NaN, text",
        "refused",
        first(outline([[0, 0, 1e9, 0, 9, 9]])),
        f"{WHOLE} has a polygon with coordinates",
    ),
    Case(
        "detection",
        "run lengths of another size, or that do not add up",
        "refused",
        first(outline({"size": [80, 96], "counts": [5, 5]})),
        f"{WHOLE} has run lengths of 10 pixels",
    ),
    Case(
        "detection",
        "run lengths, compressed or not",
        "read",
        every(outline({"size": [80, 96], "counts": [960, 2400, 4320]})),
        4,
    ),
    Case(
        "detection",
        "a box that reaches beyond its picture",
        "clipped",
        every(lambda entry: entry.update(bbox=[60, 60, 99, 99])),
        4,
        "8 boxes that reach beyond",
    ),
    Case(
        "detection",
        "a box outside its picture",
        "refused",
        first(lambda entry: entry.update(bbox=[200, 3, 9, 9])),
        f"{WHOLE} has bbox [200, 3, 9, 9], outside its image",
    ),
    Case(
        "detection",
        "a box narrower than a pixel, without a mask",
        "left out",
        detect(narrow, None),
        4,
        "2 boxes narrower than a pixel: left out",
    ),
    Case(
        "detection",
        "`width` and `height` of the stored pixels, with an EXIF orientation",
        "taken from the picture as it is shown, if all boxes lie inside",
        sideways,
        4,
        "6 images whose width and height are exchanged",
    ),
    Case(
        "detection",
        "boxes that only fit the picture before its EXIF orientation",
        "refused",
        lambda root: sideways(root, lambda coco: coco["annotations"][0].update(bbox=[60, 3, 30, 9])),
        "which does not fit",
    ),
    Case(
        "detection",
        "`width` and `height` of another picture",
        "refused",
        detect(lambda coco: coco["images"][0].update(width=97)),
        "is 96x80, its annotation says 97x80",
    ),
    Case(
        "detection",
        "an id that appears twice",
        "refused",
        detect(lambda coco: coco["images"][0].update(id=2)),
        "id in images 2 appears 2 times",
    ),
    Case(
        "detection",
        "ids that are 0, text, or have gaps",
        "kept if possible, otherwise numbered again",
        detect(lambda coco: coco["annotations"][0].update(id=0)),
        4,
    ),
    Case("detection", "a byte order mark, UTF-16, CRLF", "read", crlf, 4),
    Case(
        "detection",
        "categories in another order or with other ids in validation",
        "matched by name",
        detect(renumbered, "val"),
        4,
    ),
    Case(
        "detection",
        "categories that only validation has",
        "refused",
        detect(lambda coco: coco["categories"].append({"id": 3, "name": "dog"}), "val"),
        "which has no 'dog'",
    ),
    Case(
        "detection",
        "categories without an object",
        "named; they keep their index",
        detect(lambda coco: coco["categories"].append({"id": 3, "name": "dog"})),
        4,
        "class 'dog' never occurs",
    ),
    Case(
        "detection",
        "images without an object",
        "counted; left out of training by recipes with `filter_empty_gt`, and scored",
        detect(without_objects),
        4,
        "1 images of train without an object",
    ),
    Case(
        "detection",
        "pictures that the JSON does not list",
        "left out; counted, the first named",
        detect(lambda coco: [coco["images"].pop(0), without_objects(coco)]),
        3,
        "1 images that train.json does not list",
    ),
    Case(
        "detection",
        "two entries for one picture",
        "refused",
        detect(lambda coco: coco["images"][0].update(file_name="1.png")),
        "file_name '1.png' appears 2 times",
    ),
    Case(
        "detection",
        "an annotation of a missing image or category",
        "refused",
        first(lambda entry: entry.update(category_id=5)),
        f"{WHOLE} has category_id 5",
    ),
]


# Segmentation -----------------------------------------------------------------------------------------------------


def masks(save: Callable[[np.ndarray, Path], None]) -> Callable[[Path], Any]:
    return lambda root: folders.segmentation(root, save)


def save_palette(ids: np.ndarray, path: Path) -> None:
    image = Image.fromarray(ids)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.save(path.with_suffix(".png"))


def save_as(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray, Path], None]:
    return lambda ids, path: Image.fromarray(np.ascontiguousarray(change(ids))).save(path.with_suffix(".png"))


def mixed(root: Path) -> None:
    folders.segmentation(root)
    for i in (0, 2):
        picture = root / f"images/train/{i}.png"
        Image.open(picture).save(picture.with_suffix(".JPG"))
        picture.unlink()


def alone(root: Path) -> None:
    folders.segmentation(root)
    (root / "masks/train/1.png").unlink()


SEGMENTATION = [
    Case(
        "segmentation",
        "masks with 0 and 255 for two classes",
        "refused; the error names the class that never occurs (255 is ignored)",
        masks(save_as(lambda ids: ids * 255)),
        "class 'cat' never occurs; 21% of the pixels are 255",
    ),
    Case(
        "segmentation",
        "a class that no mask shows",
        "named; it keeps its index",
        lambda root: folders.segmentation(root, classes=b"background\ncat\ndog\n"),
        4,
        "class 'dog' never occurs",
    ),
    Case(
        "segmentation",
        "values beyond the classes",
        "refused",
        masks(save_as(lambda ids: ids * 7)),
        "0.png holds value 7; the classes have ids 0..1",
    ),
    Case(
        "segmentation",
        "masks of another size, or transposed",
        "refused",
        masks(save_as(np.transpose)),
        "0.png is 80x96, its image 96x80",
    ),
    Case("segmentation", "palette masks", "the indices are the ids", masks(save_palette), 4),
    Case("segmentation", "1-bit masks", "0 and 1", masks(save_as(lambda ids: ids > 0)), 4),
    Case(
        "segmentation",
        "masks of several channels",
        "refused",
        masks(save_as(lambda ids: np.stack([ids] * 3, -1))),
        "0.png has 3 channels",
    ),
    Case(
        "segmentation",
        "pictures in subfolders",
        "matched by their path",
        lambda root: folders.segmentation(root, inner="a/b"),
        4,
    ),
    Case(
        "segmentation", "pictures and masks with different suffixes", "matched by the name without the suffix", mixed, 4
    ),
    Case("segmentation", "a picture without a mask, or a mask without a picture", "refused", alone, "has no mask"),
    Case(
        "segmentation",
        "a byte order mark or CRLF in `classes.txt`",
        "read",
        lambda root: folders.segmentation(root, classes=b"\xef\xbb\xbfbackground\r\ncat\r\n\r\n"),
        4,
    ),
    Case(
        "segmentation",
        "an empty line between names in `classes.txt`",
        "refused: ids would shift",
        lambda root: folders.segmentation(root, classes=b"background\n\ncat\n"),
        "line 2 is empty",
    ),
]

CASES = [*CLASSIFICATION, *DETECTION, *SEGMENTATION]
