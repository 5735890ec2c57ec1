"""What was measured: JSON lines in a folder, one row a measurement, written as it goes."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.importable import ROOT

Row = dict[str, Any]


class Task(NamedTuple):
    """A group of measurements that share their preparation."""

    name: str  # unique, such as "operators/na2d 56x56 d8"
    run: str  # "module:function" in this package: a generator of rows; it yields None once, when it is prepared
    args: dict[str, Any]
    code: tuple[str, ...] = ("kernels",)  # folders or files: when they change, the task is run again
    settings: tuple[tuple[str, str], ...] = ()  # environment variables; a worker has them for this task only
    limit: float = 60.0  # seconds that it may measure; more is cut off

    @property
    def part(self) -> str:
        return self.name.split("/")[0]

    @property
    def command(self) -> str:
        """Repeats it."""
        line = f"python -m benchmarks.gpu one '{self.name}'"
        return " ".join([*(f"{k}={v}" for k, v in self.settings), line])

    @property
    def version(self) -> str:
        """Of the code and of the arguments."""
        digest = hashlib.sha256(repr((self.args, self.settings)).encode())
        for entry in self.code:
            path = ROOT / entry
            for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
                digest.update(file.read_bytes())
        for _, file in self.settings:
            if Path(file).is_file():
                digest.update(Path(file).read_bytes())
        return digest.hexdigest()[:12]


class Store:
    """The rows of a folder. Others may add to the file at the same time only through this object."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.file = folder, folder / "rows.jsonl"
        self.rows = read(folder)
        self.common: Row = {}

    def add(self, row: Row, task: Task, version: str) -> Row:
        """Complete it with what every row says, and write it."""
        row = {"part": task.part, "task": task.name, "version": version, **self.common, **row}
        row["at"] = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
        if "error" in row:
            row["command"] = task.command
        self.rows.append(row)
        with self.file.open("a") as out:
            out.write(json.dumps(row) + "\n")
        return row

    def done(self, task: Task) -> bool:
        """Whether this very task ran to its end on this kind of machine."""
        found = dict(task=task.name, version=task.version, device=self.common.get("device"), done=True)
        return any(all(row.get(k) == v for k, v in found.items()) for row in self.rows)


def ceilings(rows: Sequence[Row]) -> dict[str, float]:
    """Bytes a second of a copy, floating-point operations a second of a product: of each the highest rate."""
    found: dict[str, float] = {}
    for row in rows:
        if row["part"] == "ceilings" and "rate" in row:
            found[row["op"]] = max(row["rate"], found.get(row["op"], 0.0))
    return found


def read(folder: Path) -> list[Row]:
    """A line that was cut off is left out."""
    rows = []
    file = folder / "rows.jsonl"
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def newest(rows: list[Row]) -> list[Row]:
    """Of every task the rows of its last run that came to an end, else of its last run."""
    runs: dict[str, list[list[Row]]] = {}
    begun: dict[str, list[Row]] = {}
    for row in rows:
        name = row["task"]
        begun.setdefault(name, []).append(row)
        if row.get("done") or row.get("cut"):
            runs.setdefault(name, []).append(begun.pop(name))
    for name, rest in begun.items():
        runs.setdefault(name, []).append(rest)
    found: list[Row] = []
    for of_task in runs.values():
        whole = [run for run in of_task if run[-1].get("done")]
        found += (whole or of_task)[-1]
    return found


def machine(dry: bool) -> Row:
    """What every row says of where it was measured."""
    import torch
    import triton

    gpu = torch.cuda.is_available() and not dry
    return dict(
        device=torch.cuda.get_device_name() if gpu else f"dry run on a CPU ({platform.machine()})",
        torch=torch.__version__,
        triton=triton.__version__,
        python=platform.python_version(),
    ) | (dict(dry=True) if dry else {})


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    ordered = sorted(values)
    return tuple(ordered[round((len(ordered) - 1) * q)] for q in (0.25, 0.5, 0.75))  # type: ignore[return-value]
