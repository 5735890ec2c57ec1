"""Time, memory and traffic of one step, on a GPU or a CPU."""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FLUSH_BYTES = 2 << 30  # written between GPU measurements: empties the cache, and hides the time to launch a kernel


def seconds(step: Callable[[], object], device: torch.device) -> float:
    """Of one call, from a cold cache on a GPU: for single kernels."""
    if device.type != "cuda":
        return timed(step, device)
    torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device).zero_()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    step()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) * 1e-3


def timed(step: Callable[[], object], device: torch.device) -> float:
    """Seconds that pass until one call's work is done, the host's included: for whole models."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(steps: Mapping[str, Callable[[], object]], budget: float, device: torch.device) -> dict[str, float]:
    """Median seconds of each step after one run to warm up; in turns, at least three, until `budget` seconds are over.

    50 at most. Interleaved, so that what disturbs the machine for a while disturbs every step.
    """
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + budget
    for done in range(50):
        if done >= 3 and time.perf_counter() > end:
            break
        for name, step in steps.items():
            times[name].append(timed(step, device))
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(step: Callable[[], object], device: torch.device) -> int | None:
    """Bytes at the peak of one call above what is there before; None where the system cannot tell."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    if platform.system() != "Linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before


def total_memory(device: torch.device) -> int:
    """Bytes that the device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class Traffic(TorchDispatchMode):
    """Counts, in `bytes`, what PyTorch's operators read and write inside the context, from the shapes they are given.

    Every operator reads what is stored of its inputs once (an expanded view is no larger than what it shows) and writes
    its outputs once; those that pick rows read what they pick, and those that add rows read and write as many. Views
    and fresh memory are free. What an operator keeps in caches and registers is not counted, however often it is read:
    the figure is the least that this sequence of operators can move. `inside` says what an operator of the benchmarked
    library consists of: by itself it would count as one.
    """

    PICKING = ("gather", "index_select", "index", "embedding")
    # Out of place only because somebody looks: without this mode, the gradient of `gather` adds in place.
    ADDING = ("scatter_add_", "scatter_add", "index_add_", "index_put_")
    MAKING = ("zeros_like", "ones_like", "full_like", "new_zeros", "new_full")
    FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh")

    def __init__(self, inside: Mapping[Any, Callable[..., Any]] | None = None) -> None:
        super().__init__()
        self.inside = inside or {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.inside:
            with self:
                return self.inside[func](*args, **(kwargs or {}))
        with self:
            result = func.decompose(*args, **(kwargs or {}))
        if result is not NotImplemented:  # it was made of others, which are counted
            return result
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if func.is_view or name in self.FREE or name == "_unsafe_view":
            return result
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        read, written = sum(map(_stored, given)), sum(map(_stored, made))
        if "out" in (kwargs or {}):
            read -= written
        if name in self.PICKING:
            read = written + sum(map(_stored, given[1:]))
        elif name in self.ADDING:
            source = max(map(_stored, given[1:]))
            read, written = sum(map(_stored, given[1:])) + source, source
        elif name in self.MAKING:
            read = 0
        elif name in ("zero_", "fill_", "copy_"):
            read -= _stored(given[0])
        self.bytes += read + written
        return result


def _stored(x: Tensor) -> int:
    return x.element_size() * torch.Size([n for n, step in zip(x.shape, x.stride(), strict=True) if step]).numel()


def _resident(field: str) -> int:
    (line,) = (s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(field))
    return int(line.split()[1]) << 10
