"""Draws what a query sees: a panel for every layer, over the image that the network saw."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hybridzoo.train.plain import printable
from hybridzoo.train.show.probe import Seen

PANEL = 3.3  # longer side of a panel in inches
DIM = 0.45  # brightness of the image below the weights
COLOURS, SIGNED_COLOURS = "inferno", "RdBu_r"
QUERY = "#26e0ff"
FORMATS = ("png", "jpg", "webp", "pdf", "svg")
FAINT = 1e-3  # smaller weights, as a share of the total weight, count as 0 (rounding errors)


def draw(
    image: Image.Image,
    panels: Sequence[Seen],
    point: tuple[float, float],
    head: int | None,
    title: str,
    file_format: str = "png",
) -> bytes:
    """The content of the picture file. Stages go from left to right; types of attention in one stage are stacked.

    Args:
        image: as the network saw it, in RGB.
        panels: the measured layers, in the network's order.
        point: position of the query, x and y, as fractions of the image's width and height.
        head: number from 0, or None for the mean of all heads.
        title: above all panels.
        file_format: one of `FORMATS`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    places = _places(panels)
    rows, columns = (max(place) + 1 for place in zip(*places, strict=True))
    width, height = image.size
    scale = PANEL / max(width, height)
    size = (columns * (width * scale + 0.95), rows * (height * scale + 0.85) + 0.45)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    grey: Any = np.asarray(image.convert("L"), np.float32)[..., None].repeat(3, 2) / 255 * DIM
    for place, seen in zip(places, panels, strict=True):
        _panel(figure, axes[place], grey, seen, point, head)
    figure.suptitle(printable(title).replace("$", r"\$"), fontsize=11)
    file = io.BytesIO()
    figure.savefig(file, format=file_format)
    return file.getvalue()


def of_head(seen: Seen, head: int | None) -> tuple[NDArray[np.float32], float, float]:
    """The weights of one head (None: the mean) on the map, and their sums on other tokens and on padding."""
    if head is None:
        return seen.weights.mean(0), float(seen.extra.sum(1).mean()), float(seen.beyond.mean())
    return seen.weights[head], float(seen.extra[head].sum()), float(seen.beyond[head])


def caption(seen: Seen, head: int | None) -> str:
    """How many keys are seen, and the weight on other tokens and padding."""
    weights, extra, beyond = of_head(seen, head)
    if seen.layer.signed:
        return f"sum {weights.sum() + extra + beyond:.2f}, of which negative {weights[weights < 0].sum():.2f}"
    count, shown = int((weights != 0).sum()), float(weights.sum())
    whole = shown + extra + beyond or 1.0
    if seen.places is not None:
        text = f"{seen.places.shape[1]:,} points per group"
    else:
        text = f"all {count:,} tokens" if count == weights.size else f"{count:,} of {weights.size:,} tokens"
    parts = {"carrier tokens" if seen.layer.windows else "class token": extra, "padding": beyond}
    rest = [f"{100 * share / whole:.0f} % on {name}" for name, share in parts.items() if share / whole > FAINT]
    return f"sees {text}" + (f"; {', '.join(rest)}" if rest else "")


def _places(panels: Sequence[Seen]) -> list[tuple[int, int]]:
    """Row and column of every panel: one column per stage (or block of one stage), one row per type if possible."""
    single = len({seen.layer.place[0] for seen in panels}) == 1
    columns: dict[object, int] = {}
    rows: dict[str, int] = {}
    taken: set[tuple[int, int]] = set()
    places = []
    for seen in panels:
        layer = seen.layer
        column = columns.setdefault(layer.place if single else layer.place[0], len(columns))
        row = rows.get(layer.sort, 0)
        while (row, column) in taken:
            row += 1
        rows.setdefault(layer.sort, row)
        taken.add((row, column))
        places.append((row, column))
    return places


def _panel(
    figure: Any, axis: Any, grey: NDArray[Any], seen: Seen, point: tuple[float, float], head: int | None
) -> None:
    """Draw one layer: the darkened image, the weights over it, the query, and a color bar."""
    from matplotlib.collections import LineCollection

    height, width = grey.shape[:2]
    weights, _, _ = of_head(seen, head)
    axis.imshow(grey, extent=(0, width, height, 0), interpolation="bilinear")
    rows, columns = weights.shape
    most = float(np.abs(weights).max()) or 1.0
    signed = bool(weights.min() < -FAINT * most)
    if seen.places is not None:
        points = seen.places.reshape(-1, 3) if head is None else seen.places[head]
        most = float(points[:, 2].max()) or 1.0
        points = points[points[:, 2].argsort()]
        spots = (points[:, :2] + 0.5) * seen.cell
        shown = axis.scatter(
            spots[:, 1], spots[:, 0], s=3 + 60 * points[:, 2] / most, c=points[:, 2], cmap=COLOURS, vmin=0, vmax=most,
            edgecolors="white", linewidths=0.4, clip_on=True,
        )  # fmt: skip
    else:
        visible = np.where(weights != 0, 0.2 + 0.55 * np.abs(weights) / most, 0.0)
        limits = (-most, most) if signed else (0.0, most)
        shown = axis.imshow(
            weights, cmap=SIGNED_COLOURS if signed else COLOURS, vmin=limits[0], vmax=limits[1],
            alpha=visible if not signed else np.where(weights != 0, 0.8, 0.0),
            extent=(0, columns * seen.cell, rows * seen.cell, 0), interpolation="nearest",
        )  # fmt: skip
        edges = _outline(weights != 0, seen.region, seen.cell)
        axis.add_collection(LineCollection(edges, colors="white", linewidths=0.7))
    cell, (row, column) = seen.cell, seen.query
    corners = np.array([(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)]) + np.array((column, row))
    axis.plot(*(corners * cell).T, color=QUERY, linewidth=1)
    axis.plot(point[0] * width, point[1] * height, "+", color=QUERY, markersize=9, markeredgewidth=1.6)
    axis.set(xlim=(0, width), ylim=(height, 0))
    stage, block = seen.layer.place
    of = f"mean of {len(seen.weights)} heads" if head is None else f"head {head + 1} of {len(seen.weights)}"
    axis.set_title(f"stage {stage}, block {block}: {seen.layer.sort}\n{seen.layer.detail}\n{of}", fontsize=8)
    axis.text(0.5, -0.03, caption(seen, head), transform=axis.transAxes, ha="center", va="top", fontsize=7.5)
    bar = figure.colorbar(shown, ax=axis, shrink=0.8, pad=0.02, aspect=18)
    bar.ax.tick_params(labelsize=6.5)
    bar.formatter.set_powerlimits((-2, 3))
    bar.ax.yaxis.get_offset_text().set_fontsize(6.5)


def _outline(visible: NDArray[np.bool_], region: tuple[int, int] | None, cell: float) -> list[NDArray[np.float64]]:
    """Line segments, in pixels, around the tokens that are seen, and around each region of them."""
    rows, columns = visible.shape
    labels = visible.astype(int)
    if region is not None:
        number = np.arange(rows)[:, None] // region[0] * columns + np.arange(columns) // region[1]
        labels = np.where(visible, 1 + number, 0)
    elif visible.all():
        return []
    labels = np.pad(labels, 1)
    level, upright = labels[1:, 1:-1] != labels[:-1, 1:-1], labels[1:-1, 1:] != labels[1:-1, :-1]
    lines = [((x, y), (x + 1, y)) for y, x in zip(*np.nonzero(level), strict=True)]
    lines += [((x, y), (x, y + 1)) for y, x in zip(*np.nonzero(upright), strict=True)]
    return [np.asarray(line, float) * cell for line in lines]
