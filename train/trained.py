"""The description of a run in its checkpoints: network, input, classes and metrics.

Training stores it with the weights, as `meta["setup"]`: plain data of numbers, short words, lists, tuples and dicts.
The file may come from a stranger, so `setup_check` checks everything before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine import Config
from torch.nn.modules import module as torch_modules

from hybridzoo.train import interruptions, preparing, resuming, run_folder
from hybridzoo.train.errors import UserError
from hybridzoo.train.hub import folder as hub_folder
from hybridzoo.train.names import TASKS, find_config
from hybridzoo.train.overrides import put
from hybridzoo.train.plain import shown
from hybridzoo.train.setup_check import FORMAT, HOMES, KEY, METRICS, check, check_types
from hybridzoo.train.weights import peek, read_state_dict, unlike

OWN = "from_checkpoint"  # in a config: it is what the checkpoint says, changed at most by whoever asked

_TRAINING_ONLY = {"init_cfg", "pretrained", "weights"}  # keys of a model's config; what they name is now in the weights
_OF_A_RUN = ("train_dataloader", "train_cfg", "optim_wrapper", "param_scheduler")
_SAME_METRICS = {"CocoMetric": "CocoScenesMetric", "IoUMetric": "MaskScenesMetric"}
# Settings that only training reads: configs that differ only in them describe the same network.
_OF_TRAINING = {
    *_TRAINING_ONLY,
    "test_cfg",  # how its answers are read
    *("binary", "class_weight", "drop_path_rate", "drop_rate", "freeze", "frozen_stages", "label_smoothing", "mixup"),
    *("norm_eval", "num_classes", "train_cfg", "with_cp"),
}


# Writing --------------------------------------------------------------------------------------------------------------


def describe(config: Config) -> dict[str, Any] | None:
    """The description of a configured run as plain data; None for a config that plain data cannot express.

    Args:
        config: of the run, with its data configured.
    """
    loader = config.get("val_dataloader") or config.get("test_dataloader")
    if not loader or config.get("task") not in TASKS:
        return None
    dataset = loader.get("dataset") or {}
    data = dataset.get("root") or dataset.get("data_root")
    setup = {
        "format": FORMAT,
        "name": Path(config.filename).stem if config.filename else "run",
        "task": config.task,
        "scope": config.get("default_scope", "mmengine"),
        "model": _without(config.model, _TRAINING_ONLY),
        "input": dataset.get("transform") if config.task == "classification" else dataset.get("pipeline"),
        "metric": _metric(config),
        "batch_size": loader.get("batch_size", 1),
        "white_value": config.get("white_value"),
        "digits": config.get("digits"),
        "val_fraction": config.get("val_fraction"),
        "data": str(Path(data).resolve()) if data and not config.get("digits") and not dataset.get("name") else None,
    }
    try:
        setup = _plain(setup)
        check(setup, "this run")
    except (TypeError, UserError):  # for example a user's class: then the config must be named
        return None
    return setup


def _metric(config: Config) -> dict[str, Any] | None:
    found = config.get("val_evaluator") or {}
    found = found[0] if isinstance(found, list | tuple) and len(found) == 1 else found
    kind, settings = METRICS[config.task]
    if not isinstance(found, dict) or _SAME_METRICS.get(found.get("type", ""), found.get("type")) != kind:
        return None
    return {"type": kind, **{key: found[key] for key in settings if found.get(key) is not None}}


def _without(node: Any, keys: set[str]) -> Any:
    if isinstance(node, dict):
        return {key: _without(value, keys) for key, value in node.items() if key not in keys}
    if isinstance(node, list | tuple):
        return type(node)(_without(item, keys) for item in node)
    return node


def _plain(value: Any) -> Any:
    """Config data as Python's types; classes of the known packages become their names.

    Raises:
        TypeError: it contains something else.
    """
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, type) and value.__module__.startswith(HOMES):
        return value.__name__
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{value!r} is no plain data")


# Finding and reading --------------------------------------------------------------------------------------------------


def find(run_or_file: str | Path) -> Path:
    """The checkpoint of a run's folder, a folder for the hub or a file.

    For a run's folder: `final.pth` if the run has ended, otherwise its best checkpoint, or its newest. For a folder for
    the hub (`hybridzoo.train.hub`): its weights. `hf-hub:USER/NAME` is downloaded if needed.

    Raises:
        UserError: the path does not exist, or the folder has no checkpoint.
    """
    if hub_folder.is_hub_name(run_or_file):
        from hybridzoo.train.hub import remote

        return remote.bring(str(run_or_file))
    path = Path(run_or_file)
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such file or run folder")
    if weights := hub_folder.weights_in(path):
        return weights
    if (path / "final.pth").is_file():
        return path / "final.pth"
    best = sorted(path.glob("best_*.pth"), key=_iterations)
    newest = best[-1] if best else next(run_folder.newest_first(path), None)
    if newest is None:
        raise UserError(f"{path}: holds no checkpoint (final.pth, best_*.pth, epoch_*.pth or iter_*.pth)")
    return newest


def folder_of(checkpoint: Path) -> Path | None:
    """The run's folder of a checkpoint, or None."""
    return checkpoint.parent if (checkpoint.parent / run_folder.NAME).is_file() else None


def _iterations(path: Path) -> int:
    try:
        count = (peek(path).get("meta") or {}).get("iter")
    except UserError:
        return -1
    return count if isinstance(count, int) else -1


def read(checkpoint: Path) -> dict[str, Any] | None:
    """The checked description in a checkpoint; None if it has none.

    Raises:
        UserError: it cannot be read, or has content that our runs do not write.
    """
    meta = meta_of(checkpoint)
    setup = meta.get(KEY) if isinstance(meta, dict) else None
    if setup is None:
        return None
    check(setup, f"checkpoint {checkpoint}")
    return dict(setup)


def meta_of(checkpoint: Path) -> Any:
    """A checkpoint's unchecked `meta`: from the file, or from `config.json` in a folder for the hub; None if
    missing."""
    beside = hub_folder.meta(checkpoint)
    return beside if beside is not None else peek(checkpoint).get("meta")


def load(checkpoint: Path, options: Sequence[str] = ()) -> Config:
    """The complete config for inference and tests from a checkpoint, which fits its weights.

    Args:
        checkpoint: the file.
        options: `key.subkey=value`, applied to the config; options of training have no effect here.

    Raises:
        UserError: it has no config, or an unsafe or unknown one, or one that does not fit its weights; or an unknown
            option.
    """
    setup = read(checkpoint)
    if setup is None:
        raise UserError(
            f"checkpoint {checkpoint}: does not contain its config (weights of others, or of an older "
            f"hybridzoo); name the config before it: CONFIG {checkpoint}"
        )
    config = _config(setup)
    preparing.task_module(config.task)
    check_types(setup, f"checkpoint {checkpoint}")
    state = read_state_dict(checkpoint, strip=False)
    own = _skeleton(config, 4 * len(state) + 1000, checkpoint)
    if config.task == "classification" and hub_folder.meta(checkpoint) is not None:
        state = {f"model.{name}": value for name, value in state.items()}  # timm's layout has the network's own names
    if reasons := unlike(own, state):
        raise UserError(f"checkpoint {checkpoint}: its weights do not fit its own config: {reasons}")
    for key in _OF_A_RUN:
        config[key] = {}
    put(config, options)
    for key in (*_OF_A_RUN, "options"):
        config.pop(key, None)
    preparing.prepare(config, ("model",))
    return config


def _skeleton(config: Config, most: int, checkpoint: Path) -> Mapping[str, torch.Tensor]:
    """Names and shapes of the network, built without memory and in bounded time, because the file may name any
    network."""
    count = 0

    def register(module: Any, name: str, value: Any) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise UserError(f"checkpoint {checkpoint}: its config describes far more than its weights")

    handles = [
        torch_modules.register_module_parameter_registration_hook(register),
        torch_modules.register_module_module_registration_hook(register),
    ]
    try:
        with interruptions.quiet():
            return resuming.skeleton(config).state_dict()
    except UserError:
        raise
    except Exception as error:  # a wrong argument may raise any error
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"checkpoint {checkpoint}: no network can be built from its config ({reason})") from error
    finally:
        for handle in handles:
            handle.remove()


def _config(setup: Mapping[str, Any]) -> Config:
    """A complete config from the recorded values; all other values are our defaults."""
    task = setup["task"]
    runtime = Config.fromfile(Path(find_config("finetune")).parent / "_base_" / "runtime.py")
    loader: dict[str, Any] = {"batch_size": setup["batch_size"], "num_workers": 0, "persistent_workers": False}
    loader["sampler"] = {"type": "DefaultSampler", "shuffle": False}
    if task == "classification":
        loader["dataset"] = {"type": "TimmDataset", "split": "val", "transform": setup["input"]}
        loader["collate_fn"] = {"type": "default_collate"}
    else:
        kind = {"detection": "CocoScenes", "segmentation": "MaskScenes"}[task]
        place: dict[str, Any] = {"detection": {"img": ""}, "segmentation": {"img_path": "", "seg_map_path": ""}}[task]
        loader["dataset"] = {"type": kind, "data_root": "", "data_prefix": place, "pipeline": setup["input"]}
        loader["dataset"]["test_mode"] = True
        if task == "detection":
            loader["dataset"]["ann_file"] = ""
    metric = setup["metric"] or {"type": METRICS[task][0]}
    content = {
        **runtime.to_dict(),
        "task": task,
        "default_scope": setup["scope"],
        "model": setup["model"],
        "val_dataloader": loader,
        "val_cfg": {"type": "ValLoop"},
        "val_evaluator": metric,
        "digits": setup["digits"],
        "data_root": setup["data"],
        "white_value": setup["white_value"],
    }
    if task != "classification":
        content.update(test_dataloader=loader, test_evaluator=metric, test_cfg={"type": "TestLoop"})
    if setup["val_fraction"]:
        content["val_fraction"] = setup["val_fraction"]
    content[OWN] = True
    return Config(content, cfg_text=" ", filename=f"{setup['name']}.py")


# Comparing ------------------------------------------------------------------------------------------------------------


def compare(config: Config, checkpoint: Path) -> None:
    """Refuse a config that contradicts a checkpoint's description; checkpoints without one accept every config.

    Raises:
        UserError: the message names the first difference.
    """
    setup = None if config.get(OWN) else read(checkpoint)
    if setup is None:
        return
    given = describe(config)
    if given is None:
        return
    for part in ("task", "model", "input"):
        theirs, ours = (_without(_unread(side[part]), _OF_TRAINING) for side in (setup, given))
        found = _difference(theirs, ours, part)
        if found:
            place, theirs, ours = found  # the values there
            raise UserError(
                f"checkpoint {checkpoint}: was trained with {place}={shown(theirs)}, the config says {shown(ours)}; "
                "leave the config out: the checkpoint contains it"
            )


_ABSENT = "nothing"


def _unread(steps: Any) -> Any:
    """A pipeline without its file reading, which depends on the data."""
    if not isinstance(steps, list):
        return steps
    return [step for step in steps if not str(step.get("type")).rpartition(".")[2].startswith("Load")]


def _difference(one: Any, other: Any, place: str) -> tuple[str, Any, Any] | None:
    """The first difference of two configs; lists and tuples are treated as equal."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            mine, theirs = one.get(key), other.get(key)
            if str(mine) != str(theirs) and (found := _difference(mine, theirs, f"{place}.{key}")):
                return found
        return None
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        for i, pair in enumerate(zip(one, other, strict=True)):
            if found := _difference(*pair, f"{place}.{i}"):
                return found
        return None
    if one == other:
        return None
    return place, _ABSENT if one is None else one, _ABSENT if other is None else other
