"""Results of a validation in its folder: `results.json`, and pictures.

`results.json` holds (see `docs/results.md`): `format`, `hybridzoo_version`, `task`, `split`, `data`, `checkpoint`,
`images`, `classes`, `metrics`, `per_class`, `confusion_matrix`, for detection `pr_curves`, and `options`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import hybridzoo
from hybridzoo.train import report
from hybridzoo.train.errors import UserError
from hybridzoo.train.measures import Details
from hybridzoo.train.plain import printable

NAME = "results.json"
FORMAT = 1
PICTURES = ("confusion_matrix.png", "pr_curves.png", "curves.png")
MOST_NAMED = 40  # most classes of a confusion matrix with names
MOST_NUMBERS = 15  # most classes of a confusion matrix with numbers in the cells
MOST_CURVES = 12  # most classes with their own curve


def write(folder: Path, task: str, metrics: Mapping[str, float], details: Details | None, **facts: Any) -> Path:
    """Write `results.json`, completely or not at all.

    Args:
        folder: the folder of the file.
        task: of the run.
        metrics: name -> value.
        details: values of each class, if the metric has them.
        **facts: `split`, `data`, `checkpoint`, `options`.

    Raises:
        UserError: it cannot be written.
    """
    content: dict[str, Any] = {"format": FORMAT, "hybridzoo_version": hybridzoo.__version__, "task": task, **facts}
    content["metrics"] = dict(metrics)
    if details is not None:
        content["images"] = details.images
        content["classes"] = [row["class"] for row in details.rows]
        content["per_class"] = details.rows
        content["confusion_matrix"] = {
            "rows": "true",
            "columns": "predicted",
            "unit": details.unit,
            "labels": details.labels,
            "counts": details.counts.tolist(),
        }
        if details.curves:
            content["pr_curves"] = {"iou": 0.5, "recall": [round(i / 100, 2) for i in range(101)], **details.curves}
    file = folder / NAME
    temporary = file.with_name(f".{NAME}.{os.getpid()}.tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_text(_json(content), encoding="utf-8")
        os.replace(temporary, file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{file}: cannot be written ({error.strerror})") from error
    return file


def read(folder: Path) -> dict[str, Any]:
    """Read the file that `write` wrote.

    Raises:
        UserError: the file does not exist, or does not hold results.
    """
    file = folder / NAME
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{file}: not results in format {FORMAT}")
    return content


def _json(content: Mapping[str, Any]) -> str:
    """JSON with one key per line, and one list entry per line: readable, and small for a large matrix."""
    lines = []
    for key, value in content.items():
        value = _without_nan(value)
        if key == "per_class":
            inner = ",\n".join(f"    {json.dumps(row, ensure_ascii=False)}" for row in value)
            text = f"[\n{inner}\n  ]"
        elif isinstance(value, dict) and value:
            inner = ",\n".join(f"    {json.dumps(k)}: {_rows(v)}" for k, v in value.items())
            text = f"{{\n{inner}\n  }}"
        else:
            text = json.dumps(value, ensure_ascii=False)
        lines.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _rows(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], list):
        inner = ",\n".join(f"      {json.dumps(row)}" for row in value)
        return f"[\n{inner}\n    ]"
    return json.dumps(value, ensure_ascii=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Pictures -------------------------------------------------------------------------------------------------------------


def draw(folder: Path, *, training: bool = False) -> list[Path]:
    """Draw the content of a folder's `results.json` as PNG files in the same folder.

    Args:
        folder: folder of a run or a test.
        training: also draw the curves of the training logged there.

    Returns:
        The files: `confusion_matrix.png`, `pr_curves.png` (detection) and `curves.png` (training that logged a loss).

    Raises:
        UserError: no results, or a picture cannot be written.
    """
    content = read(folder)
    drawn: list[Path] = []
    try:
        if matrix := content.get("confusion_matrix"):
            drawn.append(draw_confusion(matrix, folder / "confusion_matrix.png"))
        if curves := content.get("pr_curves"):
            drawn.append(draw_pr(curves, content["per_class"], folder / "pr_curves.png"))
        if training:
            with contextlib.suppress(report.NoLogError):  # a run too short for a curve
                drawn.append(report.draw_curves({content["task"]: folder}, folder / "curves.png"))
    except OSError as error:
        raise UserError(f"{folder}: a picture cannot be written ({error.strerror})") from error
    return drawn


def draw_confusion(matrix: Mapping[str, Any], out: Path) -> Path:
    """Rows are true classes, columns predicted classes; colours and numbers are percentages of the row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = np.asarray(matrix["counts"], float)
    names = [_short(name) for name in matrix["labels"]]
    whole = counts.sum(1, keepdims=True)
    share = 100 * np.divide(counts, whole, out=np.zeros_like(counts), where=whole > 0)
    count = len(names)
    side = min(2.6 + 0.42 * min(count, MOST_NAMED), 11)
    figure = Figure(figsize=(side + 1.6, side + 0.8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    shown = axis.imshow(share, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(shown, ax=axis, shrink=0.8, label=f"% of a true class's {matrix['unit']}")
    axis.set(xlabel="predicted", ylabel="true", title=f"{int(counts.sum()):,} {matrix['unit']}")
    if count <= MOST_NAMED:
        axis.set_xticks(range(count), names, rotation=90 if max(map(len, names)) > 3 else 0)
        axis.set_yticks(range(count), names)
    if count <= MOST_NUMBERS:
        for row, column in zip(*np.nonzero(counts), strict=True):
            dark = share[row, column] > 55
            text = f"{share[row, column]:.0f}" if share[row, column] >= 0.5 else "<1"
            axis.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "#222222")
    figure.savefig(out)
    return out


def draw_pr(curves: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], out: Path) -> Path:
    """Precision against recall at an IoU of 0.5; panels for boxes and masks, one line for each class, and the mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = [kind for kind in ("box", "mask") if kind in curves]
    figure = Figure(figsize=(5.6 * len(kinds) + 1.6, 4.8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(kinds), squeeze=False)[0]
    scores = {row["class"]: row for row in rows}
    for axis, kind in zip(axes, kinds, strict=True):
        lines = curves[kind]
        named = len(lines) <= MOST_CURVES
        for index, (name, precision) in enumerate(lines.items()):
            colour = f"C{index % 10}" if named else "#b8c4d6"
            style = "-" if index < 10 else "--"
            score = scores[name].get(f"{kind} AP50")
            label = f"{_short(name)}  {score:.2f}" if named and score is not None else None
            axis.plot(curves["recall"], precision, color=colour, linestyle=style, linewidth=1.2, label=label)
        if lines:
            mean = np.mean(list(lines.values()), axis=0)
            axis.plot(curves["recall"], mean, color="#222222", linewidth=2.4, label=f"mean  {mean.mean():.2f}")
            axis.legend(loc="lower left", fontsize=8, title=f"{kind} AP50", framealpha=0.9)
        axis.set(
            xlabel="recall", ylabel="precision", title=f"{kind}, IoU {curves['iou']:g}", xlim=(0, 1), ylim=(0, 1.02)
        )
        axis.grid(color="#dddddd", linewidth=0.7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out)
    return out


def _short(name: str) -> str:
    """A class's name, shortened for a picture; a dollar sign would start a formula."""
    name = printable(name).replace("$", r"\$")
    return name if len(name) <= 24 else f"{name[:23]}…"
