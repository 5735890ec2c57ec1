"""Configs by short name or path, with options merged in."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine import Config

from hybridzoo.train import raw
from hybridzoo.train.errors import UserError
from hybridzoo.train.names import TASKS, Recipe, find_config, is_model, recipes


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
    """Read a recipe or config with its bases, apply a network and options, and compute what follows from them.

    Args:
        name_or_path: name of a recipe or config, a file, or a network's name for the recipe `finetune`.
        options: ``key.subkey=value`` strings; a value is a Python literal, a bare word or a comma-separated list.
        model: timm network to train; its arguments replace those of the recipe's own.
        epochs: length of the run; the schedule is stretched to it.
        batch_size: images per step and process, in training.
        lr: highest learning rate (the heads' rate).
        img_size: side of the training images in pixels.
        freeze: do not train the network's stem (0), or its stem and first k stages (k).
        workers: processes that load images; 0 loads them in the main process.
        val_fraction: fraction of the training images that is held out, for data without a validation set.
        early_stop: epochs without a better validation after which training ends.

    Raises:
        UserError: unknown config or network, a config that cannot be parsed, a malformed option, or one that this
            config does not use.
    """
    if model is None and is_model(str(name_or_path)):
        name_or_path, model = "finetune", str(name_or_path)
    path = find_config(name_or_path)
    recipe = recipes().get(str(name_or_path).removesuffix(".py"))
    try:
        config = raw.read(path, import_custom_modules=False)  # the task imports these modules when it needs them
        if recipe is not None and recipe.published:
            config = _published(config, recipe)
    except Exception as error:  # a config is Python code, which can raise anything
        raise UserError(f"config {path}: {type(error).__name__}: {_first_line(error)}") from error
    if config.get("task") not in TASKS:
        raise UserError(f"config {path}: must set task to one of {', '.join(TASKS)}, got {config.get('task')!r}")
    # These import timm, which an unknown name does not need.
    from hybridzoo.train import compose, config_check, settle
    from hybridzoo.train import overrides as changes

    if model is not None:
        compose.set_network(config, model)
    given = changes.put(config, options)
    chosen = changes.values(config)
    config_check.check_sections(config)
    given |= settle.short_options(
        config,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        img_size=img_size,
        freeze=freeze,
        workers=workers,
        options=given,
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
        if recipe is not None:  # for a user's file the name is enough
            config = _renamed(config, f"{recipe.name}_{network}.py" if not published or model else f"{recipe.name}.py")
    elif published and config.task != "classification":
        compose.fit_dense(config, given)
    if left:
        config.settle = {**left, "given": sorted(given)}
    complete(config)
    changes.check_kept(config, chosen)
    return config


def complete(config: Config) -> None:
    """Add what mmdet's and mmseg's entry points need to a config, in place: visualizer, test pipeline, modules."""
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
    """A published run: a recipe with the values of its row."""
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
    """Merge two nested dicts; values of the second one win."""
    result = dict(one)
    for key, value in other.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def _renamed(config: Config, filename: str) -> Config:
    """The same config with another file name, which names the run and the saved config."""
    return Config(config.to_dict(), cfg_text=config.text, filename=filename, env_variables=config.env_variables)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
