"""Short options, and the values that an everyday recipe computes from the data and the machine."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from mmengine import Config
from mmengine.dist import get_world_size, is_main_process
from mmengine.registry import DATASETS, DefaultScope

from hybridzoo.train import names
from hybridzoo.train.compose import network_of
from hybridzoo.train.errors import UserError
from hybridzoo.train.nodes import dicts
from hybridzoo.train.weights import find_weights

LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
FEWEST_EPOCHS, MOST_EPOCHS = 10, 100
LONG_RUN = 2_000  # from this many iterations on, a moving average of the weights helps
SHORTEST_SCHEDULE = 20  # with fewer iterations, the learning rate is constant


# Short options --------------------------------------------------------------------------------------------------------


def short_options(
    config: Config,
    *,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    img_size: int | None = None,
    freeze: int | None = None,
    workers: int | None = None,
    options: Collection[str] = (),
) -> set[str]:
    """Apply the command line's short options to a config, in place; see `hybridzoo.train.config.load_config`.

    `options` are dotted keys that the user has set.

    Returns:
        The dotted keys that they set.

    Raises:
        UserError: a value out of range, or an option that this config does not use.
    """
    given: set[str] = set()
    at_least = {
        "epochs": (epochs, 1),
        "batch-size": (batch_size, 1),
        "img-size": (img_size, 32),
        "workers": (workers, 0),
    }
    for name, (value, least) in at_least.items():
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: give at least {least}")
    if epochs is not None:
        stretch(config, epochs, options)
        given.add("train_cfg.max_epochs")
    if batch_size is not None:
        config.train_dataloader.batch_size = batch_size
        given.add("train_dataloader.batch_size")
    if lr is not None:
        if not 0 < lr < float("inf"):
            raise UserError(f"--lr {lr}: give a number above 0")
        config.optim_wrapper.optimizer.lr = lr
        given.add("optim_wrapper.optimizer.lr")
    if img_size is not None:
        given |= _resize(config, img_size)
    if freeze is not None:
        if freeze < 0:
            raise UserError(f"--freeze {freeze}: 0 freezes the stem, k the stem and the first k stages")
        holder = network_of(config)
        holder.frozen_stages = freeze
        given.add("model.backbone.frozen_stages" if "backbone" in config.model else "model.frozen_stages")
    if workers is not None:
        for key in LOADERS:
            if config.get(key):
                config[key].num_workers = workers
                given.add(f"{key}.num_workers")
    return given


def stretch(config: Config, epochs: int, given: Collection[str] = ()) -> None:
    """Make a run `epochs` long, in place; schedules counted in epochs are stretched in proportion.

    Args:
        config: of any task.
        epochs: its new length.
        given: dotted keys that the user has set; they stay unchanged.

    Raises:
        UserError: the run counts iterations.
    """
    loop = config.get("train_cfg") or {}
    old = loop.get("max_epochs")
    if not old:
        raise UserError(
            f"--epochs {epochs}: this config counts iterations; give --cfg-options train_cfg.max_iters=N, and the ends "
            "of param_scheduler"
        )
    loop["max_epochs"] = epochs
    if "train_cfg.val_interval" not in given:
        loop["val_interval"] = min(loop.get("val_interval", 1), epochs)
    for place, schedule in _schedules(config):
        if not schedule.get("by_epoch", True):
            continue
        whole = not schedule.get("convert_to_iter_based")
        for key in ("begin", "end", "T_max", "step_size"):
            if schedule.get(key) and f"{place}.{key}" not in given:
                schedule[key] = _scaled(schedule[key], epochs / old, whole)
        if "milestones" in schedule and f"{place}.milestones" not in given:
            schedule["milestones"] = [_scaled(milestone, epochs / old, whole) for milestone in schedule["milestones"]]


def _scaled(value: float, factor: float, whole: bool) -> float:
    value = value * factor
    return max(1, round(value)) if whole or abs(value - round(value)) < 1e-9 else round(value, 4)


def _schedules(config: Config) -> list[tuple[str, Any]]:
    """(dotted key, schedule) of each."""
    found = config.get("param_scheduler") or []
    if isinstance(found, dict):
        return [("param_scheduler", found)]
    return [(f"param_scheduler.{index}", schedule) for index, schedule in enumerate(found)]


def _resize(config: Config, side: int) -> set[str]:
    """Scale all sizes of a config so that its training images have `side` pixels.

    `side` is the classifier's input, the shorter side of a detector's test images, or the segmentor's crop.
    """
    if config.task == "classification":
        keys = set()
        for key in LOADERS:
            if config.get(key):
                config[key].dataset.transform.input_size = side
                keys.add(f"{key}.dataset.transform.input_size")
        return keys
    size = config.model.get("data_preprocessor", {}).get("size")
    if not size:
        scales = [step.scale for step in dicts(config.val_dataloader) if "type" in step and step.get("scale")]
        size = scales[0] if scales else None
    if not size:
        raise UserError(f"--img-size {side}: this config does not resize its images; change its pipelines instead")
    factor = side / min(size)

    def resized(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(resized(item) for item in value)
        return max(1, round(value * factor))

    seen: set[int] = set()
    for key in LOADERS:
        for step in dicts(config.get(key)):
            if "type" in step and id(step) not in seen:
                seen.add(id(step))
                for name in ("scale", "scales", "crop_size", "img_scale", "max_size", "size"):
                    if step.get(name):
                        step[name] = resized(step[name])
    if config.model.get("data_preprocessor", {}).get("size"):
        config.model.data_preprocessor.size = resized(config.model.data_preprocessor.size)
    return set()


# Weights to start from ------------------------------------------------------------------------------------------------


def starting_weights(config: Config, weights: str | Path | None) -> str | Path | None:
    """The file that a run starts from: the given one, or the network's published weights if the recipe asks for them.

    Args:
        config: its `start` is "published", the name of published weights, or None.
        weights: from the command line; "none" starts from scratch.

    Returns:
        A file, or None for a run from scratch, which a line has reported.

    Raises:
        UserError: `weights` cannot be found or downloaded.
    """
    network = network_of(config).get("name", "")
    from hybridzoo.train import published

    if weights is not None and str(weights) != "none":
        if not _is_timms(str(weights)):
            return find_weights(weights, network)
        try:
            return published.weights_of(str(weights))
        except published.Unavailable as reason:
            raise UserError(f"weights {weights}: cannot be downloaded here ({reason}); give a file") from reason
    wanted = None if weights is not None else config.get("start")
    if not wanted:
        return None
    try:
        return published.weights_of(network if wanted == "published" else wanted)
    except published.Unavailable as reason:
        if is_main_process():  # printed directly: no logger exists yet
            print(f"from scratch: no weights of {network} here ({reason}); give --weights FILE")
        return None


def _is_timms(weights: str) -> bool:
    """Whether a name of weights belongs to one of timm's models, e.g. `convnext_tiny.fb_in22k`."""
    model = weights.partition(".")[0]
    return not Path(weights).exists() and model in names.timm_models() and model not in names.our_models()


# What follows from the data and the machine ---------------------------------------------------------------------------


def count_images(config: Config) -> int | None:
    """Number of training images of a configured run; None if unknown."""
    with DefaultScope.overwrite_default_scope(config.get("default_scope", "mmengine")):
        dataset = DATASETS.build(config.train_dataloader.dataset)
    try:
        return len(dataset)
    except TypeError:  # a stream of shards
        return None


def fit_data(config: Config, images: int | None, *, started: bool) -> None:
    """Set the remaining values of an everyday recipe, in place, and remove `settle`.

    Args:
        config: config after its data is configured.
        images: number of training images.
        started: the run starts from weights, not from scratch.
    """
    settle = dict(config.pop("settle", None) or {})
    if not settle.get("data"):
        return
    given = set(settle.get("given", ()))
    scratch = settle.get("scratch") or {}
    optimizer, loader = config.optim_wrapper.optimizer, config.train_dataloader
    if not started:
        config.start = None
        if "optim_wrapper.paramwise_cfg.layer_decay" not in given:
            (config.optim_wrapper.get("paramwise_cfg") or {}).pop("layer_decay", None)
        if "model.backbone.norm_eval" not in given:
            network_of(config).pop("norm_eval", None)  # statistics must be learned
        if "optim_wrapper.optimizer.lr" not in given:
            optimizer.lr = scratch.get("lr", optimizer.lr)
    workers = _workers()
    for key in LOADERS:
        if config.get(key) and f"{key}.num_workers" not in given:
            config[key].num_workers = min(config[key].num_workers, workers)
        if config.get(key) and not torch.cuda.is_available() and f"{key}.pin_memory" not in given:
            config[key].pop("pin_memory", None)
    if images is None:
        return
    share = max(1, images // get_world_size())
    usual = loader.batch_size
    if "train_dataloader.batch_size" not in given:
        loader.batch_size = _batch_size(usual, share)
    if "optim_wrapper.optimizer.lr" not in given:
        optimizer.lr = float(f"{optimizer.lr * (loader.batch_size / usual) ** 0.5:.3g}")
    if "train_cfg.max_epochs" not in given:
        seen = settle["images"] * (1 if started else scratch.get("longer", 1))
        stretch(config, int(min(MOST_EPOCHS, max(FEWEST_EPOCHS, round(seen / images)))), given)
    an_epoch = max(1, share // loader.batch_size)
    steps = an_epoch * config.train_cfg.max_epochs
    if steps < SHORTEST_SCHEDULE and not any(key.startswith("param_scheduler") for key in given):
        config.param_scheduler = []
    least = 2.5 / an_epoch  # at least two iterations: a warm-up of one would keep its start factor for ever
    for place, schedule in _schedules(config):
        whole = not schedule.get("convert_to_iter_based") or f"{place}.end" in given
        if not whole and schedule.get("end", 0) * an_epoch < 2:
            schedule["end"] = least
        if 0 < schedule.get("begin", 0) * an_epoch < 2 and f"{place}.begin" not in given:
            schedule["begin"] = least
    custom = config.get("custom_hooks") or "custom_hooks" in given
    if steps >= LONG_RUN and not custom and not config.get("fsdp"):
        config.custom_hooks = [{"type": "TimmEMAHook", "decay": min(0.9998, 1 - 20 / steps), "use_warmup": True}]


def _batch_size(usual: int, images: int) -> int:
    """At most the recipe's batch size, with at least four steps per epoch; even, and at least two for BatchNorm."""
    return max(2, min(usual, images // 4 // 2 * 2))


def _workers() -> int:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, (cpus - 1) // max(1, get_world_size())) if torch.cuda.is_available() else min(2, cpus // 4)


def use_amp_here(device: str | None = None) -> bool:
    """Whether mixed precision in bfloat16 is useful here: whether a GPU supports it."""
    return device != "cpu" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
