"""The folder's `config.json` and weights, and names on the hub.

JSON has neither tuples nor infinity, which configs contain: `{"()": [...]}` is a tuple, `{"float": "inf"}` a number.
Files are not trusted: `setup_check` checks their content before anything is built from it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybridzoo.train.errors import UserError
from hybridzoo.train.plain import printable

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
OWN = "hybridzoo"  # key in `config.json`
PREFIX = "hf-hub:"
FILES = (WEIGHTS, "pytorch_model.bin")  # timm writes the second file as well
_LARGEST = 32_000_000  # bytes of a config; 100,000 class names fit
_TUPLE, _FLOAT = "()", "float"
REPOSITORY = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", re.ASCII)
_OF_TIMMS_INPUT = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


# Reading --------------------------------------------------------------------------------------------------------------


def weights_in(folder: Path) -> Path | None:
    """The weights of a folder for the hub, None for any other folder."""
    if not (folder / CONFIG).is_file():
        return None
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


def meta(weights: Path) -> dict[str, Any] | None:
    """The content of `config.json` next to some weights, in the form of a checkpoint's `meta`; None for other files.

    For a classifier in timm's layout that was not written here, the setup is made from timm's keys.

    Returns:
        `setup`, `class_names`, `task`, and `training` if present.

    Raises:
        UserError: the config cannot be read.
    """
    file = weights.with_name(CONFIG)
    if weights.name not in FILES or not file.is_file():
        return None
    content = read_config(file)
    own = content.get(OWN)
    names = _names(content.get("label_names") or content.get("labels"))
    if isinstance(own, Mapping) and isinstance(own.get("setup"), Mapping):
        setup = decoded(own["setup"])
        found: dict[str, Any] = {"setup": setup, "task": setup.get("task"), "training": own.get("training")}
    elif isinstance(content.get("architecture"), str):
        found = {"setup": _of_timms(content, weights), "task": "classification"}
    else:
        return None
    if names:
        found["class_names"] = names
    return found


def read_config(file: Path) -> dict[str, Any]:
    """A folder's `config.json`.

    Raises:
        UserError: it cannot be read, or is not an object.
    """
    try:
        if file.stat().st_size > _LARGEST:
            raise UserError(f"{file}: has more than {_LARGEST:,} bytes, which is too large for a model's config")
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({str(error).splitlines()[0][:200]})") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: is not a model's config")
    return content


def _names(found: Any) -> list[Any]:
    """Class names in the order of their indices, from a list or from timm's object with indices as keys."""
    if isinstance(found, list):
        return found
    if isinstance(found, Mapping) and all(str(key).isdecimal() for key in found):
        ordered = {int(key): name for key, name in found.items()}
        return [ordered[i] for i in range(len(ordered))] if ordered.keys() == set(range(len(ordered))) else []
    return []


def _of_timms(content: Mapping[str, Any], weights: Path) -> dict[str, Any]:
    cfg = content.get("pretrained_cfg")
    cfg = cfg if isinstance(cfg, Mapping) else content
    args = content.get("model_args")
    classes = content.get("num_classes", cfg.get("num_classes", 1000))
    size = cfg.get("test_input_size") or cfg.get("input_size")
    how = {**cfg, "input_size": size, "crop_pct": cfg.get("test_crop_pct") or cfg.get("crop_pct")}
    name = re.sub(r"[^\w.+-]", "_", f"{content['architecture']}").lstrip("_.+-") or "model"
    return {
        "format": 1,
        "name": name[:200],
        "task": "classification",
        "scope": "mmengine",
        "model": {
            "type": "ImageClassifier",
            "name": content["architecture"],
            **(_tuples(args) if isinstance(args, Mapping) else {}),
            "num_classes": classes,
        },
        "input": {"is_training": False, **{k: _tuples(how[k]) for k in _OF_TIMMS_INPUT if how.get(k) is not None}},
        "metric": None,
        "batch_size": 32,
        "white_value": None,
        "digits": None,
        "data": None,
        "val_fraction": None,
    }


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


# Plain data as JSON ---------------------------------------------------------------------------------------------------


def encoded(value: Any) -> Any:
    """A checkpoint's plain data as JSON's."""
    if isinstance(value, Mapping):
        return {key: encoded(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return {_TUPLE: [encoded(item) for item in value]}
    if isinstance(value, list):
        return [encoded(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: str(value)}
    return value


def decoded(value: Any) -> Any:
    """The reverse of `encoded`; other values stay unchanged, and later checks refuse them."""
    if isinstance(value, Mapping):
        if value.keys() == {_TUPLE} and isinstance(value[_TUPLE], list):
            return tuple(decoded(item) for item in value[_TUPLE])
        if value.keys() == {_FLOAT} and value[_FLOAT] in ("inf", "-inf", "nan"):
            return float(value[_FLOAT])
        return {key: decoded(item) for key, item in value.items()}
    return [decoded(item) for item in value] if isinstance(value, list) else value


# From the hub ---------------------------------------------------------------------------------------------------------


def is_hub_name(word: object) -> bool:
    """Whether a word has the prefix of `hf-hub:USER/NAME`."""
    return str(word).startswith((PREFIX, "hf_hub:"))


def split_name(name: str) -> tuple[str, str]:
    """Repository and revision (empty for the newest) of `hf-hub:USER/NAME` or `hf-hub:USER/NAME@REVISION`.

    Raises:
        UserError: it is not such a name.
    """
    repository, _, revision = name.partition(":")[2].partition("@")
    check_repository(repository, name)
    return repository, revision


def check_repository(repository: str, place: str) -> None:
    """Raise a UserError unless a repository's name has the form USER/NAME; `place` is for the message."""
    if not REPOSITORY.fullmatch(repository):
        raise UserError(f"{place} {printable(repository)!r}: a repository is called USER/NAME")
