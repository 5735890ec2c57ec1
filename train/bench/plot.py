"""The plot of `bench models`: accuracy, or another column, against throughput, with readable names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybridzoo.train.bench.rows import Row
from hybridzoo.train.bench.tables import number

Box = tuple[float, float, float, float]
DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
COLUMNS = {  # value of --plot-y -> key of `tables.lines`, title of the axis, its unit
    "top1": ("top1", "top-1 on ImageNet-1k, published, %", 1.0),
    "params": ("params", "parameters, millions", 1e6),
    "macs": ("macs", "multiply-accumulates, billions", 1e9),
    "memory": ("memory_mib", "peak memory, MiB", 1.0),
    "latency": ("latency_ms", "one image, ms", 1.0),
}


def draw(lines: Sequence[Row], path: Path, y: str | None = None) -> None:
    """Points with names; bars of throughput if no network has a value for y.

    Args:
        lines: from `tables.lines`; networks that failed are left out.
        path: of the picture; its suffix sets matplotlib's format.
        y: a key of `COLUMNS`; default "top1". Networks without this value are drawn at the lower edge.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured = [line for line in lines if line["images_per_s"]]
    key, title, unit = COLUMNS[y or "top1"]
    known = [line for line in measured if line[key] is not None]
    size = (9, max(2.5, 1.2 + 0.32 * len(measured))) if not known else (9, 6)
    figure, axis = plt.subplots(figsize=size, dpi=150, layout="constrained")
    (_bars if not known else _points)(axis, measured, key, title, unit)
    axis.set_xlabel(f"images/s ({_how(lines)})")
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    plt.close(figure)


def _how(lines: Sequence[Row]) -> str:
    first = lines[0]
    words = [first["device"], f"batch {first['batch']}", first["dtype"]]
    return ", ".join(words + [first[key] for key in ("form", "mode") if first[key] not in ("as created", "eager")])


def _bars(axis: Any, lines: Sequence[Row], key: str, title: str, unit: float) -> None:
    ordered = sorted(lines, key=lambda line: line["images_per_s"])
    speeds = [line["images_per_s"] for line in ordered]
    errors = [[line["images_per_s"] - line["images_per_s_q1"] for line in ordered]]
    errors.append([line["images_per_s_q3"] - line["images_per_s"] for line in ordered])
    bars = axis.barh([line["network"] for line in ordered], speeds, xerr=errors, color="C0", ecolor="0.3")
    axis.bar_label(bars, [number(speed) for speed in speeds], padding=6)
    axis.margins(x=0.12)


def _points(axis: Any, lines: Sequence[Row], key: str, title: str, unit: float) -> None:
    known = [line for line in lines if line[key] is not None]
    values = [line[key] / unit for line in known]
    low, high = min(values), max(values)
    room = 0.12 * ((high - low) or abs(high) or 1)
    floor = low - (2.2 if len(known) < len(lines) else 1) * room
    axis.set(ylabel=title, xscale="log", ylim=(floor, high + room))
    speeds = [line["images_per_s"] for line in lines]
    axis.set_xlim(min(speeds) / 1.35, max(speeds) * 1.35)
    axis.xaxis.set_major_formatter("{x:g}")
    _ticks(axis)
    ys = [line[key] / unit if line[key] is not None else floor + 0.3 * room for line in lines]
    families: dict[str, str] = {}
    for line, x, value in zip(lines, speeds, ys, strict=True):
        family = line["network"].partition(".")[0].rpartition("_")[0] or line["network"]
        colour = families.setdefault(family, f"C{len(families) % 10}")
        filled = colour if line[key] is not None else "none"
        axis.scatter([x], [value], s=45, color=filled, edgecolors=colour, marker="o" if filled == colour else "v")
    if len(known) < len(lines):
        axis.set_title("hollow: no published value", fontsize=9, loc="left")
    _name(axis, [(x, y, line["network"]) for x, y, line in zip(speeds, ys, lines, strict=True)])


def _ticks(axis: Any) -> None:
    """Numbers at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _name(axis: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Write each name next to its point so that it covers no other name or point; a line connects distant names."""
    figure = axis.figure
    figure.canvas.draw()  # fixes the axes; names do not take part in the layout
    renderer, scale = figure.canvas.get_renderer(), 72 / figure.dpi  # positions are in points
    frame = [edge * scale for edge in axis.get_window_extent(renderer).extents]
    marks = [tuple(axis.transData.transform((x, y)) * scale) for x, y, _ in points]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in marks]
    for mark, (x, y, name) in sorted(zip(marks, points, strict=True), key=lambda pair: -pair[0][1]):
        text = axis.annotate(name, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=8.5)
        box = text.get_window_extent(renderer)
        size = (box.width * scale, box.height * scale)
        text.remove()
        place, far = _place(mark, size, frame, taken)
        arrow = dict(arrowstyle="-", color="0.6", lw=0.6, shrinkA=0, shrinkB=3) if far else None
        offset = (place[0] - mark[0], place[1] - mark[1])
        text = axis.annotate(
            name, (x, y), xytext=offset, textcoords="offset points", fontsize=8.5, va="bottom", arrowprops=arrow
        )
        text.set_in_layout(False)
        taken.append(place)


def _place(
    mark: Sequence[float], size: Sequence[float], frame: Sequence[float], taken: Sequence[Box]
) -> tuple[Box, bool]:
    """The nearest box of this size around a point that covers nothing, or else the one that covers least.

    Returns:
        Left, lower, right, upper edge; and whether it is so distant that it needs a line.
    """
    best, fewest, far = (0.0, 0.0, 0.0, 0.0), float("inf"), False
    for distance in (7, 14, 22, 32, 44, 58, 74, 92):
        for right, up in DIRECTIONS:
            left = mark[0] + right * distance - size[0] * (1 - right) / 2
            below = mark[1] + up * distance - size[1] * (1 - up) / 2
            box = (left, below, left + size[0], below + size[1])
            outside = box[0] < frame[0] or box[2] > frame[2] or box[1] < frame[1] or box[3] > frame[3]
            covered = sum(overlap(box, other) for other in taken) + 3 * outside
            if covered < fewest:
                best, fewest, far = box, covered, distance > 7
        if not fewest:
            break
    return best, far


def overlap(a: Box, b: Box) -> bool:
    """Whether two boxes (left, lower, right, upper) overlap."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
