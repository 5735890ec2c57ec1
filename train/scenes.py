"""Shared by detection and segmentation: the data's folder, and class names and counts in a config."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mmcv.transforms
from mmengine import Config

import hybridzoo.train.loading  # noqa: F401 - LoadImageFromFile, in the place of mmcv's
from hybridzoo.train.errors import UserError
from hybridzoo.train.nodes import dicts


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Suppress output and warnings of libraries: mmdet's and mmseg's missing extras, pycocotools' progress."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def find_root(config: Config, data: Path | None) -> Path:
    """The data folder: the user's, or the embedded digits if the config asks for them, or the config's own.

    Raises:
        UserError: the config names no data and the user gave none.
    """
    if data is not None:
        return data
    if config.get("data_root"):
        return Path(config.data_root)
    if config.get("digits"):
        from hybridzoo.train.digits import digits_root

        return digits_root(**config.digits)
    raise UserError("no data: give a folder (--data DIR) or set data_root in the config")


def datasets(config: Config, split: str) -> Iterator[Any]:
    """The configs of all datasets that read `split` ("train" or "val"; test reads val), inside wrappers too."""
    for key in ("train_dataloader",) if split == "train" else ("val_dataloader", "test_dataloader"):
        yield from (node for node in dicts((config.get(key) or {}).get("dataset")) if "data_prefix" in node)


def evaluators(config: Config, kind: str) -> Iterator[Any]:
    """The configs of all validation and test metrics whose type is `kind`."""
    for key in ("val_evaluator", "test_evaluator"):
        yield from (node for node in dicts(config.get(key)) if node.get("type") == kind)


def read_by_ours(config: Config) -> None:
    """Make every pipeline of `config` load its pictures with our reader and the config's `white_value`."""
    for step in dicts(list(config.values())):
        kind = step.get("type")
        if isinstance(kind, type) and issubclass(kind, mmcv.transforms.LoadImageFromFile):
            step["type"] = kind = kind.__name__  # a class in a config does not use the registry
        if isinstance(kind, str) and kind.split(".")[-1] == "LoadImageFromFile" and config.get("white_value"):
            step["white_value"] = config.white_value


def set_classes(config: Config, names: Sequence[str]) -> None:
    """Set the class names in every dataset, and their number in every head of the model."""
    for split in ("train", "val"):
        for dataset in datasets(config, split):
            dataset.metainfo = {"classes": tuple(names)}
    for head in dicts(config.model):
        if "num_classes" in head:
            head.num_classes = len(names)
        weights = (head.get("loss_cls") or {}).get("class_weight")
        if isinstance(weights, list | tuple):  # Mask2Former's: the last one is for "no object"
            head.loss_cls.class_weight = [1.0] * len(names) + [weights[-1]]


def say(node: Any, **values: Any) -> None:
    """Set values in a config's dict, and remove those that are None."""
    for key, value in values.items():
        node.pop(key, None)
        if value is not None:
            node[key] = value


def below(path: Path, root: Path) -> str:
    """A path for a config: relative to its data root, or the whole path."""
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
