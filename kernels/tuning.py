"""Block sizes of the Triton kernels: from a table tuned on the same GPU model if there is one, otherwise the defaults.

A tuned table is a JSON file: the one that the environment variable `HYBRIDZOO_TUNED` names, otherwise
`kernels/tuned/<GPU name>.json`. `python -m benchmarks.gpu` writes it:

    {"device": "NVIDIA H100 80GB HBM3", "torch": "2.11.0", "triton": "3.6.0", "rows": [
        {"operator": "na2d", "kernel": "forward_tiled", "block_d": 32, "itemsize": 2, "shape": "56x56k7x7",
         "config": [64, 32, 4, 3, null], "time": 0.82}]}

`config` is `queries, keys, warps, stages, registers` of `Config`. `time` is the time of the whole pass, divided by its
time with the default. `shape` is a text by which the operator names the shapes that share a row; a row with an empty
one is for all shapes that have no row. Nothing here imports Triton.
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
    """Block sizes and compiler options of one kernel. Some kernels derive a block size from the input instead."""

    queries: int  # per block of scores
    keys: int
    warps: int
    stages: int
    registers: int | None = None  # limit for a thread; without one, the compiler may spill a few bytes

    @property
    def options(self) -> dict[str, int | bool]:
        """Compiler options. Fusing multiplications and additions is set explicitly, because defaults differ."""
        options: dict[str, int | bool] = dict(num_warps=self.warps, num_stages=self.stages, enable_fp_fusion=True)
        return options if self.registers is None else options | dict(maxnreg=self.registers)


Table = dict[tuple[str, int, int], Config]  # (kernel, padded head_dim, bytes per element): the defaults


class Key(NamedTuple):
    """What a configuration is for."""

    operator: str  # "na2d", "routed"
    kernel: str  # a name in the operator's table of defaults
    block_d: int  # head_dim, padded to a power of two: 16 to 128
    itemsize: int  # bytes per element: 2 or 4
    shape: str = ""  # names the shapes that share a row


def pick(table: Table, key: Key, device: torch.device | None = None) -> Config:
    """The configuration for `key`: the one being tried, otherwise the one tuned on `device`, otherwise from `table`.

    If head_dim 16 has no row in `table`, the row of 32 is used.
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
    """File name of the table for a GPU: `nvidia-h100-80gb-hbm3.json` for `NVIDIA H100 80GB HBM3`."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".json"


def read_table(file: Path) -> dict[Key, Config]:
    """The rows of a tuned table; ValueError if the file is not one."""
    try:
        rows = json.loads(file.read_text())["rows"]
        return {Key(*(row[field] for field in Key._fields)): Config(*row["config"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is not a table of tuned kernels ({error!r}); write one with python -m benchmarks.gpu"
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
    """Cache the results of `function` by its arguments. Use only this cache for functions that call `pick`."""
    cached = functools.lru_cache(maxsize=1024)(function)
    _plans.append(cached.cache_clear)
    return cached  # type: ignore[return-value]


def forget() -> None:
    """Empty the caches of tables and plans."""
    _tuned.cache_clear()
    for clear in _plans:
        clear()


@contextmanager
def trying(configs: Mapping[Key, Config]) -> Iterator[None]:
    """Inside the context, kernels run with these configurations."""
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
    """Yields a dict that records, in order, the keys requested inside the context, with their defaults."""
    found: dict[Key, Config] = {}
    forget()
    _listeners.append(found)
    try:
        yield found
    finally:
        _listeners.remove(found)


def candidates(default: Config, blocks: bool = True) -> list[Config]:
    """Configurations to try besides `default`, nearest first: half and double blocks, other warps and stages.

    A thread holds 8 to 64 scores. `blocks=False`: the kernel does not take its blocks from the configuration.
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
