"""Which block sizes a Triton kernel takes: a table tuned on this very chip where there is one, else the defaults.

A tuned table is a JSON file, `kernels/tuned/<GPU name>.json` or, before it, what the environment variable
`HYBRIDZOO_TUNED` names; `python -m benchmarks.gpu` writes one:

    {"device": "NVIDIA H100 80GB HBM3", "torch": "2.11.0", "triton": "3.6.0", "rows": [
        {"operator": "na2d", "kernel": "forward_tiled", "block_d": 32, "itemsize": 2, "shape": "56x56k7x7",
         "config": [64, 32, 4, 3, null], "time": 0.82}]}

`config` is `queries, keys, warps, stages, registers` of `Config`; `time` is that of the whole pass over its time with
the default. `shape` is the operator's own word for the shapes that share a row; an empty one
serves all shapes without a row. Nothing here imports Triton.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

FOLDER = Path(__file__).parent / "tuned"
VARIABLE = "HYBRIDZOO_TUNED"


@dataclass(frozen=True)
class Config:
    """How one kernel is cut and compiled. Some kernels take a block from what they work on, not from here."""

    queries: int  # per block of scores
    keys: int
    warps: int
    stages: int
    registers: int | None = None  # a thread may have; the compiler, left to itself, may rather spill a few bytes

    @property
    def options(self) -> dict[str, int | bool]:
        """For the compiler. Whether multiplications and additions may fuse is said, because defaults differ."""
        options: dict[str, int | bool] = dict(num_warps=self.warps, num_stages=self.stages, enable_fp_fusion=True)
        return options if self.registers is None else options | dict(maxnreg=self.registers)


Table = dict[tuple[str, int, int], Config]  # (kernel, padded head_dim, bytes per element): the defaults


class Key(NamedTuple):
    """What a configuration is for."""

    operator: str  # "na2d", "routed"
    kernel: str  # a name in the operator's table of defaults
    block_d: int  # head_dim, padded to a power of two: 16 to 128
    itemsize: int  # bytes per element: 2 or 4
    shape: str = ""  # the operator's word for shapes that share a row


def pick(table: Table, key: Key, device: torch.device | None = None) -> Config:
    """The configuration for `key`: one being tried, else tuned on `device`, else of `table`.

    Where head_dim 16 has no row in `table`, that of 32 serves.
    """
    for asked in _listeners:
        asked[key] = _default(table, key)
    if key in _trials:
        return _trials[key]
    tuned = _tuned_for(device)
    return tuned.get(key) or tuned.get(key._replace(shape="")) or _default(table, key)


def _default(table: Table, key: Key) -> Config:
    return table.get(key[1:4]) or table[key.kernel, 32, key.itemsize]


# ---------------------------------------------------------------------------------------------------- tuned tables


def table_name(device_name: str) -> str:
    """File name of the table for a GPU: of `NVIDIA H100 80GB HBM3`, `nvidia-h100-80gb-hbm3.json`."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".json"


def read_table(file: Path) -> dict[Key, Config]:
    """The rows of a tuned table; ValueError where the file is none."""
    try:
        rows = json.loads(file.read_text())["rows"]
        return {Key(*(row[field] for field in Key._fields)): Config(*row["config"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is no table of tuned kernels ({error!r}); write one with python -m benchmarks.gpu"
        ) from error


def _tuned_for(device: torch.device | None) -> Mapping[Key, Config]:
    file = os.environ.get(VARIABLE, "")
    if device is None or device.type != "cuda":
        return _tuned(file, "")
    return _tuned(file, _device_name(device.index))


@functools.cache
def _device_name(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


@functools.cache
def _tuned(file: str, device_name: str) -> Mapping[Key, Config]:
    if file:
        return read_table(Path(file))
    shipped = FOLDER / table_name(device_name)
    return read_table(shipped) if device_name and shipped.exists() else {}


# ------------------------------------------------------------------------------------------- for the tuning program

F = TypeVar("F", bound=Callable[..., Any])
_trials: dict[Key, Config] = {}
_listeners: list[dict[Key, Config]] = []
_plans: list[Callable[[], None]] = []


def plan(function: F) -> F:
    """Cache what `function` makes of shapes, dtypes and strides; whatever calls `pick` must be cached by this only."""
    cached = functools.lru_cache(maxsize=1024)(function)
    _plans.append(cached.cache_clear)
    return cached  # type: ignore[return-value]


def forget() -> None:
    """Tables and plans are made anew."""
    _tuned.cache_clear()
    for clear in _plans:
        clear()


@contextmanager
def trying(configs: Mapping[Key, Config]) -> Iterator[None]:
    """Inside, kernels run with these configurations."""
    _trials.update(configs)
    forget()
    try:
        yield
    finally:
        for key in configs:
            _trials.pop(key, None)
        forget()


@contextmanager
def asked() -> Iterator[dict[Key, Config]]:
    """What is asked for inside, in order, with the defaults."""
    found: dict[Key, Config] = {}
    forget()
    _listeners.append(found)
    try:
        yield found
    finally:
        _listeners.remove(found)


def candidates(default: Config, blocks: bool = True) -> list[Config]:
    """What is worth trying beside `default`, nearest first: blocks half and twice as large, other warps and stages.

    A thread holds 8 to 64 scores. Without `blocks` the kernel takes its blocks from elsewhere.
    """
    d, found = default, []
    sides = [(d.queries, d.keys)]
    if blocks:
        sides += [(q, k) for q in (d.queries, d.queries * 2, d.queries // 2) for k in (d.keys, d.keys * 2, d.keys // 2)]
    for queries, keys in dict.fromkeys(sides):
        for warps in (1, 2, 4, 8):
            for stages in (1, 2, 3):
                steps = (queries != d.queries) + (keys != d.keys) + (warps != d.warps) + (stages != d.stages)
                fits = (
                    8 <= queries * keys / (32 * warps) <= 64 and min(queries, keys) >= 16 and max(queries, keys) <= 128
                )
                if 0 < steps <= 2 and fits:
                    found.append((steps, Config(queries, keys, warps, stages)))
    if default.registers is not None:
        found.append((1, Config(d.queries, d.keys, d.warps, d.stages)))
    return [config for _, config in sorted(found, key=lambda pair: pair[0])]
