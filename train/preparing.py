"""Prepares a run from a config: the task's modules, checks, held-out images, the work folder, this machine."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from mmengine import Config

import hybridzoo.backbones  # noqa: F401 - registers the networks with timm
from hybridzoo.train import config_check, resuming
from hybridzoo.train.data.holdout import Holdout, holdout_of
from hybridzoo.train.errors import UserError
from hybridzoo.train.names import TASKS
from hybridzoo.train.nodes import dicts

_runs = itertools.count()


def prepare(config: Config, sections: Collection[str] = config_check.RUNNER) -> ModuleType:
    """Import the packages of ``config``'s task, which fills the registries, and return the task's module.

    Args:
        config: the config of a run.
        sections: the sections that will be used; every key in them must be known.

    Raises:
        UserError: the task's extra is not installed, or the config has an unknown key.
    """
    if config.task not in TASKS:
        raise UserError(f"config task={config.task!r}: choose {', '.join(TASKS)}")
    if config.get("on_bad", "stop") not in ("stop", "skip"):
        raise UserError(f"config on_bad={config.on_bad!r}: choose stop or skip")
    module = task_module(config.task)
    config_check.check(config, sections)
    return module


def task_module(task: str) -> ModuleType:
    """The module of a task; importing it fills the task's registries.

    Raises:
        UserError: the task's extra is not installed.
    """
    try:
        if task != "classification":
            importlib.import_module("hybridzoo.train.mmcv_ops").install()
        return importlib.import_module(f"hybridzoo.train.{task}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("hybridzoo"):
            raise
        extra = "train" if task == "classification" else task
        raise UserError(f"{task} needs {error.name}: pip install 'hybridzoo[{extra}]'") from error
    except ImportError as error:
        if "libGL" not in str(error):
            raise
        raise UserError(
            f"{task} needs OpenCV; the build for desktops cannot load {str(error).split(':')[0]}: "
            "pip install --force-reinstall --no-deps opencv-python-headless"
        ) from error


def folder_of(config: Config, work_dir: str | Path | None) -> Path:
    """The work folder: the given one, the config's, or `work_dirs/<config name>`."""
    return Path(work_dir or config.get("work_dir") or Path("work_dirs", run_name(config)))


def run_name(config: Config) -> str:
    """The name of a config's file, which is the name of its run."""
    return Path(config.filename).stem if config.filename else "run"


def check_intervals(config: Config) -> None:
    """Check that checkpoints are saved between two steps of the optimizer.

    Raises:
        UserError: the interval is not a multiple of the accumulated iterations.
    """
    checkpoint: Any = config.default_hooks.get("checkpoint") or {}
    steps = (config.get("optim_wrapper") or {}).get("accumulative_counts", 1)
    if not checkpoint.get("by_epoch", True) and checkpoint.get("interval", steps) % steps:
        raise UserError(  # a checkpoint has no gradients
            f"default_hooks.checkpoint.interval={checkpoint.interval}: choose a multiple of accumulative_counts={steps}"
        )


def check_fsdp(config: Config, launcher: str) -> None:
    """Check that a run can divide its weights.

    Raises:
        UserError: there is only one process, or a hook averages the weights.
    """
    if launcher == "none":
        raise UserError("--fsdp: there is only one process; use torchrun and --launcher pytorch")
    if any("EMA" in str(hook.get("type")) for hook in config.get("custom_hooks") or ()):
        raise UserError("--fsdp: divided weights cannot have a moving average; give --cfg-options custom_hooks=[]")


def hold_out(config: Config, state: resuming.State | None, seed: int | None) -> None:
    """Set how the training images are divided, in place; a resumed run keeps its division.

    Raises:
        UserError: an invalid fraction, or another one than the run's.
    """
    given = config.get("val_fraction")
    if isinstance(given, int | float):
        first = seed if seed is not None else (config.get("randomness") or {}).get("seed") or 0
        given = Holdout(float(given), int(first)).options()
    asked = holdout_of(given)
    if state is not None:
        before = state.holdout
        if asked is not None and (before is None or before.fraction != asked.fraction):
            was = f"started with --val-fraction {before.fraction:g}" if before else "started without --val-fraction"
            raise UserError(f"--val-fraction {asked.fraction:g}: the run {was}, and continues with that")
        asked = before
    config.pop("val_fraction", None)
    if asked is not None:
        config.val_fraction = asked.options()


def set_up(config: Config, work_dir: str | Path | None, launcher: str) -> Path:
    """Set the values that depend on this machine and this call; return the work folder."""
    folder, name = folder_of(config, work_dir), run_name(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"work_dir {folder}: cannot be created ({error.strerror})") from error
    config.work_dir = str(folder)
    # mmengine keeps one object per name, and names runs by the second: two runs in one process would share it.
    config.experiment_name = f"{name}_{next(_runs)}"
    if config.get("visualizer"):
        config.visualizer.name = config.experiment_name
    config.launcher = "none" if launcher == "none" else "pytorch"  # the processes are connected
    if launcher != "none" and not torch.cuda.is_available():
        wrapper = {"type": "MMDistributedDataParallel", "broadcast_buffers": False, "device_ids": None}
        wrapper["find_unused_parameters"] = config.get("find_unused_parameters", False)
        config.model_wrapper_cfg = {**wrapper, **(config.get("model_wrapper_cfg") or {})}
    for key in ("train_dataloader", "val_dataloader", "test_dataloader"):
        loader = config.get(key)
        if loader and not loader.get("num_workers"):  # torch accepts neither without workers
            loader.persistent_workers = False
            loader.pop("prefetch_factor", None)
    return folder


def drop_missing_hooks(config: Config) -> None:
    """Remove hooks that are None: mmengine accepts None for its own default hooks only."""
    own = {"runtime_info", "timer", "sampler_seed", "logger", "param_scheduler", "checkpoint"}
    config.default_hooks = {key: hook for key, hook in config.default_hooks.items() if hook is not None or key in own}


def set_num_classes(model: Any, num_classes: int) -> None:
    """Set every ``num_classes`` in a model's config: of the classifier, or of the box, mask and decode heads."""
    for part in dicts(model):
        if "num_classes" in part:
            part["num_classes"] = num_classes


def count_classes(model: Any) -> int:
    """The first ``num_classes`` in the config of a model, 0 without one."""
    return next((int(part["num_classes"]) for part in dicts(model) if part.get("num_classes")), 0)
