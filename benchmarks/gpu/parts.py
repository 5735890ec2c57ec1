"""What is measured, in order of worth."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.gpu import correctness, networks, operators, training, tuning
from benchmarks.gpu.rows import Store, Task


class Part(NamedTuple):
    """Its share of the time that is left is its weight by the weights of the parts that are left."""

    weight: float
    tasks: Callable[[bool, Store], list[Task]]
    quiet: bool  # times something: nothing else may run then
    after: Callable[[Store], None] | None = None
    wave: int | None = None  # tasks that are prepared side by side, for long; all workers by default


def ceiling_tasks(dry: bool, store: Store) -> list[Task]:
    return [Task("ceilings/copy and product", "timing:ceilings", dict(dry=dry), ("benchmarks/gpu/timing.py",))]


PARTS = {
    "ceilings": Part(25, ceiling_tasks, True),
    "correctness": Part(85, correctness.tasks, False),
    "operators": Part(50, operators.tasks, True),
    "flex": Part(70, operators.flex_tasks, True),
    "compile": Part(80, tuning.compile_tasks, False),
    "tuning": Part(60, tuning.tasks, True, tuning.write_table),
    "tuned": Part(20, operators.tuned_tasks, True),
    "networks": Part(60, networks.tasks, True, wave=9),
    "compiled": Part(200, networks.compiled_tasks, True, wave=networks.WAVE),
    "training": Part(30, training.tasks, False),
}
