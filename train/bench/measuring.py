"""Time and memory of one call, on a CPU or a GPU."""

from __future__ import annotations

import ctypes
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from hybridzoo.train.bench.rows import Row, timed

Step = Callable[[], object]
LEAST = 0.1  # seconds: a turn of a fast step makes several calls
MOST = 20  # calls in a turn
SLOW = 1.0  # seconds: for calls as long as this, a cold cache does not matter


def once(step: Step, device: torch.device) -> tuple[float, float]:
    """Wall-clock seconds until one call's work is done, and CPU seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start, used = time.perf_counter(), time.process_time()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, time.process_time() - used


def turn(step: Step, device: torch.device) -> tuple[float, float]:
    """Medians of a turn: one call to warm the caches, then calls for `LEAST` seconds.

    Returns:
        Wall-clock and CPU seconds of one call.
    """
    calls = [once(step, device)]
    if calls[0][0] > SLOW:
        return calls[0]
    calls = [once(step, device)]
    while sum(seconds for seconds, _ in calls) < LEAST and len(calls) < MOST:
        calls.append(once(step, device))
    return statistics.median(wall for wall, _ in calls), statistics.median(cpu for _, cpu in calls)


def interleaved(steps: Mapping[str, Step], device: torch.device, turns: int, budget: float = 60.0) -> dict[str, Row]:
    """Times of each step, in turns (A B C A B C ...), so that changes of the machine's speed affect all of them.

    Args:
        steps: name -> function.
        device: on which they run.
        turns: for each step; after three turns, stops when `budget` seconds are over.
        budget: seconds for all steps together.
    """
    wall: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + budget
    for done in range(turns):
        if done >= 3 and time.perf_counter() > end:
            break
        for name, step in steps.items():
            seconds, used = turn(step, device)
            wall[name].append(seconds)
            cpu[name].append(used)
    return {name: timed(wall[name], cpu[name] if device.type == "cpu" else ()) for name in steps}


class Memory:
    """Peak memory above what this process uses when the object is created.

    On a GPU, memory of PyTorch's tensors (`max_memory_allocated`); on a CPU, resident memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.restart()
        self.start = torch.cuda.memory_allocated(device) if device.type == "cuda" else _resident("VmRSS")

    def restart(self) -> None:
        """Reset the peak."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        elif platform.system() == "Linux":
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak restarts from the present resident memory

    def peak(self) -> float:
        """MiB."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = _resident("VmHWM")
        return round(max(0, peak - self.start) / 2**20, 1)


def peak_of(step: Step, device: torch.device) -> float:
    """Peak MiB of one call above the memory in use before it."""
    memory = Memory(device)
    step()
    return memory.peak()


def _resident(field: str) -> int:
    """Resident bytes; if the system does not report them, the peak so far."""
    status = Path("/proc/self/status")
    if not status.exists():
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest if platform.system() == "Darwin" else largest << 10
    (line,) = (s for s in status.read_text().splitlines() if s.startswith(field))
    return int(line.split()[1]) << 10
