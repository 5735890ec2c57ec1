"""The format of results: one row for each measurement, in JSON.

A file is a JSON list with one row on each line. Files that are still being written (`benchmarks.gpu`) have the same
rows, one on each line, without brackets and commas. Keys of a row:

* what: `part` (models, operators, ...), `op` (a network's or an operator's name), `form` (ours, fused, gather, ...),
  `way` (inference, latency, training; forward, both), `mode` (eager, compiled), `shape`, `batch`, `dtype`
* where: `device`, `threads`, `hybridzoo`, `torch`, `timm`, `python`, `at`
* time of one call: `median_us`, `q1_us`, `q3_us` wall-clock microseconds over `runs` turns; `cpu_us`, the median CPU
  time; `images_per_s`
* `peak_mib`, memory; `params`, `macs`, `top1` of a network; `error` or `reason` if nothing was measured
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hybridzoo.train.errors import UserError

Row = dict[str, Any]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile, by linear interpolation.

    >>> quartiles([4.0, 1.0, 2.0, 3.0])
    (1.75, 2.5, 3.25)
    """
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def timed(seconds: Sequence[float], cpu_seconds: Sequence[float] = ()) -> Row:
    """The times in a row, for one call."""
    low, middle, high = (round(value * 1e6, 3) for value in quartiles(seconds))
    row: Row = dict(median_us=middle, q1_us=low, q3_us=high, runs=len(seconds))
    return row | (dict(cpu_us=round(statistics.median(cpu_seconds) * 1e6, 3)) if cpu_seconds else {})


def machine(device: str, threads: int | None = None) -> Row:
    """Device and versions for a row; imports torch."""
    import timm
    import torch

    from hybridzoo import __version__

    found: Row = dict(device=device_name(device))
    if torch.device(device).type == "cpu":
        found["threads"] = threads or torch.get_num_threads()
    found |= dict(hybridzoo=__version__, torch=torch.__version__, timm=timm.__version__)
    return found | dict(python=platform.python_version(), at=time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()))


def device_name(device: str) -> str:
    """The maker's name of the device: "NVIDIA H100 80GB HBM3", "AMD EPYC 7B13"."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (named or [platform.processor() or platform.machine()])[0]


def text(rows: Iterable[Row]) -> str:
    """All rows as the text of a file."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    return f"[\n{lines}\n]\n" if lines else "[]\n"


def write(path: Path, rows: Iterable[Row]) -> None:
    """Replace a file's content by these rows.

    Raises:
        UserError: it cannot be written.
    """
    replace(path, text(rows))


def replace(path: Path, content: str) -> None:
    """Write a text file atomically: it is complete, or unchanged.

    Raises:
        UserError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def read(path: Path) -> list[Row]:
    """Rows of a file in either form, a list or one row on each line; an incomplete line is left out.

    Raises:
        UserError: there is no such file, or it does not hold results.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'no text'})") from error
    if content.lstrip().startswith("["):
        try:
            found = json.loads(content)
        except ValueError as error:
            raise UserError(f"{path}: is no file of results ({error})") from error
    else:
        found = []
        for line in content.splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    if not all(isinstance(row, dict) for row in found):
        raise UserError(f"{path}: is no file of results (a row is no object)")
    return found
