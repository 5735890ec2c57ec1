"""Hooks of every run: seeds, safe checkpoints, a stop on NaN, a moving average of the weights.

They are the same for the three tasks and are enabled in ``configs/_base_/runtime.py``.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend
from mmengine.fileio.backends import register_backend
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.model import ExponentialMovingAverage
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import EpochBasedTrainLoop
from torch import Tensor, nn

from hybridzoo.train import bad_batch, provenance, setup_check, trained
from hybridzoo.train.errors import UserError
from hybridzoo.train.seeding import seed_all
from hybridzoo.train.sharding import local


def by_epoch(runner: Any) -> bool:
    """Whether the run counts epochs (or iterations)."""
    return isinstance(runner.train_loop, EpochBasedTrainLoop)


@register_backend("atomic")
class AtomicBackend(LocalBackend):
    """Local files that are complete or absent, even if the process is killed or the disk is full."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write ``obj`` to a temporary file, flush it to the disk, then rename it to ``filepath``.

        Raises:
            UserError: the file cannot be written; an older file with this name is unchanged.
        """
        target = Path(filepath)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if not isinstance(error, OSError):  # the run is being stopped
                raise
            raise UserError(
                f"cannot save checkpoint {target}: {error.strerror}; earlier checkpoints are intact: "
                "free disk space and continue with --resume"
            ) from error


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of processes that were killed while saving."""
    for path in folder.glob(".*.pth.*.tmp"):
        path.unlink(missing_ok=True)


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's checkpoints, written atomically; an old one is deleted only after the new one is on the disk.

    A checkpoint holds plain types and tensors only, so that ``torch.load(weights_only=True)`` reads it, and its
    ``meta`` has what inference needs: ``task``, ``class_names``, ``setup`` (see :mod:`hybridzoo.train.trained`),
    ``hybridzoo_version``; for readers ``cfg``, the resolved config, which is never evaluated; for resuming ``run``, the
    name of the run, and ``started``, whether it started from weights; for the model card ``training``, see
    :mod:`hybridzoo.train.provenance`.  mmengine's ``last_checkpoint`` file
    is not written: see ``run_folder.newest_first``.
    """

    best_ckpt_path: str | None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(backend_args={"backend": "atomic"}, **kwargs)

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict[str, Any]) -> None:
        # In distributed runs another process may have got the NaN; this one finds it in the weights.
        for key, value in runner.model.state_dict().items():
            if value.is_floating_point() and not torch.isfinite(local(value)).all():
                raise UserError(f"{key} is not finite at {position(runner)}: training stopped{last_good(runner)}")
        ids = list(runner.message_hub.runtime_info.get("keep_ckpt_ids", []))
        if self.max_keep_ckpts > 0:
            ids = [*(i for i in ids if i != step), step]
            runner.message_hub.update_info("keep_ckpt_ids", ids[-self.max_keep_ckpts :])
        name = self.filename_tmpl.format(step)
        self.last_ckpt = os.path.join(self.out_dir, name)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
        )
        if self.max_keep_ckpts > 0 and is_main_process():
            for old in ids[: -self.max_keep_ckpts]:
                Path(self.out_dir, self.filename_tmpl.format(old)).unlink(missing_ok=True)

    def _save_best_checkpoint(self, runner: Any, metrics: dict[str, Any]) -> None:
        wanted = self.key_indicators if self.save_best else ()
        lacking = [key for key in wanted if key != "auto" and metrics and key not in metrics]
        if lacking:
            given = ", ".join(metrics)
            raise UserError(f"default_hooks.checkpoint.save_best={lacking[0]!r}: validation gives {given}; choose one")
        if len(wanted) != 1:
            return super()._save_best_checkpoint(runner, metrics)
        # mmengine deletes the old best before it writes the new one: hide the old one until then.
        old, self.best_ckpt_path = self.best_ckpt_path, None
        super()._save_best_checkpoint(runner, metrics)
        if self.best_ckpt_path is None:
            self.best_ckpt_path = old
        elif old and old != self.best_ckpt_path and is_main_process():
            Path(old).unlink(missing_ok=True)
        return None

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        import hybridzoo

        meta = checkpoint["meta"]
        meta["task"] = runner.cfg.get("task")
        meta["class_names"] = list((meta.get("dataset_meta") or {}).get("classes", []))
        meta["hybridzoo_version"] = hybridzoo.__version__
        if runner.cfg.get("val_fraction"):
            meta["val_fraction"] = dict(runner.cfg.val_fraction)
        meta["run"], meta["started"] = getattr(runner, "run", ""), getattr(runner, "started", False)
        meta[setup_check.KEY] = trained.describe(runner.cfg)
        meta[provenance.KEY] = provenance.describe(runner)
        hub = checkpoint["message_hub"]
        # The smoothed curves start again after a resume: their buffers are objects, and scalars.json has the values.
        hub["log_scalars"] = {}
        hub["resumed_keys"] = {key: value for key, value in hub["resumed_keys"].items() if key in hub["runtime_info"]}
        checkpoint["meta"], checkpoint["message_hub"] = _plain(meta), _plain(hub)


def _plain(value: Any) -> Any:
    """Nested data without NumPy's and mmengine's types."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value


def number(value: Tensor | float) -> float:
    """A scalar, also from a tensor that requires gradients."""
    return float(value.detach() if isinstance(value, Tensor) else value)


def position(runner: Any) -> str:
    """The position in the run, in words: ``iteration 123 (epoch 4)``, counted from 1."""
    epoch = f" (epoch {runner.epoch + 1})" if by_epoch(runner) else ""
    return f"iteration {runner.iter + 1}{epoch}"


def last_good(runner: Any) -> str:
    """End of an error message: which checkpoint to go back to."""
    path = runner.message_hub.runtime_info.get("last_ckpt")
    return f"; the last good checkpoint is {path}" if path else "; no checkpoint had been saved yet"


@HOOKS.register_module()
class StopOnNaNHook(Hook):
    """Stop at the first loss that is NaN or infinite, before anything is saved."""

    priority = "VERY_HIGH"

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        for name, value in (outputs or {}).items():
            if "loss" in name and not math.isfinite(number(value)):
                loader = runner.train_loop.dataloader
                model = getattr(runner.model, "module", runner.model)
                files = bad_batch.files_of(loader, batch_idx) if by_epoch(runner) else []
                fault = bad_batch.describe(data_batch, files, bad_batch.number_of_classes(model))
                raise UserError(
                    f"{name} is {number(value)} at {position(runner)}: training stopped{last_good(runner)}; "
                    + (fault or "the batch is correct: try a lower learning rate, clip_grad or --no-amp")
                )


@HOOKS.register_module()
class SeedHook(Hook):
    """Make each iteration a function of (seed, rank, iteration), and let no gradients pass the end of an epoch.

    See :mod:`hybridzoo.train.seeding`.  Gradients accumulated at the end of an epoch are applied there, scaled by their
    number: a checkpoint does not hold gradients.
    """

    priority = "VERY_HIGH"

    def before_train_epoch(self, runner: Any) -> None:
        loader = runner.train_loop.dataloader
        if by_epoch(runner):
            runner.optim_wrapper.initialize_count_status(runner.model, 0, len(loader))
        if loader.sampler is None or isinstance(loader.dataset, torch.utils.data.IterableDataset):
            getattr(loader.dataset, "set_epoch", lambda epoch: None)(runner.epoch)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        # After the batch is loaded: loading in this process changes the generators.
        seed_all(runner.seed, runner.rank, runner.iter)


@MODELS.register_module()
class TimmEMA(ExponentialMovingAverage):
    """Moving average as in timm: of parameters and of floating-point buffers.

    Args:
        model: the model to average.
        decay: decay per update of the weights.
        use_warmup: let the decay grow as ``1 - (1 + step) ** -(2 / 3)`` up to ``decay``, for short runs.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, use_warmup: bool = False) -> None:
        super().__init__(model, momentum=1 - decay, update_buffers=True)
        self.use_warmup = use_warmup

    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: Tensor) -> None:
        momentum = max(self.momentum, (1 + int(steps)) ** (-2 / 3)) if self.use_warmup else self.momentum
        averaged_param.lerp_(source_param, momentum)


@HOOKS.register_module()
class TimmEMAHook(EMAHook):
    """Keep a :class:`TimmEMA` of the model, updated whenever the weights are.

    Args:
        decay: see :class:`TimmEMA`.
        use_warmup: see :class:`TimmEMA`.
        evaluate: the weights for validation and for a checkpoint's ``state_dict``: ``"ema"`` or ``"raw"``. The others
            are in ``ema_state_dict``.
    """

    priority = "ABOVE_NORMAL"  # swap before mmengine's hook averages the buffers over processes

    def __init__(self, decay: float = 0.9999, use_warmup: bool = False, evaluate: str = "ema") -> None:
        if evaluate not in ("ema", "raw"):
            raise UserError(f"TimmEMAHook evaluate={evaluate!r}: choose 'ema' or 'raw'")
        super().__init__(ema_type="TimmEMA", strict_load=True, decay=decay, use_warmup=use_warmup)
        self.evaluate = evaluate

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        if runner.optim_wrapper.should_update():  # otherwise gradients are still being accumulated
            self.ema_model.update_parameters(self.src_model)

    def _swap_ema_parameters(self) -> None:
        if self.evaluate == "ema":
            super()._swap_ema_parameters()

    def _swap_ema_state_dict(self, checkpoint: dict[str, Any]) -> None:
        if self.evaluate == "ema":
            super()._swap_ema_state_dict(checkpoint)
