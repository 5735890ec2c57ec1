"""The curves of a run as a picture, and the table of results at the end of the demo."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from hybridzoo.train.errors import UserError


@dataclass(frozen=True)
class Metric:
    """A score that is shown. key: its name in the engine's results. scale: factor to percent."""

    name: str
    key: str
    scale: float = 1.0


METRICS: dict[str, tuple[Metric, ...]] = {
    "classification": (Metric("top-1", "accuracy/top1"),),
    "detection": (Metric("box AP50", "coco/bbox_mAP_50", 100), Metric("mask AP50", "coco/segm_mAP_50", 100)),
    "segmentation": (Metric("mIoU", "mIoU"),),
}


@dataclass(frozen=True)
class Result:
    """A line of the table; score and target in percent."""

    task: str
    metric: str
    score: float
    target: float | None
    minutes: float


def results(task: str, scores: Mapping[str, float], minutes: float, targets: Mapping[str, float]) -> list[Result]:
    """Lines of one task.

    Args:
        scores: what `engine.train` or `engine.test` returned.
        minutes: duration of the task.
        targets: metric name ("top-1", "box AP50", ...) -> percent; a metric without a target is only shown.
    """
    return [
        Result(task, metric.name, metric.scale * scores[metric.key], targets.get(metric.name), minutes)
        for metric in METRICS[task]
        if metric.key in scores
    ]


def table(lines: Iterable[Result]) -> Table:
    """Task, metric, score, target, whether it was reached, minutes; a task's name and minutes appear once."""
    shown = Table(box=box.SIMPLE_HEAVY, pad_edge=False)
    for name in ("task", "metric", "score", "target", "reached", "minutes"):
        shown.add_column(name, justify="right" if name in ("score", "target", "minutes") else "left", no_wrap=True)
    before = None
    for line in lines:
        again = line.task == before
        if line.target is None:
            target, reached = "", Text("")
        else:
            target = f"≥ {line.target:.1f} %"
            reached = Text("yes", "green") if line.score >= line.target else Text("no", "bold red")
        shown.add_row(
            "" if again else line.task,
            line.metric,
            Text(f"{line.score:.1f} %", "bold"),
            target,
            reached,
            "" if again else f"{line.minutes:.1f}",
        )
        before = line.task
    return shown


# Curves -----------------------------------------------------------------------------------------------------------


class NoLogError(UserError):
    """No loss was logged in a run's folder."""


@dataclass
class Curves:
    """Loss and each score as points (iteration, value), in the order of training."""

    loss: list[tuple[int, float]] = field(default_factory=list)
    scores: dict[str, list[tuple[int, float]]] = field(default_factory=dict)


def read_curves(work_dir: Path) -> Curves:
    """Read mmengine's log in ``<work_dir>/<timestamp>/vis_data/scalars.json``.

    A resumed run has several of these files; each one replaces the points that were run again. Validation lines have
    only the epoch or nothing, so a score belongs to the last iteration logged before it.

    Raises:
        NoLogError: nothing was logged, e.g. in a run with fewer iterations than the log's interval.
    """
    curves = Curves()
    for file in sorted(Path(work_dir).glob("*/vis_data/scalars.json")):
        iteration = 0
        for record in _records(file):
            if "loss" in record:
                if iteration == 0:
                    _forget(curves, int(record["iter"]))
                iteration = int(record["iter"])
                curves.loss.append((iteration, record["loss"]))
            elif iteration:  # otherwise a test run, which is not part of the curve
                for name, value in record.items():
                    if name != "step" and isinstance(value, int | float):
                        curves.scores.setdefault(name, []).append((iteration, value))
    if not curves.loss:
        raise NoLogError(f"no training log in {work_dir}; expected {work_dir}/<timestamp>/vis_data/scalars.json")
    return curves


def _records(file: Path) -> Iterable[dict[str, float]]:
    for line in file.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # the last line of a killed run may be incomplete
            continue


def _forget(curves: Curves, start: int) -> None:
    """Drop points after the checkpoint of a resumed run whose first logged iteration is `start`."""
    curves.loss[:] = [point for point in curves.loss if point[0] < start]
    for points in curves.scores.values():
        points[:] = [point for point in points if point[0] < start]


def draw_curves(runs: Mapping[str, Path], out: Path, targets: Mapping[str, float] | None = None) -> Path:
    """Loss above, scores in percent below, one column per task; writes the PNG `out` and returns it.

    Args:
        runs: task -> the run's work_dir.
        targets: metric name -> percent, drawn as a dashed line.

    Raises:
        UserError: a run logged nothing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    logs = {task: read_curves(folder) for task, folder in runs.items()}
    figure = Figure(figsize=(4.6 * len(logs), 6.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(logs), squeeze=False, sharex="col")
    for column, (task, curves) in enumerate(logs.items()):
        above, below = axes[:, column]
        above.plot(*zip(*curves.loss, strict=True), color=_BLUE, linewidth=1.6)
        above.set(title=task, ylabel="" if column else "training loss")
        above.set_ylim(bottom=0, top=1.05 * max(loss for _, loss in curves.loss))
        shown = [(metric, curves.scores[metric.key]) for metric in METRICS[task] if metric.key in curves.scores]
        _draw_scores(below, shown, targets or {})
        below.set(xlabel="iteration", ylabel="" if column else "validation score, %", ylim=(0, 104))
        for axis in (above, below):
            axis.grid(color="#dddddd", linewidth=0.7)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_xlim(left=0)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    return out


_BLUE, _ORANGE, _DARK = "#3b6fb6", "#d1711c", "#333333"


def _draw_scores(
    axis: Any, shown: Sequence[tuple[Metric, list[tuple[int, float]]]], targets: Mapping[str, float]
) -> None:
    for (metric, points), colour, marker in zip(shown, (_BLUE, _ORANGE), ("o", "s"), strict=False):
        steps, values = [step for step, _ in points], [metric.scale * value for _, value in points]
        axis.plot(steps, values, color=colour, marker=marker, markersize=4, label=f"{metric.name} {values[-1]:.1f}")
        if metric.name in targets:
            axis.axhline(targets[metric.name], color=colour, linestyle="--", linewidth=1)
            label = f"target {targets[metric.name]:g}"
            axis.annotate(label, (0.01, targets[metric.name]), xycoords=("axes fraction", "data"), color=_DARK,
                          va="bottom", fontsize=9)  # fmt: skip
    if shown:
        axis.legend(loc="lower right", frameon=True, framealpha=0.9)
