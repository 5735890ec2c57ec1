"""ImageNet's validation images as published: all in one folder, with their classes in another file.

Files in ROOT, or in ROOT/ILSVRC as in Kaggle's archive::

    Data/CLS-LOC/{train,val}/..., or {train,val}/...        train/<synset>/*.JPEG, val/ILSVRC2012_val_00000001.JPEG
    LOC_val_solution.csv                                    Kaggle's table: ILSVRC2012_val_00000001,n01751748 ...
    Annotations/CLS-LOC/val/*.xml                           or an XML file per image, with the synset in it
    ILSVRC2012_devkit_t12/data/                             or the devkit: meta.mat and a list of class numbers

The classes are the synsets, e.g. `n01440764`.
"""

from __future__ import annotations

import csv
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from hybridzoo.train.errors import UserError

PREFIX = "ILSVRC2012_val_"
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def roots(root: Path) -> list[Path]:
    """The folders that may contain a split."""
    return [root, root / "ILSVRC" / "Data" / "CLS-LOC", root / "Data" / "CLS-LOC"]


def is_flat(images: Sequence[Path], folder: Path) -> bool:
    """Whether these are ImageNet's validation images without class folders."""
    return bool(images) and all(path.parent == folder and path.name.startswith(PREFIX) for path in images)


def synsets(images: Sequence[Path], root: Path) -> list[str]:
    """The class of each validation image.

    Raises:
        UserError: no file gives the classes, or not for all images.
    """
    known = _table(root) or _xml_files(images, root) or _devkit(root)
    if not known:
        raise UserError(
            f"image {images[0]} is in no class folder, and no file gives its class; expected LOC_val_solution.csv, "
            f"Annotations/CLS-LOC/val/*.xml or ILSVRC2012_devkit_t12/ in {root}"
        )
    missing = [path for path in images if path.stem not in known]
    if missing:
        raise UserError(f"image {missing[0]}: no class is given for it in {root}; add it or remove the image")
    return [known[path.stem] for path in images]


def _table(root: Path) -> dict[str, str]:
    for file in (root / "LOC_val_solution.csv", root / "ILSVRC" / "LOC_val_solution.csv"):
        if file.is_file():
            with file.open(newline="", encoding="utf-8-sig") as lines:
                rows = [row for row in csv.reader(lines) if len(row) == 2]
            return {image: words.split()[0] for image, words in rows if image.startswith(PREFIX) and words.split()}
    return {}


def _xml_files(images: Sequence[Path], root: Path) -> dict[str, str]:
    folder = next((p for p in (root / q / "Annotations/CLS-LOC/val" for q in (".", "ILSVRC")) if p.is_dir()), None)
    if folder is None:
        return {}
    known = {}
    for image in images:
        file = folder / f"{image.stem}.xml"
        try:
            name = ElementTree.fromstring(file.read_bytes()).findtext("object/name")
        except (OSError, ElementTree.ParseError) as error:
            raise UserError(f"annotation file {file} cannot be read: {error}") from error
        if name:
            known[image.stem] = name.strip()
    return known


def _devkit(root: Path) -> dict[str, str]:
    folders = [root / "ILSVRC2012_devkit_t12" / "data", root / "data", root]
    folder = next((p for p in folders if (p / _TRUTH).is_file() and (p / "meta.mat").is_file()), None)
    if folder is None:
        return {}
    from scipy.io import loadmat

    rows = loadmat(str(folder / "meta.mat"), squeeze_me=True)["synsets"]
    by_number = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows}
    numbers = map(int, (folder / _TRUTH).read_text().split())
    return {f"{PREFIX}{place:08d}": by_number[number] for place, number in enumerate(numbers, 1)}
