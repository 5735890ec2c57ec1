"""How long the GPU works: replays of a CUDA graph, so that Python's share does not count, from a cold cache."""

from __future__ import annotations

import contextlib
import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.rows import Row, quartiles

Step = Callable[[], object]
CACHE = 50 << 20  # bytes of an H100's L2: what is smaller must not be found there by the next call
SLOW = 0.02  # seconds: beside a call that takes longer, launches do not count, and two runs are enough


def device_of(dry: bool) -> torch.device:
    return torch.device("cpu" if dry else "cuda")


def graphed(steps: Sequence[Step]) -> Callable[[], None]:
    """Replays all steps, captured one after the other. What they return is kept by the graph's memory only."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for step in steps:
                step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # the graph has memory of its own
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        gc.disable()  # what it would free meanwhile would end the capture
        graph.capture_begin()
        try:
            for step in steps:
                step()
        except BaseException:
            with contextlib.suppress(RuntimeError):
                graph.capture_end()
            raise
        finally:
            gc.enable()
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay


def measure(steps: Sequence[Step], dry: bool, budget: float = 0.15, graph: bool = True, slow: float = SLOW) -> Row:
    """Microseconds of one step: median and quartiles. Steps that do the same on other buffers keep the cache cold.

    A call that takes longer than `slow` seconds is timed twice by the clock, launches included.
    """
    if dry:
        return _row([_clock(step) for step in steps[:1]], "clock")
    how, run = "graph", None
    spent = _once(steps[0])
    if spent > slow:
        spent = _once(steps[0])
    if spent > slow:
        return _row([_once(steps[0]) * 1e6 for _ in range(2)], "clock, two runs")
    if graph:
        try:
            run = graphed(steps)
        except Exception as error:  # what cannot be captured is measured with its launches
            how = f"events; no graph: {type(error).__name__}: {str(error)[:120]}"
            torch.cuda.synchronize()
    else:
        how = "events"
    if run is None:
        run = lambda: [step() for step in steps]  # noqa: E731
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    repeats = min(100, max(7, int(budget / max(time.perf_counter() - start, 1e-6))))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) * 1e3 / len(steps) for a, b in itertools.pairwise(marks)]
    return _row(times, how)


def _once(step: Step) -> float:
    """Seconds of one call, launch to end."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def host(step: Step, dry: bool) -> float:
    """Microseconds of Python that a call costs, the GPU's work not waited for."""
    count = 1 if dry else 50
    if not dry:
        step()
    start = time.perf_counter()
    for _ in range(count):
        step()
    spent = time.perf_counter() - start
    if not dry:
        torch.cuda.synchronize()
    return spent / count * 1e6


def copies(nbytes: int, dry: bool) -> int:
    """Sets of buffers that keep the cache cold for a step that moves `nbytes`."""
    return 1 if dry or nbytes > 4 * CACHE else 4


def ceilings(dry: bool) -> Iterator[Row | None]:
    """The two rates that floors are made of: a copy counts bytes read and written, a product 2 n^3.

    The fastest copy counts: the driver's of two sizes (a large one, and one of a map's size, past the cache), and a
    kernel's that negates.
    """
    yield None
    device = device_of(dry)
    for size in (1 << 12, 1 << 14) if dry else (1 << 27, 1 << 31):
        source = torch.randn(size // 2, device=device).to(torch.bfloat16)
        target = torch.empty_like(source)
        for how, step in (("copy", partial(target.copy_, source)), ("negate", partial(torch.neg, source, out=target))):
            row = measure([step], dry, 0.2)
            yield dict(op="copy", by=how, bytes=2 * size, rate=2 * size / row["median_us"] * 1e6, **row)
        del source, target, step
    side = 64 if dry else 8192
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16).unbind()
    row = measure([lambda: a @ b], dry, 0.3)
    yield dict(op="matmul", flops=2 * side**3, rate=2 * side**3 / row["median_us"] * 1e6, dtype="bfloat16", **row)


def _clock(step: Step) -> float:
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e6


def _row(times: Sequence[float], how: str) -> Row:
    low, median, high = quartiles(times)
    return dict(median_us=median, q1_us=low, q3_us=high, runs=len(times), how=how)


def release(*kept: Any) -> None:
    """Give back memory between contenders."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
