"""Compares a file or a graph with PyTorch."""

from __future__ import annotations

from torch import Tensor

from hybridzoo.train.export.sources import Reader, Source

TOLERANCE = 1e-3  # largest difference from PyTorch, relative to the standard deviation of an output


class Mismatch(Exception):
    """The result differs from PyTorch; the text says which output and where."""


def compare(source: Source, run: Reader, size: tuple[int, int, int], tolerance: float = TOLERANCE) -> float:
    """The largest difference between a file and the network at an image of (height, width, batch), see `TOLERANCE`.

    Raises:
        Mismatch: it is larger than the tolerance, or the outputs have other shapes.
    """
    image, worst = source.image(*size), 0.0
    expected, got = source.run(image), run(image)
    where = f"at {size[0]} x {size[1]} px, batch {size[2]}"
    for name, wanted, found in zip(source.outputs, expected, got, strict=True):
        if wanted.shape != found.shape:
            raise Mismatch(f"{name} has the shape {tuple(found.shape)}, PyTorch's {tuple(wanted.shape)} {where}")
        error = difference(wanted, found)
        if not error <= tolerance:
            raise Mismatch(f"{name} differs from PyTorch's by {error:.2g} of its standard deviation {where}")
        worst = max(worst, error)
    return worst


def difference(wanted: Tensor, found: Tensor) -> float:
    """The largest difference between an output and the expected one, in units of its standard deviation."""
    scale = float(wanted.std(correction=0)) or float(wanted.abs().max()) or 1.0
    return float((found - wanted).abs().max()) / scale
