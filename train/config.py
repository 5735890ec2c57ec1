"""Configs by short name or path, with options merged in."""

from __future__ import annotations

import ast
import atexit
import copy
import difflib
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine import Config, ConfigDict
from mmengine.config.utils import MODULE2PACKAGE

from hybridzoo.train.errors import UserError
from hybridzoo.train.names import TASKS, Recipe, find_config, is_model, recipes

# `mmseg::` bases: mmengine looks for a distribution called mmsegmentation, which may be onedl's.
MODULE2PACKAGE["mmseg"] = "mmseg"

_mmengines_path = Config._get_cfg_path


def _path_of_base(base: str, filename: str) -> tuple[str, str | None]:
    """mmengine's way from a `_base_` to its file, and ours where it is `hybridzoo::NAME`.

    mmengine looks for `package::folder/file.py` inside a package; a published run of ours has no file, and no recipe a
    folder.
    """
    package, colons, name = base.partition("::")
    if not colons or package != "hybridzoo":
        return _mmengines_path(base, filename)
    recipe = recipes().get(name.removesuffix(".py"))
    if recipe is None or not recipe.published:
        return str(find_config(name)), None
    composed = Path(_folder_of_runs(), f"{recipe.name}.py")
    if not composed.is_file():
        load_config(recipe.name).dump(composed)
    return str(composed), None


@functools.cache
def _folder_of_runs() -> str:
    """A folder for published runs as files, which goes when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="hybridzoo-recipes-")
    atexit.register(folder.cleanup)
    return folder.name


Config._get_cfg_path = staticmethod(_path_of_base)

# Top-level keys that mmengine's Runner or our engine reads although a config need not name them.
_OPTIONAL_KEYS = {
    "activation_checkpointing",
    "amp_dtype",
    "auto_scale_lr",
    "class_names",
    "compile",
    "custom_hooks",
    "custom_imports",
    "data_root",
    "device",
    "env_cfg",
    "find_unused_parameters",
    "fsdp",
    "log_level",
    "log_processor",
    "model_wrapper_cfg",
    "on_bad",
    "param_scheduler",
    "randomness",
    "start",
    "sync_bn",
    "val_fraction",
    "visualizer",
    "white_value",
    "work_dir",
}


def load_config(
    name_or_path: str | Path,
    options: Sequence[str] = (),
    *,
    model: str | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    img_size: int | None = None,
    freeze: int | None = None,
    workers: int | None = None,
    val_fraction: float | None = None,
    early_stop: int | None = None,
) -> Config:
    """Read a recipe or config with its bases, put a network and options into it, and settle what follows from them.

    Args:
        name_or_path: a recipe's or config's name, a file, or a network's name, which means the recipe `finetune`.
        options: ``key.subkey=value`` strings; a value is a Python literal, a bare word or a comma-separated list.
        model: timm network to train; its arguments replace those of the recipe's own.
        epochs: length of the run; the schedule is stretched to it.
        batch_size: images per step and process, in training.
        lr: highest learning rate, of the heads.
        img_size: side of the training images in pixels.
        freeze: leave the network's stem (0), or its stem and first k stages (k), as they are.
        workers: processes that load images; 0 loads them in the run's own.
        val_fraction: share of the training images that is held out for validation, of data without a validation set.
        early_stop: epochs without a better validation after which training ends.

    Raises:
        UserError: unknown config or network, a config that does not parse, a malformed option, or one that this config
            has no use for.
    """
    if model is None and is_model(str(name_or_path)):
        name_or_path, model = "finetune", str(name_or_path)
    path = find_config(name_or_path)
    recipe = recipes().get(str(name_or_path).removesuffix(".py"))
    try:
        config = Config.fromfile(path, import_custom_modules=False)  # the task imports them when it needs them
        if recipe is not None and recipe.published:
            config = _published(config, recipe)
    except Exception as error:  # a config is Python: anything can go wrong inside it
        raise UserError(f"config {path}: {type(error).__name__}: {_first_line(error)}") from error
    if config.get("task") not in TASKS:
        raise UserError(f"config {path}: has to set task to one of {', '.join(TASKS)}, got {config.get('task')!r}")
    from hybridzoo.train import (  # import timm, which a name that is not found does without
        compose,
        config_check,
        settle,
    )

    if model is not None:
        compose.set_network(config, model)
    given = change(config, options)
    config_check.check_sections(config)
    given |= settle.short_options(
        config, epochs=epochs, batch_size=batch_size, lr=lr, img_size=img_size, freeze=freeze, workers=workers
    )
    if val_fraction is not None:
        config.val_fraction = val_fraction
    if early_stop is not None:
        if early_stop < 1:
            raise UserError(f"--early-stop {early_stop}: give a number of epochs, at least 1")
        config.default_hooks.early_stop = {"type": "EarlyStopHook", "patience": early_stop}
    left = dict(config.pop("settle", None) or {})
    published = recipe is not None and recipe.published
    if left.pop("network", False) or model is not None:
        compose.fit(config, given)
        network = compose.network_of(config)["name"]
        if recipe is not None:  # of a file of one's own the name says enough
            config = _renamed(config, f"{recipe.name}_{network}.py" if not published or model else f"{recipe.name}.py")
    elif published and config.task != "classification":
        compose.fit_dense(config, given)
    if left:
        config.settle = {**left, "given": sorted(given)}
    _complete(config)
    return config


def change(config: Config, options: Sequence[str]) -> set[str]:
    """Put ``key.subkey=value`` options into a config, in place, and return their keys.

    Raises:
        UserError: a malformed option, or one that the config has no place for.
    """
    given = set()
    for option in options:
        key, value = _parse_option(option, config)
        _assign(config, key, value, option)
        given.add(key)
    return given


def _complete(config: Config) -> None:
    """Add what mmdet's and mmseg's own entry points ask of a config: their visualizer, a test pipeline, our modules."""
    task = config.task
    imports = ["hybridzoo.train", f"hybridzoo.train.{task}"]
    own = config.get("custom_imports") or {}
    config.custom_imports = {
        "allow_failed_imports": False,
        **own,
        "imports": [*imports, *(name for name in _listed(own.get("imports")) if name not in imports)],
    }
    if task == "classification":
        return
    if not config.get("visualizer"):
        kind = {"detection": "DetLocalVisualizer", "segmentation": "SegLocalVisualizer"}[task]
        config.visualizer = {"type": kind, "vis_backends": [{"type": "LocalVisBackend"}], "name": "visualizer"}
    dataset = (config.get("test_dataloader") or config.get("val_dataloader") or {}).get("dataset") or {}
    if dataset.get("pipeline"):
        config.test_pipeline = copy.deepcopy(dataset["pipeline"])


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _published(config: Config, recipe: Recipe) -> Config:
    """A published run: a recipe with the facts of its row."""
    changes = copy.deepcopy(dict(recipe.changes))
    network = {"name": recipe.network, **recipe.arguments}
    if "backbone" in config.model:
        changes["model"] = merged(changes.get("model", {}), {"backbone": network})
    else:
        changes["model"] = merged(changes.get("model", {}), network)
    config.merge_from_dict(changes)
    if "val_dataloader" in changes and config.get("test_dataloader"):
        config.merge_from_dict({"test_dataloader": changes["val_dataloader"]})
    if recipe.weights:
        config.start = recipe.weights
    return _renamed(config, f"{recipe.name}.py")


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two nested dicts as one; the second's values win."""
    result = dict(one)
    for key, value in other.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def _renamed(config: Config, filename: str) -> Config:
    """The same config under another file's name, which names the run and the copy that it leaves behind."""
    return Config(config.to_dict(), cfg_text=config.text, filename=filename, env_variables=config.env_variables)


def _assign(config: Config, key: str, value: Any, option: str) -> None:
    """Put ``value`` in the place ``key``; a dict replaces what was there, unlike in a config file."""
    *path, last = key.split(".")
    node: Any = config
    for depth, part in enumerate([*path, last]):
        if isinstance(node, list | tuple):
            if not part.isdigit() or int(part) >= len(node):
                place = ".".join(path[:depth])
                raise UserError(f"option {option!r}: {place} has the elements 0 to {len(node) - 1}, not {part}")
        elif not isinstance(node, dict | Config):
            raise UserError(f"option {option!r}: {'.'.join(path[:depth])} is {node!r}, nothing can be set inside it")
        slot: Any = int(part) if isinstance(node, list | tuple) else part
        if depth == len(path):
            node[slot] = value
        else:
            if isinstance(node, dict | Config) and node.get(slot) is None:
                node[slot] = ConfigDict()
            node = node[slot]


def _parse_option(option: str, config: Config) -> tuple[str, Any]:
    key, equals, text = option.partition("=")
    key = key.strip()
    if not equals or not key or not all(part.strip() for part in key.split(".")):
        raise UserError(f"option {option!r}: expected key=value, e.g. train_cfg.max_epochs=10")
    top = key.split(".")[0]
    known = set(config.keys()) | _OPTIONAL_KEYS
    if top not in known:
        near = difflib.get_close_matches(top, known, n=3, cutoff=0.6)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"option {option!r}: the config has no {top!r}{hint}")
    return key, _parse_value(text.strip(), option)


def _parse_value(text: str, option: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        if text[:1] in "[({" and text:
            raise UserError(f"option {option!r}: {text!r} is no Python literal (quote the words inside)") from None
        return [_parse_value(part.strip(), option) for part in text.split(",")] if "," in text else text


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
