"""Parts "operators", "flex" and "tuned": a kernel at the paper's shapes beside other forms, and its floor."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu import cases, timing
from benchmarks.gpu.rows import Row, Store, Task

COMMON = ("kernels/operators_common.py", "kernels/triton_common.py", "kernels/tuning.py")
CODE = {
    "na2d": ("kernels/neighborhood", *COMMON),
    "routed": ("kernels/routed", *COMMON),
    "mix2d": ("kernels/mix", "kernels/neighborhood", *COMMON),
}
SLOW_TO_START = ("ours", "auto", "flex")


def tasks(dry: bool, store: Store) -> list[Task]:
    """A task for every form, so that a slow one costs itself only; ours everywhere first, small maps first."""
    found = [(form, op, shape) for op, shape in cases.small_first(dry) for form in cases.FORMS[op][: 2 if dry else 9]]
    found.sort(key=lambda one: cases.FORMS[one[1]].index(one[0]))
    return [_task("operators", op, shape, dry, form) for form, op, shape in found if not (dry and "sdpa" in form)]


def flex_tasks(dry: bool, store: Store) -> list[Task]:
    """Apart, for its compilation takes long."""
    return [] if dry else [_task("flex", op, shape, dry, "flex") for op, shape in cases.small_first(dry)]


def tuned_tasks(dry: bool, store: Store) -> list[Task]:
    """Ours alone, under the table that the tuning part wrote."""
    table = table_file(store)
    if not table.exists():
        return []
    settings = (("HYBRIDZOO_TUNED", str(table)),)
    return [_task("tuned", op, shape, dry, "ours", settings) for op, shape in cases.walk(dry)]


def _task(part: str, op: str, shape: dict[str, int], dry: bool, form: str, settings: Any = ()) -> Task:
    args = dict(op=op, shape=shape, dry=dry, form=form)
    name = f"{part}/{cases.label(op, shape)}" + (f", {form}" if part == "operators" else "")
    # What is not ours does not change with our kernels.
    code = CODE[op] if form in ("ours", "auto", "torch") else ("benchmarks/gpu/cases.py",)
    return Task(name, "operators:compare", args, code, settings, limit=10.0)


def table_file(store: Store) -> Any:
    from hybridzoo.kernels import tuning

    return store.folder / tuning.table_name(str(store.common["device"]))


def compare(op: str, shape: dict[str, int], dry: bool, form: str) -> Iterator[Row | None]:
    """A row for each way, forward and both; a reason instead of times where a dense form would write too much."""
    batch = cases.batches(op, dry)
    common = dict(op=op, shape=shape, batch=batch, table=os.path.basename(os.environ.get("HYBRIDZOO_TUNED", "")))
    common["form"] = form
    ways = []
    for way in ("forward", "both"):
        size = cases.written(op, shape, form, way, batch)
        if size > cases.MOST_WRITTEN:
            limit = f"{size / 2**30:.1f} GiB to write, more than {cases.MOST_WRITTEN >> 30}"
            yield dict(common, way=way, reason=limit)
        else:
            ways.append(way)
    if not ways:
        return
    first = cases.make(op, shape, batch, dry)
    common["dtype"] = str(first.grad.dtype).removeprefix("torch.")
    work = cases.work(op, shape, batch, first.grad.element_size(), dry)
    everything = [first]
    while len(everything) < timing.copies(work["forward"][0], dry):
        everything.append(cases.make(op, shape, batch, dry, seed=len(everything)))
    function = first.forms[form]()
    if form in SLOW_TO_START and not dry:
        with torch.no_grad():
            first.call(function)
        first.backward(first.call(function))
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    yield None
    for way in ways:
        nbytes, flops = work[way]
        row = dict(common, way=way, bytes=nbytes, flops=flops)
        try:
            row |= time_form(everything, function, way, dry)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:2000]
        yield row
        timing.release()


def time_form(everything: list[cases.Case], form: cases.Function, way: str, dry: bool) -> Row:
    if way == "forward":
        with torch.no_grad():
            steps = [partial(case.call, form) for case in everything]
            row = timing.measure(steps, dry)
            return row if row["median_us"] > 1e4 else row | dict(host_us=timing.host(steps[0], dry))
    return timing.measure([partial(_both, case, form) for case in everything], dry)


def _both(case: cases.Case, form: cases.Function) -> object:
    return case.backward(case.call(form))
