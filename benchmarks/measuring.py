"""Time, memory and bandwidth of one step, on a GPU or a CPU."""

from __future__ import annotations

import ctypes
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

FLUSH_BYTES = 2 << 30  # written between GPU measurements: empties the cache, and hides the time to launch a kernel


def seconds(step: Callable[[], object], device: torch.device) -> float:
    """Of one call, from a cold cache on a GPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device).zero_()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    step()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) * 1e-3


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


def copy_speed(device: torch.device) -> float:
    """Bytes read and written per second by a large copy on a GPU."""
    source = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * FLUSH_BYTES / min(seconds(lambda: target.copy_(source), device) for _ in range(10))


def _resident(field: str) -> int:
    (line,) = (s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(field))
    return int(line.split()[1]) << 10
