"""YOLO's layout of detection data, read into COCO's format in memory.

One text file per image, one line per object: `class x y width height`, the box's centre and size as fractions of the
image's size (a confidence may follow), or `class x y x y x y ...`, the corners of its outline. Folders, as Ultralytics
and Roboflow write them::

    ROOT/data.yaml                        names: [cat, cup]; train: images/train; val: images/val; test: ...
    ROOT/images/train/**/1.jpg            or any folder, list of folders or text file of paths that data.yaml names
    ROOT/labels/train/**/1.txt            "images" in the path becomes "labels"; otherwise next to the picture

Without a YAML file, `classes.txt` or a `*.names` file in ROOT or ROOT/labels has the class names, and the folders are
`images/train` or `train/images`. A picture without a label file has no objects, as in Ultralytics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from hybridzoo.train import coco, outlines
from hybridzoo.train.data.report import SPLIT_NAMES, Layout, Place
from hybridzoo.train.errors import UserError
from hybridzoo.train.images import SUFFIXES, ImageError, find_images, is_hidden, shown_size

_FAR = 2.0  # larger values are not fractions: the file seems to contain pixels


def layout(root: Path) -> Layout | None:
    """The layout of a YOLO folder, None if it has no class names or no labels."""
    names = _names_file(root)
    if names is None:
        return None
    places = {}
    for split in SPLIT_NAMES:
        folders = _folders(root, names, split)
        only = folders[0] if len(folders) == 1 and folders[0].is_dir() else None
        images = only or (root if folders else root / "images" / split)
        places[split] = Place(images, names, "yolo", split, root)
    return Layout(places, name=f"YOLO ({names.name})")


def read(place: Place) -> dict[str, Any]:
    """The images and objects of a split, as `hybridzoo.train.coco.read` gives them.

    Raises:
        UserError: a missing folder, a label that cannot be read, a class without a name; names file and line.
    """
    names, root = class_names(place.labels), place.root
    folders = _folders(root, place.labels, place.split)
    if not folders:
        raise UserError(f"{place.labels}: names no folder for {place.split}; add {place.split}: images/{place.split}")
    pictures = [path for folder in folders for path in _pictures(folder, root)]
    if not pictures:
        raise UserError(f"image folder {folders[0]} holds no images")
    _check_alone(folders, pictures)
    box_only = _keypoints(place.labels)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, path in enumerate(pictures, 1):
        try:
            size, _ = shown_size(path)
        except ImageError:  # the check of the images reports it, or leaves it out
            size = (1, 1)
            objects: list[dict[str, Any]] = []
        else:
            objects = _objects(label_file(path), size, names, place.labels, box_only)
        name = str(path.relative_to(place.images)) if path.is_relative_to(place.images) else str(path)
        images.append({"id": number, "file_name": name, "width": size[0], "height": size[1]})
        for entry in objects:
            annotations.append({**entry, "id": len(annotations) + 1, "image_id": number})
    if not annotations:
        raise UserError(f"no label of {place.split} holds an object; expected them in {label_file(pictures[0]).parent}")
    categories = [{"id": index, "name": name} for index, name in enumerate(names)]
    return {"images": images, "annotations": annotations, "categories": categories}


def label_file(image: Path) -> Path:
    """The label file of an image: the last folder "images" in its path becomes "labels"."""
    parts = list(image.parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == "images":
            parts[index] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def class_names(file: Path) -> list[str]:
    """The class names in the order of their indices.

    Raises:
        UserError: the file cannot be read, has no class names, or leaves out indices.
    """
    if file.suffix not in (".yaml", ".yml"):
        try:
            lines = file.read_bytes().decode("utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} cannot be read; write one class name a line in UTF-8") from error
        return [line.strip() for line in lines if line.strip()]
    names = _yaml(file).get("names")
    if isinstance(names, dict):
        try:
            numbered = {int(key): value for key, value in names.items()}
        except (TypeError, ValueError):
            numbered = {}
        if sorted(numbered) != list(range(len(names))):
            raise UserError(f"{file}: names has the keys {', '.join(map(str, names))[:80]}; number the classes from 0")
        names = [numbered[index] for index in range(len(names))]
    if not isinstance(names, list) or not names:
        raise UserError(f"{file}: has no list of class names; write names: [cat, cup]")
    return [str(name) for name in names]


# Parts ----------------------------------------------------------------------------------------------------------------


def _names_file(root: Path) -> Path | None:
    for file in sorted([*root.glob("*.yaml"), *root.glob("*.yml")], key=lambda file: (file.stem != "data", file.name)):
        if not is_hidden(file.name) and {"names", "train"} <= _yaml(file, quiet=True).keys():
            return file
    labels = [root / "labels", *(root / name / "labels" for names in SPLIT_NAMES.values() for name in names)]
    if not any(folder.is_dir() for folder in labels):
        return None
    listed = [root / "classes.txt", *sorted(root.glob("*.names"))]
    listed += [folder / "classes.txt" for folder in labels]
    for file in listed:
        if file.is_file():
            return file
    return root / "data.yaml"  # an error will name this file


def _yaml(file: Path, *, quiet: bool = False) -> dict[Any, Any]:
    try:
        content = yaml.safe_load(file.read_bytes())
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        if quiet:
            return {}
        raise UserError(f"{file} cannot be read; write names: [cat, cup], train: images/train, val: ...") from error
    return content if isinstance(content, dict) else {}


def _folders(root: Path, names: Path, split: str) -> list[Path]:
    """The folders and lists with a split's images; empty if there are none."""
    wanted: Any = None
    base = root
    if names.suffix in (".yaml", ".yml") and names.is_file():
        content = _yaml(names)
        wanted = next((content[key] for key in SPLIT_NAMES[split] if content.get(key)), None)
        stated = content.get("path")
        base = root / str(stated) if stated and (root / str(stated)).is_dir() else root
    if wanted is None:
        usual = [root / name for word in SPLIT_NAMES[split] for name in (f"images/{word}", f"{word}/images")]
        return [folder for folder in usual if folder.is_dir()][:1]
    found = []
    for value in wanted if isinstance(wanted, list) else [wanted]:
        inner = PurePosixPath(str(value).replace("\\", "/"))
        below = PurePosixPath(*(part for part in inner.parts if part not in ("..", ".", "/")))  # Roboflow: ../train
        tried = [base / inner, root / inner, root / below]
        there = next((path for path in tried if path.exists()), None)
        if there is not None and (there / "images").is_dir():
            there = there / "images"
        found.append(there or root / below)
    return found if any(path.exists() for path in found) or split != "test" else []


def _pictures(folder: Path, root: Path) -> list[Path]:
    """The images in a folder, or in a text file with one path on each line."""
    if folder.is_dir():
        return find_images(folder).images
    if not folder.is_file() or folder.suffix != ".txt":
        raise UserError(f"image folder {folder} {'is not a folder' if folder.exists() else 'does not exist'}")
    found = []
    for number, line in enumerate(folder.read_text("utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        named = Path(line.strip())
        path = next((path for path in (folder.parent / named, root / named) if path.is_file()), None)
        if path is None or path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{folder}: line {number} names {named}, which is not a picture; correct it")
        found.append(path)
    return found


def _check_alone(folders: Sequence[Path], pictures: Sequence[Path]) -> None:
    """Refuse labels without a picture, and two pictures with the same label file."""
    known: dict[Path, Path] = {}
    for path in pictures:
        file = label_file(path)
        if file in known:
            raise UserError(f"image {path} and {known[file].name} differ in their suffix only; keep one")
        known[file] = path
    for folder in folders:
        if not folder.is_dir():
            continue
        lying = label_file(folder / "x").parent
        for file in sorted(lying.rglob("*.txt")) if lying.is_dir() else ():
            if file not in known and file.name != "classes.txt" and not is_hidden(file.name) and lying != folder:
                raise UserError(f"label {file} has no image in {folder}; add or remove one")


def _keypoints(names: Path) -> int:
    """Number of values after a box in a set of poses; they are not used."""
    shape = _yaml(names, quiet=True).get("kpt_shape") if names.suffix in (".yaml", ".yml") else None
    return math.prod(shape) if isinstance(shape, list) and all(isinstance(side, int) for side in shape) else 0


def _objects(
    file: Path, size: tuple[int, int], names: Sequence[str], names_file: Path, keypoints: int
) -> list[dict[str, Any]]:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"label {file} cannot be read; expected lines of numbers") from error
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if values := line.split():
            if keypoints and len(values) == 5 + keypoints:
                values = values[:5]
            where = f"{file}: line {number}"
            found.append({**_object(values, size, len(names), where, names_file), "iscrowd": 0, coco.WHERE: where})
    return found


def _object(values: list[str], size: tuple[int, int], classes: int, where: str, names_file: Path) -> dict[str, Any]:
    from globox import BoundingBox
    from globox.errors import ParsingError

    if len(values) < 5 or (len(values) > 6 and len(values) % 2 == 0):
        raise UserError(
            f"{where} has {len(values)} values; expected class x y width height, or class and at least three points x y"
        )
    label = _class_number(values[0], where)
    if not 0 <= label < classes:
        raise UserError(f"{where} has class {label}; {names_file.name} names 0..{classes - 1}")
    try:
        shares = [float(value) for value in values[1:]]
    except ValueError as error:
        raise UserError(f"{where} has a value that is not a number; expected class x y width height") from error
    if not all(math.isfinite(share) for share in shares):
        raise UserError(f"{where} has a value that is not finite")
    if max(map(abs, shares[: 4 if len(shares) < 6 else None])) > _FAR:
        raise UserError(
            f"{where} has values up to {max(shares):g}; YOLO's are fractions of the image's width and height"
        )
    if len(shares) < 6 and min(shares[2:4]) < 0:
        raise UserError(f"{where} has a width or height below 0")
    line = " ".join([str(label), *values[1:]])
    try:
        if len(shares) < 6:
            box = BoundingBox.from_yolo_v5(" ".join(line.split()[:5]), image_size=size)
        else:
            box = BoundingBox.from_yolo_seg(line, image_size=size)
    except (ParsingError, AssertionError) as error:
        raise UserError(f"{where}: {error}") from error
    entry: dict[str, Any] = {"category_id": label, "bbox": list(box.ltwh), "area": box.area}
    if len(shares) >= 6:
        outline = [share * size[index % 2] for index, share in enumerate(shares)]
        entry.update(segmentation=[outline], area=outlines.area([outline]))
    return entry


def _class_number(text: str, where: str) -> int:
    """A class index, which some tools write as 1.0."""
    try:
        number = Decimal(text)
    except InvalidOperation:
        number = Decimal("NaN")
    if not number.is_finite() or number != number.to_integral_value() or abs(number) > 10**6:
        raise UserError(f"{where} has class {text[:20]!r}; expected a whole number")
    return int(number)
