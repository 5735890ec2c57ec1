"""The output of a run: a progress bar on a terminal, or a line at least every half minute in a file.

Details are written to the log file.
"""

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

from hybridzoo.train import opening
from hybridzoo.train.hooks import by_epoch, number
from hybridzoo.train.plain import printable
from hybridzoo.train.weights import tell

QUIET = 30.0  # seconds between lines in a log, if no iteration takes longer


@HOOKS.register_module()
class ProgressHook(Hook):
    """Prints a few lines at the start, a bar per epoch, and at the epoch's end one line with the metrics below.

    The bar shows loss, learning rate and remaining time.

    For runs that count iterations, the interval between validations is shown like an epoch. Only the first process
    prints. If the output is not a terminal, lines replace the bar.
    """

    priority = "LOWEST"

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True, markup=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._losses: list[float] = []
        self._began = self._step = self._said = time.perf_counter()
        self._clock = _Clock()

    def close(self) -> None:
        """Restore the terminal, also after an error."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = None

    def before_train(self, runner: Any) -> None:
        for line in opening.lines(runner):
            tell(line)
        self._said = time.perf_counter()

    def before_train_epoch(self, runner: Any) -> None:
        if by_epoch(runner):  # the loading of the first iteration belongs to the epoch
            self._began = self._step = time.perf_counter()

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if not self._losses and not by_epoch(runner):
            self._began = self._step = time.perf_counter()

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        done, total, title = self._stretch(runner, batch_idx)
        self._losses.append(number((outputs or {}).get("loss", float("nan"))))
        loss, lr = sum(self._losses) / len(self._losses), max(runner.optim_wrapper.get_lr()["lr"])
        took = self._took()
        self._clock.trained(took)
        left = self._clock.left(runner.max_iters - runner.iter - 1, _validations_left(runner))
        self._show(title, done, total, f"loss {loss:.4f}  lr {lr:.2e}", took, left)
        if done == total:
            self.close()
            seconds = time.perf_counter() - self._began
            mean = torch.tensor(loss, dtype=torch.float64)
            all_reduce(mean, "mean")
            loss = float(mean)
            self._print(f"{title}  loss {loss:.4f}  lr {lr:.2e}  {seconds:.1f} s{left}")
            self._losses = []

    def before_val_epoch(self, runner: Any) -> None:
        self._began = self._step = time.perf_counter()

    def before_test_epoch(self, runner: Any) -> None:
        self._began = self._step = self._said = time.perf_counter()

    def after_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._show("  validation", batch_idx + 1, len(runner.val_dataloader), "", self._took())

    def after_test_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._show("test", batch_idx + 1, len(runner.test_dataloader), "", self._took())

    def after_val_epoch(self, runner: Any, metrics: dict[str, Any] | None = None) -> None:
        self.close()
        self._clock.validated(time.perf_counter() - self._began)
        self._print(f"  validation  {_format(metrics)}")

    def after_test_epoch(self, runner: Any, metrics: dict[str, Any] | None = None) -> None:
        self.close()
        self._print(f"test  {_format(metrics)}")

    def _took(self) -> float:
        """Seconds since the last call: one iteration, with its loading."""
        before, self._step = self._step, time.perf_counter()
        return self._step - before

    def _stretch(self, runner: Any, batch_idx: int) -> tuple[int, int, str]:
        """(iterations done, total iterations, title) of the epoch, or of the interval up to the next validation."""
        if by_epoch(runner):
            return batch_idx + 1, len(runner.train_dataloader), f"epoch {runner.epoch + 1}/{runner.max_epochs}"
        interval = max(1, min(int(runner.val_interval), runner.max_iters))
        first = runner.iter // interval * interval
        last = min(first + interval, runner.max_iters)
        return runner.iter + 1 - first, last - first, f"iteration {last}/{runner.max_iters}"

    def _show(self, title: str, done: int, total: int, text: str, took: float, left: str = "") -> None:
        if not is_main_process():
            return
        if not self.console.is_terminal:
            waited = time.perf_counter() - self._said
            if done < total and waited + took > QUIET:  # the next iteration would be too late
                self._print("  ".join(filter(None, (title, f"{done}/{total}", text, f"{took:.2f} s each{left}"))))
            elif done == total and not text and waited > QUIET / 2:
                self._print(f"{title}  {done}/{total}  computing the scores")
            return
        if self._bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[text]}"), console=self.console, transient=True)
            self._task = self._bar.add_task(title.strip(), total=total, text=text)
            self._bar.start()
        assert self._task is not None
        self._bar.update(self._task, description=title.strip(), completed=done, total=total, text=text + left)

    def _print(self, line: str) -> None:
        self._said = time.perf_counter()
        if is_main_process():
            self.console.print(printable(line))


class _Clock:
    """Estimates the remaining time of a run from the times of its iterations and validations."""

    def __init__(self) -> None:
        self.iteration = self.validation = 0.0  # seconds, running means
        self._iterations = self._validations = 0

    def trained(self, seconds: float) -> None:
        self._iterations += 1
        if self._iterations == 2:
            self.iteration = 0.0  # the first one also starts workers and libraries
        self.iteration += (seconds - self.iteration) / min(max(self._iterations - 1, 1), 200)

    def validated(self, seconds: float) -> None:
        self._validations += 1
        self.validation += (seconds - self.validation) / self._validations

    def left(self, iterations: int, validations: int) -> str:
        """ ", 3 min left", or an empty text if nothing is left."""
        seconds = iterations * self.iteration + validations * self.validation
        return f", {in_words(seconds)} left" if iterations > 0 else ""


def in_words(seconds: float) -> str:
    """A duration in words: 40 s, 12 min, 3 h 05 min, 2 d 4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _validations_left(runner: Any) -> int:
    """Number of remaining validations, including the one after this interval."""
    if runner.val_loop is None:
        return 0
    done, whole = (runner.epoch, runner.max_epochs) if by_epoch(runner) else (runner.iter, runner.max_iters)
    interval = max(1, int(runner.val_interval))
    return -(-whole // interval) - done // interval


def _format(metrics: dict[str, Any] | None) -> str:
    scalars = ((name, value) for name, value in (metrics or {}).items() if isinstance(value, Real))
    return "  ".join(f"{name.split('/')[-1]} {value:.4g}" for name, value in scalars)
