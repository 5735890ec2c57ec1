"""Classification data in packed formats that timm reads: Hugging Face datasets, and tar files of WebDataset.

`hfds/NAME` is a dataset on the Hugging Face hub; `hfds/FOLDER` is one in a folder.
`wds/FOLDER` holds tar files, timm's `_info.json` with the files and the number of images of each split, and
`classes.txt` with one class name per line.  `tfds/` (TensorFlow) is not supported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridzoo.train.data.report import SPLIT_NAMES
from hybridzoo.train.errors import UserError


@dataclass(frozen=True)
class Shards:
    """Description of packed data.

    Attributes:
        name: for `timm.data.create_dataset`.
        root: the folder of tar files; None for a Hugging Face dataset.
        splits: "train", "val" -> the data's own name of the split.
        classes: names in the order of their indices; empty if the data has no names.
        stream: images are read in file order, not by index.
    """

    name: str
    root: Path | None
    splits: Mapping[str, str]
    classes: Sequence[str]
    stream: bool


def shards_of(data: Path | str) -> Shards | None:
    """The packed data that `--data` names, or None for other data.

    Raises:
        UserError: the packed data cannot be read.
    """
    kind, _, rest = str(data).partition("/")
    if kind not in ("hfds", "wds", "tfds", "hfids") or not rest or Path(data).exists():
        return None
    folder = next((path for path in (Path(rest), Path("/", rest)) if path.is_dir()), None)
    if kind == "wds":
        return _tar_files(str(data), folder)
    if kind == "hfds":
        return _hugging_face(str(data), str(folder or rest))
    raise UserError(f"--data {data}: {kind} is not read; give hfds/NAME, wds/FOLDER or a folder of images")


def _tar_files(data: str, folder: Path | None) -> Shards:
    if folder is None:
        raise UserError(f"--data {data}: no such folder")
    try:
        import webdataset  # noqa: F401 - timm uses it, and tells of its absence by another name
    except ModuleNotFoundError as error:
        raise UserError(f"--data {data} needs {error.name}: pip install 'hybridzoo[shards]'") from error
    file = next((folder / name for name in ("_info.json", "info.json") if (folder / name).is_file()), None)
    try:
        splits: Any = json.loads(file.read_bytes())["splits"] if file is not None else None
        own = {split: next((word for word in words if word in splits), "") for split, words in SPLIT_NAMES.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file or folder}: has no splits; see timm's documentation of _info.json") from error
    files = [name for split in own.values() if split for name in splits[split]["filenames"]]
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise UserError(f"{file}: names {missing[0]}, which is not in {folder}")
    names = folder / "classes.txt"
    lines = names.read_text("utf-8-sig").splitlines() if names.is_file() else []
    classes = [line.strip() for line in lines if line.strip()]
    return Shards(f"wds/{folder.name}", folder, own, classes, stream=True)


def _hugging_face(data: str, name: str) -> Shards:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise UserError(f"--data {data} needs {error.name}: pip install 'hybridzoo[shards]'") from error
    try:
        found: Any = datasets.load_dataset(name)
    except Exception as error:  # the library and the network raise many types
        raise UserError(f"--data {data}: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
    own = {split: next((word for word in words if word in found), "") for split, words in SPLIT_NAMES.items()}
    features = next(iter(found.values())).features
    if "image" not in features or "label" not in features:
        raise UserError(f"--data {data}: has the columns {', '.join(features)}; expected image and label")
    return Shards(f"hfds/{name}", None, own, getattr(features["label"], "names", None) or [], stream=False)
