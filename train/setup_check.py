"""Check a run's description from a checkpoint before anything is built from it.

The file may come from a stranger. A `type` must be the name of something that hybridzoo, mmdet, mmseg, mmcv, mmengine
or PyTorch provide for its place, a word cannot be a path, an address or code, and no key names a file. Nothing is
evaluated, imported, downloaded, written or deleted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.registry import MODELS, TASK_UTILS, TRANSFORMS

from hybridzoo.train.errors import UserError
from hybridzoo.train.names import TASKS
from hybridzoo.train.plain import shown

KEY = "setup"  # key in a checkpoint's `meta`
FORMAT = 1

# Keys, or parts of keys, under which networks and pipelines take files, addresses or configs.
_FILES = {
    *("ckpt", "checkpoint", "config", "dir", "file", "filename", "import", "imports", "init", "path", "pretrain"),
    *("pretrained", "root", "url", "weights"),
}
_FILE_KEYS = {"backend_args", "file_client_args"}
_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_+.-]{0,99}")
_A_FILE = re.compile(r"\.(py|pyc|pth?|pkl|ckpt|bin|safetensors|npy|npz|json|ya?ml|txt|zip|tar|gz)$", re.IGNORECASE)
_KEY = re.compile(r"[A-Za-z]\w{0,63}")
_TYPE = re.compile(r"(?:(?:mmdet|mmseg|mmcv|mmengine)\.)?[A-Za-z_]\w{0,99}")
_SCOPES = ("mmengine", "mmdet", "mmseg", "mmcv")
HOMES = ("hybridzoo.train.", "mmdet.", "mmseg.", "mmcv.", "mmengine.", "torch.nn.", "torchvision.ops.")
_NOT_HERE = ("language_models", "reid", "vis", "mot", "task_modules.tracking")  # read vocabularies, run command lines
# Functions and layers that mmcv and mmdet look up by name outside their registries, by the key of their dict.
_OPERATORS = {"nms": ("nms", "soft_nms"), "roi_layer": ("RoIAlign", "RoIPool")}
_DEEPEST, _MOST = 24, 50_000
_LARGEST = 1 << 31
# Known arguments of metrics; with other metrics the config must be named.
METRICS = {
    "classification": ("TopK", ("topk",)),
    "detection": ("CocoScenesMetric", ("metric", "iou_thrs", "metric_items", "proposal_nums")),
    "segmentation": ("MaskScenesMetric", ("beta", "iou_metrics", "nan_to_num")),
}


def check(setup: Any, whose: str) -> None:
    """Check the description in a file before anything is built from it.

    Raises:
        UserError: `describe` would not write this.
    """
    if not isinstance(setup, dict) or type(setup.get("format")) is not int:
        raise UserError(f"{whose}: its {KEY} is not the setup of a run")
    if setup["format"] != FORMAT:
        raise UserError(f"{whose}: its {KEY} has format {setup['format']}, this hybridzoo reads {FORMAT}: update it")
    if set(setup) != {"format", "name", "task", "scope", "model", "input", "metric", "batch_size", "white_value",
                      "digits", "data", "val_fraction"}:  # fmt: skip
        raise UserError(f"{whose}: its {KEY} holds other things than a run's ({', '.join(map(shown, setup))})")

    def wrong(key: str, value: Any, why: str = "is none") -> UserError:
        return UserError(f"{whose}: its {KEY}.{key}={shown(value)} {why}")

    task = setup["task"]
    if task not in TASKS:
        raise wrong("task", task)
    if setup["scope"] not in _SCOPES:
        raise wrong("scope", setup["scope"])
    if not isinstance(setup["name"], str) or not re.fullmatch(r"\w[\w.+-]{0,199}", setup["name"]):
        raise wrong("name", setup["name"])
    if type(setup["batch_size"]) is not int or not 1 <= setup["batch_size"] <= 4096:
        raise wrong("batch_size", setup["batch_size"])
    white = setup["white_value"]
    if white is not None and not (type(white) in (int, float) and math.isfinite(white)):
        raise wrong("white_value", white)
    data = setup["data"]
    if data is not None and not (isinstance(data, str) and data.isprintable() and len(data) < 4096):
        raise wrong("data", data)
    digits = setup["digits"]
    if digits is not None:
        known = {"kind": str, "seed": int, "train": int, "val": int}
        if not isinstance(digits, dict) or any(type(value) is not known.get(key) for key, value in digits.items()):
            raise wrong("digits", digits)
        if any(type(value) is int and not 0 <= value <= 100_000 for value in digits.values()):
            raise wrong("digits", digits)
    fraction = setup["val_fraction"]
    if fraction is not None:
        known = {"fraction": float, "seed": int, "held": bool}
        if not isinstance(fraction, dict) or any(type(value) is not known.get(key) for key, value in fraction.items()):
            raise wrong("val_fraction", fraction)
    metric = setup["metric"]
    if metric is not None:
        kind, settings = METRICS[task]
        if not isinstance(metric, dict) or metric.get("type") != kind or metric.keys() - {"type", *settings}:
            raise wrong("metric", metric)
    if not isinstance(setup["model"], dict) or not isinstance(setup["input"], dict if task == TASKS[0] else list):
        raise wrong("model", setup["model"], "or input is no config")
    count = 0
    for part in ("model", "input", "metric"):
        for place, value in _values(setup[part], (part,)):
            count += 1
            if count > _MOST:
                raise UserError(f"{whose}: its {KEY} is larger than any run's")
            if problem := _problem(place, value):
                raise wrong(".".join(map(str, place)), value, problem)


def _values(node: Any, place: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    yield place, node
    if len(place) <= _DEEPEST:
        pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list | tuple) else ()
        for key, value in pairs:
            yield from _values(value, (*place, key))


def _problem(place: tuple[Any, ...], value: Any) -> str:
    """The error of a value at a place, in words; empty for values that our runs write."""
    key = place[-1]
    if len(place) > _DEEPEST:
        return "lies deeper than anything in a config"
    if isinstance(key, str):
        if key == "_scope_":
            return "" if value in _SCOPES else "is no package that is known here"
        if not _KEY.fullmatch(key):
            return "is under no name of a setting"
        names_file = key in _FILE_KEYS or set(key.lower().split("_")) & _FILES
        if len(place) > 1 and names_file and not _harmless(value):
            return "names a file, which no checkpoint's config does"
        if key == "type" and not (isinstance(value, str) and _TYPE.fullmatch(value)):
            return "is no name of a type"
    elif type(key) is not int:
        return "is under no name of a setting"
    if value is None or isinstance(value, dict | list | tuple) or type(value) is bool:
        return ""
    if type(value) in (int, float):
        finite = math.isfinite(value) or type(value) is float  # bounds such as infinity are numbers too
        return "" if finite and (not math.isfinite(value) or abs(value) <= _LARGEST) else "is no number of a config"
    if isinstance(value, str):
        sound = (_WORD.fullmatch(value) or not value) and not _A_FILE.search(value)
        return "" if sound else "is no word of a config"
    return "is no plain data"


def _harmless(value: Any) -> bool:
    return value is None or type(value) in (bool, int, float)


def check_types(setup: Mapping[str, Any], whose: str) -> None:
    """Check that every `type` names a class of the task's packages that fits its place; they must be imported.

    Raises:
        UserError: an unknown type.
    """
    for part, registries in (("model", (MODELS, TASK_UTILS)), ("input", (TRANSFORMS,))):
        for place, value in _values(setup[part], (part,)):
            if place[-1] != "type" or (len(place) > 1 and value in _OPERATORS.get(place[-2], ())):
                continue
            found = [entry for registry in registries for entry in _entries(registry, value)]
            if not found or any(not _ours(entry) for entry in found):
                raise UserError(
                    f"{whose}: its {KEY}.{'.'.join(map(str, place))}={shown(value)} is not known here; "
                    "name the config that it was trained with"
                )


def _entries(registry: Any, name: str) -> Iterator[Any]:
    """The classes of a name in a registry, and in mmdet's and mmseg's registries below it."""
    scope, _, bare = name.rpartition(".")
    for place in (registry, *registry.children.values()):
        if bare in place.module_dict and scope in ("", place.scope):
            yield place.module_dict[bare]


def _ours(entry: Any) -> bool:
    home = f"{getattr(entry, '__module__', '')}."
    return home.startswith(HOMES) and not any(f".{part}." in home for part in _NOT_HERE)
