"""Parts "operators", "flex" and "tuned": a kernel at the paper's shapes beside other forms, and its floor."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu import cases, timing
from benchmarks.gpu.rows import Row, Store, Task

CODE = {op: ("kernels/" + folder, "kernels/operators_common.py", "kernels/triton_common.py", "kernels/tuning.py")
        for op, folder in (("na2d", "neighborhood"), ("routed", "routed"))}  # fmt: skip
SLOW_TO_START = ("ours", "auto", "flex")


def tasks(dry: bool, store: Store) -> list[Task]:
    return [_task("operators", op, shape, dry, [*cases.FORMS]) for op, shape in cases.walk(dry)]


def flex_tasks(dry: bool, store: Store) -> list[Task]:
    """Apart, for its compilation takes long."""
    return [] if dry else [_task("flex", op, shape, dry, ["flex"]) for op, shape in cases.walk(dry)]


def tuned_tasks(dry: bool, store: Store) -> list[Task]:
    """Ours alone, under the table that the tuning part wrote."""
    table = table_file(store)
    if not table.exists():
        return []
    settings = (("HYBRIDZOO_TUNED", str(table)),)
    return [_task("tuned", op, shape, dry, ["ours"], settings) for op, shape in cases.walk(dry)]


def _task(part: str, op: str, shape: dict[str, int], dry: bool, only: list[str], settings: Any = ()) -> Task:
    args = dict(op=op, shape=shape, dry=dry, only=only)
    return Task(f"{part}/{cases.label(op, shape)}", "operators:compare", args, CODE[op], settings)


def table_file(store: Store) -> Any:
    from hybridzoo.kernels import tuning

    return store.folder / tuning.table_name(str(store.common["device"]))


def compare(op: str, shape: dict[str, int], dry: bool, only: list[str]) -> Iterator[Row | None]:
    """A row for every form and way."""
    batch = cases.batches(op, dry)
    first = cases.make(op, shape, batch, dry)
    work = cases.work(op, shape, batch, first.grad.element_size(), dry)
    everything = [first]
    while len(everything) < timing.copies(work["forward"][0], dry):
        everything.append(cases.make(op, shape, batch, dry, seed=len(everything)))
    common = dict(op=op, shape=shape, batch=batch, dtype=str(first.grad.dtype).removeprefix("torch."))
    common["table"] = os.path.basename(os.environ.get("HYBRIDZOO_TUNED", ""))
    forms, failed = {}, {}
    for name, form in first.forms.items():
        if name not in only:
            continue
        try:
            forms[name] = form()
            if name in SLOW_TO_START and not dry:
                with torch.no_grad():
                    first.call(forms[name])
                first.backward(first.call(forms[name]))
                torch.cuda.synchronize()
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"[:2000]
            forms.pop(name, None)
    if not dry:
        torch.cuda.empty_cache()
    yield None
    for name, text in failed.items():
        yield dict(common, form=name, error=text)
    for name, form in forms.items():
        for way in ("forward", "both"):
            nbytes, flops = work[way]
            row = dict(common, form=name, way=way, bytes=nbytes, flops=flops)
            try:
                row |= time_form(everything, form, way, dry)
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"[:2000]
            yield row
            timing.release()


def time_form(everything: list[cases.Case], form: cases.Function, way: str, dry: bool) -> Row:
    if way == "forward":
        with torch.no_grad():
            steps = [partial(case.call, form) for case in everything]
            row = timing.measure(steps, dry)
            return row | dict(host_us=timing.host(steps[0], dry))
    return timing.measure([partial(_both, case, form) for case in everything], dry)


def _both(case: cases.Case, form: cases.Function) -> object:
    return case.backward(case.call(form))
