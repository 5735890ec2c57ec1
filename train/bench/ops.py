"""What `hybridzoo bench ops` asks its processes for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hybridzoo.train.bench.processes import Failed, Measured, Worker
from hybridzoo.train.bench.rows import Row
from hybridzoo.train.errors import UserError
from hybridzoo.train.names import suggest

TARGET = "hybridzoo.train.bench.operators:Operator"
OPS = {  # those of `cases.SHAPES`, without importing torch
    "na2d": "neighborhood attention, DiNAT-T, kernel 7, with a bias",
    "routed": "routed attention, BiFormer-S",
    "mix": "context-mixing dynamic convolution, OverLoCK-XT",
    "depthwise": "dynamic depthwise convolution, InLine-Swin-T",
    "dat": "deformable attention, DAT++ T (64 channels) and DAT-T (384)",
    "merging": "deformable token merging, LITv2-S",
    "ravlt": "rank-augmented linear attention, RAVLT-T",
}
LAYERS = ("dat", "merging", "ravlt")  # of ours, without an implementation to choose


def find(words: Sequence[str], impl: str) -> list[str]:
    """The operators that are asked for, each once; all by default.

    Raises:
        UserError: there is no such operator, or it has no implementation to choose.
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
    """Rows of each operator, shape by shape. A process that ends is replaced for the shapes that are left.

    Args:
        shapes: operators of `OPS`, and the number of shapes of each.
        machine: what every row says of where it was measured.
        tell: is told how far it is.
        make: what measures an operator; default a process of its own.
        threads: of PyTorch on a CPU.
        arguments: of `operators.Operator`.
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
