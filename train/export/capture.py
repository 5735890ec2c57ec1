"""A graph of a network by `torch.export`, for as many image sizes as the network's own arithmetic allows.

A size that Python decides over (`if`, `min`, a number of windows) may bind the graph to the decision. PyTorch notes
such decisions as guards, among them many that only concern the order of values in memory, and would refuse images for
which the graph is right. Here guards are left out, and what a graph promises is found by trying it: `Sizes` says what
was tried and found equal.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from hybridzoo.train.errors import reason
from hybridzoo.train.export.comparing import compare
from hybridzoo.train.export.sources import Reader, Source

Limits = tuple[tuple[int, int | None], tuple[int, int | None]]  # least and largest height and width; None: no limit

STEP = 32  # a graph for multiples of it is the next best to one for all sizes


@dataclass(frozen=True)
class Sizes:
    """The images that a file takes.

    Attributes:
        multiple: sides are multiples of it; 0 where the size is fixed.
        height, width: least and largest side in pixels, None without a limit; the same number twice where it is fixed.
        batch: any number of images; else this one.
    """

    multiple: int
    height: tuple[int, int | None]
    width: tuple[int, int | None]
    batch: bool = True

    @property
    def fixed(self) -> bool:
        return self.multiple == 0

    def __str__(self) -> str:
        batch = "any batch" if self.batch else "this batch"
        if self.fixed:
            return f"{batch}, {self.height[0]} x {self.width[0]} px only"
        sides = "any height and width" if self.multiple == 1 else f"heights and widths that {self.multiple} divides"
        least, most = max(self.height[0], self.width[0]), self.height[1] or self.width[1]
        return f"{batch}, {sides} from {least}" + (f" to {most} px" if most else " px")

    def as_data(self) -> dict[str, Any]:
        """For the metadata."""
        return {
            "batch": "any" if self.batch else "fixed",
            "multiple": self.multiple,
            "height": list(self.height),
            "width": list(self.width),
        }


@dataclass(frozen=True)
class Tries:
    """The images at which a file is compared with PyTorch: (height, width, batch) of each.

    Attributes:
        trace: what a graph is recorded with, of no size that a network's tables have.
        usual: the network's own size, in two batches.
        odd, even: other sizes, that `STEP` does not divide or does; a graph is tried at all of them, a file at the
            first.
    """

    trace: tuple[int, int, int]
    usual: tuple[tuple[int, int, int], ...]
    odd: tuple[tuple[int, int, int], ...]
    even: tuple[tuple[int, int, int], ...]


def tries(size: tuple[int, int]) -> Tries:
    height, width = size
    up = [-(-side // STEP) * STEP for side in size]
    return Tries(
        trace=(up[0] + STEP, up[1] + 3 * STEP, 2),
        usual=((height, width, 1), (height, width, 3)),
        odd=((height + 13, width + 39, 2), (up[0] + 33, up[1] + 17, 1), (STEP + 1, 2 * STEP - 7, 1)),
        even=((up[0] + 2 * STEP, up[1] + STEP, 2), (7 * STEP, 12 * STEP, 1), (3 * STEP, 6 * STEP, 1)),
    )


def dynamic(source: Source) -> tuple[ExportedProgram, Sizes, str]:
    """A graph for any batch, and for any height and width that the network does not decide over.

    Returns:
        The graph, the sizes that it takes, and why these are not all.

    Raises:
        Exception: whatever `torch.export` says of a network that it cannot record so.
    """
    if True not in source.graphs:
        image = source.image(*tries(source.size).trace)
        program = _export(source, image, {0: Dim("batch", min=1), 2: Dim.AUTO(min=STEP), 3: Dim.AUTO(min=STEP)})
        _widen(source, program)
        source.graphs[True] = program, *settle(source, _unguarded(program), _limits(program))
    return source.graphs[True]


def _unguarded(program: ExportedProgram) -> Reader:
    return as_function(program.module(check_guards=False))


def _widen(source: Source, program: ExportedProgram) -> None:
    """Let a graph take images of one step, if it computes them rightly: guards raise its least sizes too."""
    spans = program.range_constraints
    sides = [side.node.expr for side in _sides(program) if not isinstance(side, int)]
    before = {side: spans[side] for side in sides}
    spans.update({side: type(span)(STEP, span.upper) for side, span in before.items()})
    try:
        compare(source, _unguarded(program), (STEP, STEP, 1))
    except Exception:  # a map without tokens, for one
        spans.update(before)


def fixed(source: Source) -> tuple[ExportedProgram, Sizes, str]:
    """A graph for images of the usual size, and for any batch."""
    if False not in source.graphs:
        program = _export(source, source.image(*source.size, 2), {0: Dim("batch", min=1)})
        source.graphs[False] = program, only(source.size), ""
    return source.graphs[False]


def settle(source: Source, graph: Reader, limits: Limits) -> tuple[Sizes, str]:
    """Which sizes a graph takes, and why these are not all.

    Raises:
        Mismatch: it computes something else at the usual size, or at one that `STEP` divides.
    """
    at = tries(source.size)
    for size in (at.usual[0], *at.even):
        if size in at.usual or _within(limits, size):
            compare(source, graph, size)
    try:
        if _within(limits, (STEP, STEP, 1)):
            compare(source, graph, (STEP, STEP, 1))
    except Exception:  # a map of one token is a case of its own to `torch.export`
        limits = _above(limits[0]), _above(limits[1])
    try:
        for size in at.odd:
            if _within(limits, size):
                compare(source, graph, size)
    except Exception as problem:  # a condition of the graph's, or an operator that meets sizes it was not made for
        return Sizes(STEP, *limits), reason(problem)
    return Sizes(1, *limits), ""


def _within(limits: Limits, size: tuple[int, int, int]) -> bool:
    return all(least <= side <= (most or side) for (least, most), side in zip(limits, size[:2], strict=True))


def _above(span: tuple[int, int | None]) -> tuple[int, int | None]:
    """The sides of a span that are larger than one step."""
    return max(span[0], STEP + 1), span[1]


def as_function(network: Any) -> Reader:
    """A module as a function that returns a tuple."""

    def run(image: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            out = network(image)
        return (out,) if isinstance(out, Tensor) else tuple(out)

    return run


def _export(source: Source, image: torch.Tensor, dims: dict[int, Any]) -> ExportedProgram:
    # Without it, a graph with open sizes is bound to whether there is one window or more. PyTorch's ONNX exporter sets
    # it too, for the graphs that it records itself. With it, torchao's dynamic products are bound to several images.
    wanted = len(dims) > 1 and source.metadata.get("int8") != "dynamic"
    for_all_counts = torch.fx.experimental._config.patch(backed_size_oblivious=wanted)  # type: ignore[attr-defined]
    with torch.no_grad(), quiet(), for_all_counts:
        program = torch.export.export(source.network, (image,), dynamic_shapes=(dims,) if dims else None)
        # torchao's operators and tensors become PyTorch's, so that readers need no torchao
        return program.run_decompositions() if "int8" in source.metadata else program


def only(size: tuple[int, int]) -> Sizes:
    """Those of a file for one size."""
    return Sizes(0, (size[0], size[0]), (size[1], size[1]))


def _limits(program: ExportedProgram) -> Limits:
    """Least and largest height and width that a graph knows of."""
    found: list[tuple[int, int | None]] = []
    for side in _sides(program):
        if isinstance(side, int):
            found.append((side, side))
            continue
        span = program.range_constraints[side.node.expr]
        finite = span.upper.is_Integer and int(span.upper) < 1 << 20
        found.append((int(span.lower), int(span.upper) if finite else None))
    return found[0], found[1]


def _sides(program: ExportedProgram) -> Any:
    """Height and width of a graph's image, symbolic where they are open."""
    image = next(node for node in program.graph.nodes if node.name == program.graph_signature.user_inputs[0])
    return image.meta["val"].shape[2:]


@contextmanager
def quiet() -> Iterator[None]:
    """Without what exporters say to developers: deprecations, progress, tables of operators."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
