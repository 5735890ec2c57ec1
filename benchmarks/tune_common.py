"""The search that the tuning scripts share: try block sizes of one kernel after the other, keep the fastest."""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import triton
from rich.console import Console
from rich.progress import track

from hybridzoo.kernels.triton_common import Config, Launch, Table

Milliseconds = Callable[[str, int, int, torch.dtype], "float | None"]  # kind, batch, head_dim, dtype


def candidates(blocks: Sequence[tuple[int, int]]) -> list[Config]:
    """What is worth trying: 8 to 64 scores per thread."""
    return [
        Config(queries, keys, warps, stages)
        for queries, keys in blocks
        for warps in (1, 2, 4, 8)
        if 8 <= queries * keys / (32 * warps) <= 64
        for stages in (1, 2, 3)
    ]


class NotLaunched(Exception):
    """At the shapes of the tuning run, another kernel does the work (tokens that are too wide for a dense one)."""


def time_kernel(name: str, launches: Sequence[Launch]) -> float | None:
    """Median milliseconds of the kernel `name` among `launches`; None where one does not fit into the GPU.

    Raises NotLaunched where none of them is this kernel's.
    """
    wanted = [launch for launch in launches if launch.kernel.__name__ == name]
    if not wanted:
        raise NotLaunched(f"what runs here is {', '.join(launch.kernel.__name__ for launch in launches)}")
    try:
        for launch in launches:  # in order: the later ones read what the earlier ones leave
            launch.run()
        return triton.testing.do_bench(wanted[0].run, return_mode="median")
    except triton.runtime.errors.OutOfResources:
        return None


def main(
    doc: str,
    table: Table,
    pick: Callable[[str, int, int], Config],
    kinds: Sequence[str],
    variable: str,
    blocks: Callable[[str], Sequence[tuple[int, int]]],
    milliseconds: Milliseconds,
) -> None:
    """The command line: for every kind, dtype and head_dim, time every candidate and write the best to a JSON file.

    A row that has nothing to time is skipped, with the reason. `table` is changed in place while searching:
    `milliseconds` measures what it then says.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[32], choices=(32, 64, 128))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--kinds", nargs="+", default=kinds, choices=kinds)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("tuning takes a GPU, and PyTorch finds none here")
    if os.environ.get(variable):
        parser.error(f"unset {variable}: it would come before every candidate")

    console = Console()
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    found: dict[str, list[int]] = {}
    for dtype_name, head_dim, kind in itertools.product(args.dtypes, args.head_dims, args.kinds):
        dtype = getattr(torch, dtype_name)
        before = pick(kind, head_dim, dtype.itemsize)
        key = kind, head_dim, dtype.itemsize
        times: dict[Config, float] = {}
        reason = "no candidate fits into this GPU"
        trials = [before, *(c for c in candidates(blocks(kind)) if c != before)]
        try:
            for config in track(trials, f"{kind} {head_dim} {dtype_name}", console=console, transient=True):
                table[key] = config
                time = milliseconds(kind, args.batch, head_dim, dtype)
                if time is not None:
                    times[config] = time
        except NotLaunched as error:
            reason = str(error)
        if not times:
            table[key] = before
            console.print(f"    {key!r}: skipped, {reason}")
            continue
        best = min(times, key=lambda config: times[config])
        table[key] = best
        gain = times[before] / times[best] if before in times else float("nan")
        numbers = best.queries, best.keys, best.warps, best.stages
        console.print(
            f"    {key!r}: Config{numbers},  # {times[best] * 1e3:.0f} us, {gain:.2f} times as fast as before"
        )
        found[",".join(map(str, key))] = list(numbers)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
