"""mmengine's runner for all tasks, and our reader for the files that mmengine, mmdet or mmseg read."""

from __future__ import annotations

import contextlib
import logging
import re
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import torch
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop, CheckpointLoader
from mmengine.runner import Runner as MMRunner
from torch import nn

from hybridzoo.checkpoints.containers import flaw
from hybridzoo.checkpoints.transfer import DownloadError, fetch
from hybridzoo.train import progress, provenance, resuming, seeding, sharding
from hybridzoo.train.batchnorm import drop_a_last_one
from hybridzoo.train.errors import UserError, building
from hybridzoo.train.weights import read_checkpoint, start_from


class Runner(MMRunner):
    """mmengine's runner with little terminal output, seeded samples and checked initial weights."""

    initial_weights: Path | None = None
    resumed: resuming.State | None = None
    run = ""  # name of the run, stored in its checkpoints
    started = False  # whether it started from weights, stored there too
    sharded = False  # with FSDP
    origin = ""  # origin of the weights, in words
    lineage: tuple[provenance.Start, ...] = ()  # the same with licences, for users of the result
    _train_dataloader: Any

    def build_logger(self, log_level: int | str = "INFO", log_file: str | None = None, **kwargs: Any) -> MMLogger:
        logger = super().build_logger(log_level, log_file, **kwargs)
        for handler in logger.handlers:  # everything is in the log file; the terminal shows ProgressHook's output
            if isinstance(handler, logging.FileHandler):
                handler.handleError = _raise  # type: ignore[method-assign]  # e.g. of a full disk; logging would print it
            else:
                handler.setLevel(logging.ERROR)
        return logger

    def build_train_loop(self, loop: BaseLoop | dict[str, Any]) -> BaseLoop:
        if isinstance(self._train_dataloader, dict):
            self._train_dataloader = seeding.seeded_dataloader(self._train_dataloader, self.seed)
        with building("train_cfg, train_dataloader"):
            randomness = self.cfg.get("randomness") or {}
            self._train_dataloader = self.build_dataloader(
                self._train_dataloader, self.seed, randomness.get("diff_rank_seed", False)
            )
            drop_a_last_one(self._train_dataloader, self.model)
            built = super().build_train_loop(loop)
        if len(built.dataloader) == 0:
            batch = self.cfg.train_dataloader.get("batch_size")
            raise UserError(f"train_dataloader.batch_size={batch}: larger than the training set, choose a smaller one")
        return built

    def wrap_model(self, model_wrapper_cfg: dict[str, Any] | None, model: nn.Module) -> nn.Module:
        if self.cfg.get("fsdp"):
            return model.to(get_device())  # divided after its first weights are loaded
        wrapped = super().wrap_model(model_wrapper_cfg, model)
        return wrapped.to(self.cfg.device) if self.cfg.get("device") else wrapped

    def build_val_loop(self, loop: BaseLoop | dict[str, Any]) -> BaseLoop:
        with building("val_cfg, val_dataloader, val_evaluator"):
            return super().build_val_loop(loop)

    def build_test_loop(self, loop: BaseLoop | dict[str, Any]) -> BaseLoop:
        with building("test_cfg, test_dataloader, test_evaluator"):
            return super().build_test_loop(loop)

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        if self.cfg.get("fsdp") and not self.sharded:
            self._init_model_weights()
            self._load_initial_weights()
            sharding.shard(self.model)
            self.sharded = True
        with building("optim_wrapper"):
            return super().build_optim_wrapper(optim_wrapper)

    def build_param_scheduler(self, scheduler: Any) -> Any:
        with building("param_scheduler"):
            return super().build_param_scheduler(scheduler)

    def _init_model_weights(self) -> None:
        """mmengine calls this after the optimizer is built, which is too late if the model is divided."""
        if not self.sharded:
            super()._init_model_weights()

    def _load_initial_weights(self) -> None:
        if self.initial_weights is not None:
            start_from(self.model, self.initial_weights)

    def load_or_resume(self) -> None:
        if not self.sharded:
            self._load_initial_weights()  # mmengine has initialised the model before this
        if self.resumed is not None:
            self.resumed.check_built(self.optim_wrapper, self.param_schedulers)
            if self.sharded:
                found = self.resumed.content["optimizer"]
                self.resumed.content["optimizer"] = sharding.divided_state(found, self.optim_wrapper.optimizer)
            self.resume(str(self.resumed.path))

    def load_checkpoint(self, filename: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Returns the checkpoint that was read and checked before, instead of reading it with mmengine."""
        assert self.resumed is not None
        checkpoint = dict(self.resumed.content)
        checkpoint["meta"] = {**checkpoint["meta"], "seed": self.resumed.seed}
        checkpoint["meta"]["dataset_meta"] = getattr(self.train_dataloader.dataset, "metainfo", None)
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        inner: Any = self.model.module if is_model_wrapper(self.model) else self.model
        state = checkpoint["state_dict"]
        inner.load_state_dict(sharding.divided(state, inner.state_dict()) if self.sharded else state)
        return checkpoint

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with sharding.gathered(self.model, self.optim_wrapper.optimizer) if self.sharded else contextlib.nullcontext():
            super().save_checkpoint(*args, **kwargs)

    def dump_config(self) -> None:
        if self._train_loop is not None:  # a test does not change the training's config
            super().dump_config()


@CheckpointLoader.register_scheme(prefixes="", force=True)
def load_from_local(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Read local files for mmengine, mmdet and mmseg, e.g. from an `init_cfg`, with our reader."""
    return read_checkpoint(filename)


@CheckpointLoader.register_scheme(prefixes=("http://", "https://"), force=True)
def load_from_http(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Download a file into PyTorch's cache, and read it with our reader."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", PurePosixPath(urlsplit(filename).path).name)[-200:] or "weights.pth"
    target = Path(torch.hub.get_dir()) / "checkpoints" / name
    try:
        fetch(filename, target, flaw=flaw)
    except DownloadError as error:
        raise UserError(str(error)) from error
    return read_checkpoint(target)


def validation_metrics(runner: Runner) -> dict[str, float]:
    """Metric -> value of the last validation; empty if there was none."""
    scalars = runner.message_hub.log_scalars
    names = [name for name in scalars if name.startswith("val/") and name not in ("val/time", "val/data_time")]
    return {name.removeprefix("val/"): float(scalars[name].current()) for name in names}


def save_final(runner: Runner) -> None:
    """Write `final.pth`: weights and meta, without the optimizer."""
    meta = {"epoch": runner.epoch, "iter": runner.iter}
    runner.save_checkpoint(
        runner.work_dir,
        "final.pth",
        save_optimizer=False,
        save_param_scheduler=False,
        meta=meta,
        backend_args={"backend": "atomic"},
    )


def close_progress(runner: Runner) -> None:
    """Restore the terminal, also after an error."""
    for hook in runner.hooks:
        if isinstance(hook, progress.ProgressHook):
            hook.close()


def _raise(record: logging.LogRecord) -> None:
    raise
