"""Prepares a test (config without training, fused network) and writes its results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine import Config
from torch import nn

from hybridzoo.layers.inference import Fusible
from hybridzoo.train import results

WORTH_FUSING = 8  # images: fusing takes about as long as one or two images
_OF_TRAINING = ("train_dataloader", "train_cfg", "optim_wrapper", "param_scheduler", "custom_hooks")
_HOOKS_OF_TRAINING = (
    *("batch_norm", "checkpoint", "param_scheduler", "sampler_seed", "seed", "stop_on_nan", "sync_buffers"),
)


def arrange(config: Config) -> None:
    """Make a configured run's config one of a test, in place: the test set, or the validation set without one."""
    if not config.get("test_dataloader"):
        config.test_dataloader, config.test_evaluator = config.val_dataloader, config.val_evaluator
        config.test_cfg = {key: value for key, value in (config.get("val_cfg") or {}).items() if key != "type"}
    for key in (*_OF_TRAINING, "val_dataloader", "val_cfg", "val_evaluator"):
        config[key] = None
    for key in _HOOKS_OF_TRAINING:
        config.default_hooks[key] = None
    config.resume, config.load_from = False, None


def fuse(model: nn.Module, images: int) -> None:
    """Fuse our networks in a model, in place, if there are enough images."""
    if images >= WORTH_FUSING:
        for network in [module for module in model.modules() if isinstance(module, Fusible)]:
            network.fuse()


def leave(
    config: Config, loop: Any, folder: Path, metrics: Mapping[str, float], *, pictures: bool, **facts: Any
) -> None:
    """Write the results of a validation or test into its folder, see `hybridzoo.train.results`.

    Args:
        config: of the run, with its data configured.
        loop: of the runner; its metrics know what they saw class by class. None: no validation.
        folder: that gets `results.json`.
        metrics: name -> value.
        pictures: also draw them; a folder that has a training's log gets its curves too.
        **facts: more for `results.json`.
    """
    if loop is None or not metrics:
        return
    details = next(filter(None, (getattr(metric, "details", None) for metric in loop.evaluator.metrics)), None)
    dataset = (config.get("test_dataloader") or config.get("val_dataloader") or {}).get("dataset") or {}
    data = dataset.get("root") or dataset.get("data_root") or dataset.get("name")
    results.write(folder, config.task, metrics, details, data=str(data), **{"split": "val", **facts})
    if pictures:
        results.draw(folder, training=bool(config.get("train_cfg")))
