"""Objects' outlines in COCO's format, polygons or run lengths: read, checked, measured, drawn."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from hybridzoo.train.errors import UserError
from hybridzoo.train.notes import Notes

Size = tuple[int, int]  # width, height


def read(value: Any, size: Size, where: str, needed: bool, notes: Notes) -> tuple[Any, str]:
    """A mask as polygons or run lengths in COCO's format, or None and the reason why it cannot be used.

    Raises:
        UserError: a mask is needed and missing, or the segmentation is not a mask.
    """
    if not value:
        if needed:
            raise UserError(
                f"{where} has no segmentation; add polygons or run lengths, or choose a detector without masks"
            )
        return None, "has no segmentation"
    try:
        if isinstance(value, dict):
            return _run_lengths(value, size)
        if not isinstance(value, list):
            raise UserError(f"has segmentation {str(value)[:60]!r}; expected polygons or run lengths")
        polygons = _polygons(value)
        if polygons is not value:
            notes.add("segmentations that are one list of coordinates or points: read as a polygon", where)
        return _usable(polygons, size, where, notes)
    except UserError as error:
        if needed:
            raise UserError(f"{where} {error}") from error
        return None, str(error)


def _polygons(value: list[Any]) -> list[Any]:
    """Lists [x, y, x, y, ...] of a segmentation, which may be one such list, or contain points [x, y]."""
    if all(is_finite(item) for item in value):
        return [value]
    if len(value) > 2 and all(_is_point(item) for item in value):
        return [[side for point in value for side in point]]
    if any(isinstance(item, list) and item and all(_is_point(point) for point in item) for item in value):
        return [
            [side for point in item for side in point] if item and all(_is_point(point) for point in item) else item
            for item in value
        ]
    return value


def _is_point(item: Any) -> bool:
    return isinstance(item, list) and len(item) == 2 and all(is_finite(side) for side in item)


def _usable(polygons: list[Any], size: Size, where: str, notes: Notes) -> tuple[Any, str]:
    good, problems = [], []
    for polygon in polygons:
        if not isinstance(polygon, list) or not all_finite(polygon):
            raise UserError(f"has a polygon {str(polygon)[:60]!r}; expected [x, y, x, y, ...] in pixels")
        problem = _polygon_problem(polygon, size)
        if problem:
            problems.append(problem)
        else:
            good.append(polygon)
    if not good:
        return None, f"has {problems[0] if problems else 'no polygon'}"
    if problems:
        notes.add("polygons without an area, of objects that have another polygon: left out", f"{where}: {problems[0]}")
    return good, ""


def _polygon_problem(polygon: list[float], size: Size) -> str:
    if len(polygon) % 2:
        return f"a polygon of {len(polygon)} numbers, an odd count"
    points = list(zip(polygon[::2], polygon[1::2], strict=True))
    if len(points) < 3:
        return f"a polygon of {len(points)} points"
    for axis, side in enumerate(size):
        values = [point[axis] for point in points]
        if min(values) < -side or max(values) > 2 * side:
            raise UserError(f"has a polygon with coordinates {min(values):g} to {max(values):g}, far from its image")
        if max(values) <= 0 or min(values) >= side:
            return "a polygon outside its image"
    (x0, y0), rest = points[0], points[1:]
    crosses = ((a[0] - x0) * (b[1] - y0) - (b[0] - x0) * (a[1] - y0) for a, b in itertools.pairwise(rest))
    return "" if any(crosses) else "a flat polygon, all on one line"


def _run_lengths(value: dict[str, Any], size: Size) -> tuple[Any, str]:
    width, height = size
    counts = value.get("counts")
    if value.get("size") != [height, width]:
        raise UserError(f"has run lengths of size {value.get('size')!r}; its image is {[height, width]}")
    try:
        runs = _decompressed(counts) if isinstance(counts, str) else counts
    except (IndexError, ValueError):
        runs = None
    if not (isinstance(runs, list) and all(isinstance(run, int) and run >= 0 for run in runs)):
        raise UserError("has run lengths that cannot be read; expected COCO's counts")
    if sum(runs) != width * height:
        raise UserError(f"has run lengths of {sum(runs)} pixels in all; its image has {width * height}")
    if not sum(runs[1::2]):
        return None, "has run lengths without a pixel"
    return value, ""


def _decompressed(text: str) -> list[int]:
    """COCO's compressed counts: 5 bits a character, from the third run on the difference to the run before last."""
    runs: list[int] = []
    place = 0
    while place < len(text):
        run, shift = 0, 0
        while True:
            bits = ord(text[place]) - 48
            if not (0 <= bits < 64 and shift < 40):
                raise ValueError(text[place])
            run |= (bits & 31) << shift
            shift += 5
            place += 1
            if not bits & 32:
                break
        if bits & 16:
            run -= 1 << shift
        runs.append(run + (runs[-2] if len(runs) > 2 else 0))
    return runs


def area(outline: Any) -> float:
    """Pixels in a mask; for polygons, the area from their corners."""
    if outline is None:
        return 0.0
    if isinstance(outline, dict):
        counts = outline["counts"]
        return float(sum((_decompressed(counts) if isinstance(counts, str) else counts)[1::2]))
    total = 0.0
    for polygon in outline:
        x, y = polygon[::2], polygon[1::2]
        total += abs(sum(x[i - 1] * y[i] - x[i] * y[i - 1] for i in range(len(x)))) / 2
    return total


def mask(outline: Any, size: Size) -> NDArray[np.bool_]:
    """(H, W): polygons or run lengths as a mask, for drawing."""
    if isinstance(outline, dict):
        return _inside(outline)
    canvas = Image.new("1", size)
    for polygon in outline:
        ImageDraw.Draw(canvas).polygon(polygon, fill=1)
    return np.asarray(canvas)


def _inside(outline: dict[str, Any]) -> NDArray[np.bool_]:
    counts, (height, width) = outline["counts"], outline["size"]
    runs = _decompressed(counts) if isinstance(counts, str) else counts
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T  # runs go down the columns


def box(outline: Any) -> list[float]:
    if isinstance(outline, dict):
        inside = _inside(outline)
        columns, rows = np.flatnonzero(inside.any(0)), np.flatnonzero(inside.any(1))
        size = int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)
        return [int(columns[0]), int(rows[0]), *size]
    x = [side for polygon in outline for side in polygon[::2]]
    y = [side for polygon in outline for side in polygon[1::2]]
    return [min(x), min(y), max(x) - min(x), max(y) - min(y)]


def is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def all_finite(values: list[Any]) -> bool:
    """Whether all are finite numbers; fast, because COCO has 40 million coordinates."""
    try:
        if set(map(type, values)) <= {int, float} and math.isfinite(sum(values)):
            return True
    except OverflowError:  # a whole number that is too large for a float
        pass
    return all(is_finite(value) for value in values)
