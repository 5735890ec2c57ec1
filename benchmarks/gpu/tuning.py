"""Part "tuning": the block sizes of every kernel at the paper's shapes, and the table that the package reads.

Candidates are compiled before, side by side, by running them once (part "compile"): Triton keeps what it compiled on
disk. Here they are only timed, one kernel's after the other, the others' as they are by default.
"""

from __future__ import annotations

import importlib
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu import cases, operators, timing
from benchmarks.gpu.rows import Row, Store, Task, newest

AT_MOST = {"forward": 12, "both": 8}  # candidates a kernel and shape
NOISE = 0.985  # of the default's time: what is not below is no gain


def compile_tasks(dry: bool, store: Store) -> list[Task]:
    found = []
    for op, shape in cases.walk(dry):
        for way in ("forward", "both"):
            parts = 1 if dry else 3 if way == "forward" else 6
            for part in range(parts):
                args = dict(op=op, shape=shape, dry=dry, way=way, part=part, parts=parts)
                name = f"compile/{cases.label(op, shape)}, {way}, {part + 1} of {parts}"
                found.append(Task(name, "tuning:compile_candidates", args, operators.CODE[op], untuned(store)))
    return sorted(found, key=lambda task: (task.args["op"] == "mix2d", task.args["part"]))


def tasks(dry: bool, store: Store) -> list[Task]:
    return [
        Task(f"tuning/{cases.label(op, shape)}", "tuning:tune", dict(op=op, shape=shape, dry=dry), operators.CODE[op],
             untuned(store))
        for op, shape in cases.walk(dry)
    ]  # fmt: skip


def untuned(store: Store) -> tuple[tuple[str, str], ...]:
    """Settings under which the kernels run with their defaults, whatever table is shipped for this chip."""
    file = store.folder / "untuned.json"
    file.write_text('{"rows": []}\n')
    return (("HYBRIDZOO_TUNED", str(file)),)


def _run(case: cases.Case, way: str) -> object:
    form = case.forms["ours"]()
    if way == "forward":
        with torch.no_grad():
            return case.call(form)
    return case.backward(case.call(form))


def trials(case: cases.Case, dry: bool) -> list[tuple[str, Any, Any]]:
    """(way, key, configuration) of everything to try beside the defaults."""
    from hybridzoo.kernels import tuning

    folder = "routed" if case.op == "routed" else "neighborhood"
    configs = importlib.import_module(f"hybridzoo.kernels.{folder}.triton_configs")
    found, seen = [], set()
    for way in ("forward", "both"):
        with tuning.asked() as asked:
            _run(case, way)
        for key, default in asked.items():
            if key in seen:
                continue
            seen.add(key)
            most = 1 if dry else AT_MOST[way]
            found += [(way, key, config) for config in configs.candidates(key, default)[:most]]
    return found


def compile_candidates(
    op: str, shape: dict[str, int], dry: bool, way: str, part: int, parts: int
) -> Iterator[Row | None]:
    """Run a share of the candidates once. What does not compile or fit is no failure: it is not tried again."""
    from hybridzoo.kernels import tuning

    yield None
    case = cases.make(op, shape, cases.batches(op, dry), dry)
    mine = [one for one in trials(case, dry) if one[0] == way][part::parts]
    for _, key, config in mine:
        row: Row = dict(op=op, shape=shape, way=way, key=list(key), config=_numbers(config), compiled=True)
        try:
            with tuning.trying({key: config}):
                _run(case, way)
            if not dry:
                torch.cuda.synchronize()
        except Exception as error:
            row |= dict(compiled=False, reason=f"{type(error).__name__}: {error}"[:300])
        yield row
        if not row["compiled"] and "illegal" in row["reason"]:
            raise RuntimeError(f"{key} with {config}: {row['reason']}")


def tune(op: str, shape: dict[str, int], dry: bool, compiled: list[Row] | None = None) -> Iterator[Row | None]:
    """A row for every configuration that was timed, and for every kernel one that says which was best."""
    from hybridzoo.kernels import tuning

    batch = cases.batches(op, dry)
    first = cases.make(op, shape, batch, dry)
    work = cases.work(op, shape, batch, first.grad.element_size(), dry)
    everything = [first]
    while len(everything) < timing.copies(work["forward"][0], dry):
        everything.append(cases.make(op, shape, batch, dry, seed=len(everything)))
    known = None if compiled is None else {(*r["key"], *r["config"]) for r in compiled if r["compiled"]}
    wanted = defaultdict(list)
    for way, key, config in trials(first, dry):
        if known is None or (*key, *_numbers(config)) in known:
            wanted[way, key].append(config)
    yield None
    common = dict(op=op, shape=shape, batch=batch)
    form = first.forms["ours"]()
    before = {way: operators.time_form(everything, form, way, dry) for way in ("forward", "both")}
    chosen: dict[Any, Any] = {}
    for (way, key), configs in wanted.items():
        with tuning.trying(dict(chosen)):
            base = operators.time_form(everything, form, way, dry) if chosen else before[way]
        times = {None: base["median_us"]}
        for config in configs:
            row: Row = dict(common, way=way, key=list(key), config=_numbers(config), default=base["median_us"])
            try:
                with tuning.trying({**chosen, key: config}):
                    row |= _quick(everything, form, way, dry)
                times[config] = row["median_us"]
            except Exception as error:
                row["reason"] = f"{type(error).__name__}: {error}"[:300]
                if not dry:
                    torch.cuda.synchronize()  # raises where the GPU's context is lost
            yield row
        first_of_all = min(times, key=lambda config: times[config])
        if first_of_all is not None and times[first_of_all] < NOISE * times[None]:
            chosen[key] = first_of_all
            numbers = _numbers(first_of_all)
            yield dict(
                common, way=way, key=list(key), best=numbers, microseconds=times[first_of_all], default=times[None]
            )


def _quick(everything: list[cases.Case], form: cases.Function, way: str, dry: bool) -> Row:
    if way == "forward":
        with torch.no_grad():
            return timing.measure([partial(case.call, form) for case in everything], dry, 0.04)
    return timing.measure([partial(operators._both, case, form) for case in everything], dry, 0.06)


def write_table(store: Store) -> None:
    """From all rows of this device: for every key what is best on all shapes that share it, and the same for each
    kernel and width, for shapes that nobody tuned; not where blocks follow from the shape. Less than 1.5 % is noise: a
    table may be empty."""
    device = store.common["device"]
    found = [r for r in store.rows if r["part"] == "tuning" and r.get("device") == device]
    rows = [r for r in newest(found) if "median_us" in r]
    from hybridzoo.kernels.neighborhood.triton_configs import WHOLE

    table = []
    for length in (5, 4):
        groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
        for row in rows:
            groups[tuple(row["key"][:length])].append(row)
        for key, found in groups.items():
            if length == 4 and key[1] in WHOLE:
                continue
            config, ratio = best(found)
            if ratio < NOISE:
                table.append(_entry((*key, "")[:5], config, ratio))
    if rows:
        versions = {name: store.common[name] for name in ("device", "torch", "triton")}
        operators.table_file(store).write_text(json.dumps(versions | {"rows": table}, indent=1) + "\n")


def best(rows: list[Row]) -> tuple[list[Any], float]:
    """The configuration with the least time over the default's, in the geometric mean of the shapes that tried it.

    Only those count that as many shapes tried as any other.
    """
    ratios: dict[tuple[Any, ...], dict[str, float]] = defaultdict(dict)
    for row in rows:
        ratios[tuple(row["config"])][row["task"]] = row["median_us"] / row["default"]
    most = max(map(len, ratios.values()))
    means = {c: math.prod(r.values()) ** (1 / len(r)) for c, r in ratios.items() if len(r) == most}
    config = min(means, key=lambda c: means[c])
    return list(config), means[config]


def _entry(key: Any, config: list[Any], ratio: float) -> Row:
    names = ("operator", "kernel", "block_d", "itemsize", "shape")
    return dict(zip(names, key, strict=True), config=config, time=round(ratio, 3))


def _numbers(config: Any) -> list[Any]:
    return [config.queries, config.keys, config.warps, config.stages, config.registers]
