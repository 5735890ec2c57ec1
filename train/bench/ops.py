"""Starts the processes of `hybridzoo bench ops`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hybridzoo.train.bench.processes import Failed, Measured, Worker
from hybridzoo.train.bench.rows import Row
from hybridzoo.train.errors import UserError
from hybridzoo.train.names import suggest

TARGET = "hybridzoo.train.bench.operators:Operator"
OPS = {  # the keys of `cases.SHAPES`, without importing torch
    "na2d": "neighborhood attention, DiNAT-T, kernel 7, with a bias",
    "routed": "routed attention, BiFormer-S",
    "mix": "context-mixing dynamic convolution, OverLoCK-XT",
    "depthwise": "dynamic depthwise convolution, InLine-Swin-T",
    "dat": "deformable attention, DAT++ T (64 channels) and DAT-T (384)",
    "merging": "deformable token merging, LITv2-S",
    "ravlt": "rank-augmented linear attention, RAVLT-T",
}
LAYERS = ("dat", "merging", "ravlt")  # layers, which have one implementation


def find(words: Sequence[str], impl: str) -> list[str]:
    """The requested operators, each once; default all.

    Raises:
        UserError: unknown operator, or `impl` for a layer.
    """
    for word in words:
        if word not in OPS:
            raise UserError(f"unknown operator {word!r}; {suggest(word, OPS, 'there are: ' + ' '.join(OPS))}")
        if word in LAYERS and impl != "auto":
            raise UserError(f"--impl {impl}: {word} is a layer and has none to choose; leave --impl or {word} out")
    found = list(dict.fromkeys(words)) or list(OPS)
    return [op for op in found if impl == "auto" or op not in LAYERS]


def measure(
    shapes: Mapping[str, int],
    machine: Row,
    tell: Callable[[str, float], None] = lambda what, share: None,
    make: Callable[..., Measured] | None = None,
    threads: int | None = None,
    **arguments: Any,
) -> Iterator[list[Row]]:
    """Rows of each operator, shape by shape. If a process ends, a new one measures the remaining shapes.

    Args:
        shapes: operator -> number of its shapes.
        machine: device and versions, which every row contains.
        tell: called with the progress.
        make: creates the object that measures an operator; default an own process.
        threads: PyTorch's threads on a CPU.
        arguments: passed to `operators.Operator`.
    """
    total, done = sum(shapes.values()), 0
    for op, count in shapes.items():
        worker: Measured | None = None
        try:
            for index in range(count):
                try:
                    if worker is None:
                        worker = (make or Worker)(TARGET, threads, op=op, **arguments)
                    yield [row | machine for row in worker.call("measure", index=index)]
                except Failed as error:
                    yield [dict(part="ops", op=op, form="ours", way="forward", error=str(error)) | machine]
                    if worker is not None:
                        worker.close()
                    worker = None
                done += 1
                tell(f"{op}: shape {index + 1} of {count}", done / total)
        finally:
            if worker is not None:
                worker.close()
