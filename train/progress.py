"""What a person sees of a run: a bar on a terminal, else a line per epoch.  The details go to the log file."""

from __future__ import annotations

import time
from numbers import Real
from typing import Any

import torch
from mmengine.dist import all_reduce, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from hybridzoo.train.hooks import by_epoch, number
from hybridzoo.train.plain import printable


@HOOKS.register_module()
class ProgressHook(Hook):
    """A bar per epoch with loss, learning rate and time left, a line when the epoch is done, the metrics below.

    Runs counted in iterations show one stretch between validations as an epoch's bar.  Only the first process shows
    anything, and only lines where the output is no terminal.
    """

    priority = "LOWEST"

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True, markup=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._losses: list[float] = []
        self._began = time.perf_counter()

    def close(self) -> None:
        """Give the terminal back, also after an error."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = None

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        done, total, title = self._stretch(runner, batch_idx)
        if not self._losses:
            self._began = time.perf_counter()
        self._losses.append(number((outputs or {}).get("loss", float("nan"))))
        loss, lr = sum(self._losses) / len(self._losses), max(runner.optim_wrapper.get_lr()["lr"])
        self._show(title, done, total, f"loss {loss:.4f}  lr {lr:.2e}")
        if done == total:
            self.close()
            seconds = time.perf_counter() - self._began
            mean = torch.tensor(loss, dtype=torch.float64)
            all_reduce(mean, "mean")
            loss = float(mean)
            self._print(f"{title}  loss {loss:.4f}  lr {lr:.2e}  {seconds:.1f} s")
            self._losses = []

    def after_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._show("validation", batch_idx + 1, len(runner.val_dataloader), "")

    def after_test_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._show("test", batch_idx + 1, len(runner.test_dataloader), "")

    def after_val_epoch(self, runner: Any, metrics: dict[str, Any] | None = None) -> None:
        self.close()
        self._print(f"  validation  {_format(metrics)}")

    def after_test_epoch(self, runner: Any, metrics: dict[str, Any] | None = None) -> None:
        self.close()
        self._print(f"test  {_format(metrics)}")

    def _stretch(self, runner: Any, batch_idx: int) -> tuple[int, int, str]:
        """(iterations done, iterations in all, title) of the epoch, or of the stretch up to the next validation."""
        if by_epoch(runner):
            return batch_idx + 1, len(runner.train_dataloader), f"epoch {runner.epoch + 1}/{runner.max_epochs}"
        interval = max(1, min(int(runner.val_interval), runner.max_iters))
        first = runner.iter // interval * interval
        last = min(first + interval, runner.max_iters)
        return runner.iter + 1 - first, last - first, f"iteration {last}/{runner.max_iters}"

    def _show(self, title: str, done: int, total: int, text: str) -> None:
        if not (is_main_process() and self.console.is_terminal):
            return
        if self._bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[text]}"), console=self.console, transient=True)
            self._task = self._bar.add_task(title, total=total, text=text)
            self._bar.start()
        assert self._task is not None
        self._bar.update(self._task, description=title, completed=done, total=total, text=text)

    def _print(self, line: str) -> None:
        if is_main_process():
            self.console.print(printable(line))


def _format(metrics: dict[str, Any] | None) -> str:
    scalars = ((name, value) for name, value in (metrics or {}).items() if isinstance(value, Real))
    return "  ".join(f"{name.split('/')[-1]} {value:.4g}" for name, value in scalars)
