"""Early stopping: ends training if validation has not improved for some epochs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS

from hybridzoo.train.errors import UserError
from hybridzoo.train.hooks import by_epoch
from hybridzoo.train.launching import first_decides
from hybridzoo.train.weights import tell

NAME = "validations.json"


@HOOKS.register_module()
class EarlyStopHook(Hook):
    """End training when the score that chooses the best checkpoint has not improved for some epochs.

    The scores are stored in the run's folder next to the checkpoints, which are written before an epoch is validated.
    So a resumed run counts as an uninterrupted one. An unfinished validation is repeated.

    Args:
        patience: epochs without a better score, or validations in runs that count iterations.
    """

    priority = "LOWEST"

    def __init__(self, patience: int) -> None:
        if type(patience) is not int or patience < 1:
            raise UserError(f"--early-stop {patience!r}: give a number of epochs, at least 1")
        self.patience = patience
        self._scores: dict[int, float] = {}

    def before_train(self, runner: Any) -> None:
        if runner.val_loop is None or self._chooser(runner) is None:
            raise UserError("--early-stop: this config has no validation, or no default_hooks.checkpoint.save_best")
        now = _now(runner)
        self._scores = first_decides(lambda: {k: score for k, score in self._read(runner).items() if 0 < k <= now})
        interval = int(runner.val_interval)
        if now and now % interval == 0 and now not in self._scores:
            runner.val_loop.run()
        elif self._scores:
            self._decide(runner)

    def after_val_epoch(self, runner: Any, metrics: dict[str, Any] | None = None) -> None:
        key = self._chooser(runner).key_indicators[0]
        if key not in (metrics or {}):
            raise UserError(f"--early-stop: validation gives no {key}, but {', '.join(metrics or {})}")
        self._scores[_now(runner)] = float((metrics or {})[key])
        if is_main_process():
            path = Path(runner.work_dir, NAME)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(json.dumps({"run": runner.run, "metric": key, "scores": self._scores}, indent=1))
            temporary.replace(path)
        self._decide(runner)

    def _decide(self, runner: Any) -> None:
        hook = self._chooser(runner)
        best = 0
        for step, score in sorted(self._scores.items()):
            if best == 0 or hook.is_better_than[hook.key_indicators[0]](score, self._scores[best]):
                best = step
        steps = sorted(self._scores)
        waited = steps[-1] - best if by_epoch(runner) else len([step for step in steps if step > best])
        if waited >= self.patience:
            runner.train_loop.stop_training = True
            unit = "epoch" if by_epoch(runner) else "iteration"
            what = "epochs" if by_epoch(runner) else "validations"
            tell(
                f"stopped early: {hook.key_indicators[0]} has not become better than {self._scores[best]:.4g} of "
                f"{unit} {best} for {waited} {what}"
            )

    def _read(self, runner: Any) -> dict[int, float]:
        """The scores that this run has stored in its folder."""
        try:
            content = json.loads(Path(runner.work_dir, NAME).read_text())
            if content["run"] == runner.run:
                return {int(step): float(score) for step, score in content["scores"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # no file, or another run's: start counting again
        return {}

    @staticmethod
    def _chooser(runner: Any) -> Any:
        """The hook that keeps the best checkpoint; None if no score decides what is best."""
        found = (hook for hook in runner.hooks if isinstance(hook, CheckpointHook))
        return next((hook for hook in found if hook.save_best and hook.save_best != "auto"), None)


def _now(runner: Any) -> int:
    return int(runner.epoch if by_epoch(runner) else runner.iter)
