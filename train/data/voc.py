"""Pascal VOC's layout of detection data, read into COCO's format in memory.

One XML file per image. Folders, as published or as labelling tools write them::

    ROOT/JPEGImages/*.jpg, ROOT/Annotations/*.xml, ROOT/ImageSets/Main/{train,val,test}.txt
    ROOT/VOC2007/..., ROOT/VOC2012/...     a VOCdevkit: all years together
    ROOT/{train,valid,test}/*.jpg          with XML files next to them, or in Annotations/ there
    ROOT/images/{train,val}/*.jpg          with ROOT/annotations/{train,val}/*.xml, or Annotations/

Corners count pixels from 1 and are part of the box: x goes from `xmin - 1` to `xmax` (a 0, from tools that count from
0, stays 0). Objects marked `difficult` are ignored in training and scoring. The classes are the names in the training
files, in natural order, or those in `classes.txt` or `labels.txt` in ROOT.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hybridzoo.train import coco
from hybridzoo.train.data.report import SPLIT_NAMES, Layout, Place
from hybridzoo.train.errors import UserError
from hybridzoo.train.images import ImageError, find_images, natural_key, shown_size
from hybridzoo.train.notes import Notes

_SETS = Path("ImageSets", "Main")


def layout(root: Path) -> Layout | None:
    """The layout of a VOC folder; None if it has neither VOC's lists nor XML files."""
    if _years(root):
        places = {}
        for split in SPLIT_NAMES:
            lists = [year / _SETS / f"{split}.txt" for year in _years(root)]
            there = next((file for file in lists if file.is_file()), lists[0])
            images = there.parents[2] / "JPEGImages" if len(lists) == 1 else root
            places[split] = Place(images, there, "voc", split, root)
        return Layout(places, name="Pascal VOC (ImageSets)")
    places = {}
    for split, words in SPLIT_NAMES.items():
        pairs = [pair for word in words for pair in _pairs(root, word)]
        images, files = next((pair for pair in pairs if _has_xml(pair[1])), pairs[0])
        places[split] = Place(images, files, "voc", split, root)
    if not any(_has_xml(place.labels) for place in places.values()):
        return None
    return Layout(places, name="Pascal VOC (XML files)")


def read(place: Place, notes: Notes | None = None) -> dict[str, Any]:
    """The images and objects of a split, as `hybridzoo.train.coco.read` gives them.

    Raises:
        UserError: a missing folder, list, image or XML file, or an invalid annotation; names file and object.
    """
    notes = notes if notes is not None else Notes()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    known = _known_classes(place.root)
    seen: set[str] = set()
    for number, (picture, file) in enumerate(_files(place, notes), 1):
        tree = _parse(file)
        size = _size(tree, picture, file, notes)
        name = str(picture.relative_to(place.images)) if picture.is_relative_to(place.images) else str(picture)
        images.append({"id": number, "file_name": name, "width": size[0], "height": size[1]})
        for index, node in enumerate(tree.findall("object"), 1):
            where = f"{file}: object {index}"
            entry = _object(node, where, notes)
            if known and entry["category_id"] not in known:
                raise UserError(f"{where} has name {entry['category_id']!r}; the classes are {', '.join(known)}")
            seen.add(entry["category_id"])
            annotations.append({**entry, "id": len(annotations) + 1, "image_id": number, coco.WHERE: where})
    if not annotations:
        raise UserError(f"{place.labels}: no XML file of {place.split} holds an object")
    categories = [{"id": name, "name": name} for name in known or sorted(seen, key=natural_key)]
    return {"images": images, "annotations": annotations, "categories": categories}


# Parts ----------------------------------------------------------------------------------------------------------------


def _years(root: Path) -> list[Path]:
    """The folders with VOC's lists: the root itself, or those of several years."""
    if (root / _SETS).is_dir():
        return [root]
    return sorted(lists.parents[1] for lists in root.glob(f"VOC*/{_SETS}"))


def _pairs(root: Path, word: str) -> Iterator[tuple[Path, Path]]:
    """(folder of images, folder of XML files) that a split may have."""
    for inner in ("Annotations", "annotations"):
        yield root / "images" / word, root / inner / word
        yield root / word / "images", root / word / inner
        yield root / word, root / word / inner
    yield root / word, root / word


def _has_xml(folder: Path) -> bool:
    return folder.is_dir() and next(folder.glob("*.xml"), None) is not None


def _known_classes(root: Path) -> list[str]:
    for name in ("classes.txt", "labels.txt"):
        if (root / name).is_file():
            lines = (root / name).read_bytes().decode("utf-8-sig", "replace").split("\n")
            return [line.strip() for line in lines if line.strip()]
    return []


def _files(place: Place, notes: Notes) -> Iterator[tuple[Path, Path]]:
    """(image, XML file) of each image of a split, in natural order."""
    if place.labels.suffix == ".txt":
        for year in _years(place.root):
            names = year / _SETS / place.labels.name
            if names.is_file():
                yield from _listed(year, names)
        return
    for folder, what in ((place.images, "image folder"), (place.labels, "annotation folder")):
        if not folder.is_dir():
            raise UserError(f"{what} {folder} {'is not a folder' if folder.exists() else 'does not exist'}")
    pictures = find_images(place.images).images
    files = {path.with_suffix("").relative_to(place.labels): path for path in place.labels.rglob("*.xml")}
    taken: dict[Path, Path] = {}
    for picture in pictures:
        name = picture.with_suffix("").relative_to(place.images)
        if name in taken:
            raise UserError(f"image {picture} and {taken[name].name} differ in their suffix only; keep one")
        taken[name] = picture
        if name in files:
            yield picture, files[name]
        else:
            notes.add("pictures without an XML file: left out", picture)
    for name, file in files.items():
        if name not in taken:
            raise UserError(f"annotation file {file} has no image in {place.images}; add or remove one")


def _listed(year: Path, names: Path) -> Iterator[tuple[Path, Path]]:
    pictures = {path.stem: path for path in find_images(year / "JPEGImages").images}
    for number, line in enumerate(names.read_text("utf-8-sig").splitlines(), 1):
        words = line.split()  # lists of single classes have a second word: 1, 0 or -1
        if not words:
            continue
        file = year / "Annotations" / f"{words[0]}.xml"
        missing = "picture in JPEGImages" if words[0] not in pictures else "" if file.is_file() else "XML file"
        if missing:
            raise UserError(
                f"{names}: line {number} names {words[0]!r}, which has no {missing}; add it, or drop the line"
            )
        yield pictures[words[0]], file


def _parse(file: Path) -> ElementTree.Element:
    try:
        tree = ElementTree.fromstring(file.read_bytes())
    except OSError as error:
        raise UserError(f"annotation file {file} cannot be read: {error.strerror}") from error
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise UserError(f"annotation file {file} is not XML: {error}") from error
    if tree.tag != "annotation":
        raise UserError(f"annotation file {file} begins with <{tree.tag}>; expected VOC's <annotation>")
    return tree


def _size(tree: ElementTree.Element, picture: Path, file: Path, notes: Notes) -> tuple[int, int]:
    """(width, height) from the file, or from the picture if the file has none."""
    try:
        width, height = (int(float(tree.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
    except ValueError as error:
        raise UserError(f"annotation file {file} has a size that is no number") from error
    if width > 0 and height > 0:
        return width, height
    notes.add("XML files without a size: taken from the picture", file)
    try:
        return shown_size(picture)[0]
    except ImageError:  # the check of the images reports it, or leaves it out
        return 1, 1


def _object(node: ElementTree.Element, where: str, notes: Notes) -> dict[str, Any]:
    from globox import BoundingBox
    from globox.errors import ParsingError

    name = (node.findtext("name") or "").strip()
    if not name:
        raise UserError(f"{where} has no name")
    try:
        box = BoundingBox.from_xml(node)
    except (ParsingError, ValueError, AssertionError) as error:
        corners = [node.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
        raise UserError(f"{where} has bndbox {corners}; expected xmin < xmax and ymin < ymax in pixels") from error
    left, top = (side - 1 if side else 0.0 for side in (box.xmin, box.ymin))
    width, height = box.xmax - left, box.ymax - top
    difficult = (node.findtext("difficult") or "0").strip() == "1"
    if difficult:
        notes.add("objects marked difficult: ignored in training and scoring", where)
    return {
        "category_id": name,
        "bbox": [left, top, width, height],
        "area": width * height,
        "iscrowd": int(difficult),
    }
