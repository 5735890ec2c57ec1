"""Neighborhood attention at DiNAT-Tiny shapes, kernel 7, with a trainable bias: ours beside what else one can run.

    python benchmarks/neighborhood_attention.py [--batch 2] [--shapes 224] [--out neighborhood_attention.md]

On the CPU, float32; for a GPU see `python -m benchmarks.gpu`. One process, medians of interleaved runs, after a check
that all agree. Absolute times of a shared machine prove nothing: read the ratios. Contenders:

* torch: `na2d` with that `impl`;
* gather: every query's neighborhood of keys and values gathered by indexing, then attended to;
* dense: PyTorch's `scaled_dot_product_attention` over the whole map, mask and bias given as one matrix, for maps of up
  to 4096 tokens.

"Memory" is the peak of forward + backward above what is there before.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import measuring
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from hybridzoo.kernels import na2d
from hybridzoo.kernels.neighborhood import reference

KERNEL, HEAD_DIM, CPU = 7, 32, torch.device("cpu")
DENSE_MAX_TOKENS = 4096  # its bias is quadratic
Function = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Shape(NamedTuple):
    height: int
    width: int
    heads: int
    dilation: int


SHAPES = {
    "224": [
        *(Shape(56, 56, 2, 1), Shape(56, 56, 2, 8), Shape(28, 28, 4, 1), Shape(28, 28, 4, 4)),
        *(Shape(14, 14, 8, 1), Shape(14, 14, 8, 2), Shape(7, 7, 16, 1)),
    ],
    "800x1344": [  # dilations of the published detectors
        *(Shape(200, 336, 2, 1), Shape(200, 336, 2, 28), Shape(100, 168, 4, 1), Shape(100, 168, 4, 14)),
        *(Shape(50, 84, 8, 1), Shape(50, 84, 8, 5), Shape(25, 42, 16, 1), Shape(25, 42, 16, 3)),
    ],
}


def ours(shape: Shape, impl: str) -> Function:
    return lambda q, k, v, rpb: na2d(q, k, v, KERNEL, shape.dilation, rpb=rpb, impl=impl)


def gather(shape: Shape, device: torch.device) -> Function:
    axes = []
    for side in shape[:2]:
        keys, entries = zip(*reference.axis_table(side, KERNEL, shape.dilation), strict=True)
        axes.append((torch.tensor(keys, device=device), torch.tensor(entries, device=device)))
    (keys_h, entries_h), (keys_w, entries_w) = axes

    def neighbors(x: Tensor) -> Tensor:  # (B, H, W, kernel * kernel, heads, d)
        return x[:, keys_h[:, None, :, None], keys_w[None, :, None, :]].flatten(3, 4)

    def attend(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor) -> Tensor:
        bias = rpb[:, entries_h[:, None, :, None], entries_w[None, :, None, :]].flatten(3).permute(1, 2, 0, 3)
        scores = torch.einsum("byxhd,byxnhd->byxhn", q * HEAD_DIM**-0.5, neighbors(k)) + bias
        return torch.einsum("byxhn,byxnhd->byxhd", scores.softmax(-1).to(v.dtype), neighbors(v))

    return attend


def dense(shape: Shape, device: torch.device) -> Function:
    (seen_h, entries_h), (seen_w, entries_w) = (
        [t.to(device) for t in reference.dense_axis(side, KERNEL, shape.dilation)] for side in shape[:2]
    )
    hidden = ~(seen_h[:, None, :, None] & seen_w[None, :, None, :]).flatten(2).flatten(0, 1)

    def attend(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor) -> Tensor:
        bias = rpb[:, entries_h[:, None, :, None], entries_w[None, :, None, :]].flatten(3).flatten(1, 2)
        bias = bias.masked_fill(hidden, -torch.inf).to(q.dtype)
        q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, bias)
        return out.transpose(1, 2).unflatten(1, shape[:2])

    return attend


class Case:
    """One shape's tensors; runs and measures functions on them."""

    def __init__(self, shape: Shape, batch: int) -> None:
        torch.manual_seed(0)
        size = (batch, shape.height, shape.width, 3, shape.heads, HEAD_DIM)
        self.packed = torch.randn(size, requires_grad=True)
        table = 2 * KERNEL - 1
        self.rpb = torch.randn(shape.heads, table, table, requires_grad=True)
        self.grad = torch.randn(*size[:3], *size[4:])

    def forward(self, function: Function) -> Tensor:
        return function(*self.packed.unbind(3), self.rpb)

    def both_ways(self, function: Function) -> tuple[Tensor, ...]:
        return self.backward(self.forward(function))

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, (self.packed, self.rpb), self.grad)

    def check(self, functions: dict[str, Function], truth: Function) -> None:
        """All results and gradients of the first image against `truth`."""
        inputs = [self.packed[:1], self.rpb]

        def run(function: Function) -> list[Tensor]:
            packed, rpb = (t.detach().requires_grad_() for t in inputs)
            out = function(*packed.unbind(3), rpb)
            return [out, *torch.autograd.grad(out, (packed, rpb), self.grad[:1])]

        expected = run(truth)
        for name, function in functions.items():
            for what, ours, right in zip(("out", "dqkv", "drpb"), run(function), expected, strict=True):
                error = ((ours - right).abs().max() / right.abs().max()).item()
                if not error <= 1e-4:
                    raise SystemExit(f"{name} disagrees with the gather formulation: {what} off by {error:.1e}")

    def times(self, functions: dict[str, Function], repeats: int) -> dict[str, tuple[float, float]]:
        """Median seconds of every function, forward and backward; runs interleaved, each after one not timed."""
        samples: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in functions}
        for _ in range(repeats):
            for name, function in functions.items():
                with torch.no_grad():
                    self.forward(function)  # what other contenders left in caches and allocator is not its own cost
                    samples[name][0].append(measuring.seconds(lambda f=function: self.forward(f), CPU))
                self.both_ways(function)
                out = self.forward(function)
                samples[name][1].append(measuring.seconds(lambda out=out: self.backward(out), CPU))
                del out
        return {name: (statistics.median(f), statistics.median(b)) for name, (f, b) in samples.items()}


def measure(shape: Shape, batch: int, repeats: int) -> tuple[list[list[str]], str | None]:
    """Rows of the table, one a contender; and a sentence where dense attention needs less time than ours."""
    case = Case(shape, batch)
    functions: dict[str, Function] = {"gather": gather(shape, CPU), "torch": ours(shape, "torch")}
    if shape.height * shape.width <= DENSE_MAX_TOKENS:
        functions["dense"] = dense(shape, CPU)
    case.check(functions, functions["gather"])
    memory = {n: measuring.peak_memory(lambda f=f: case.both_ways(f), CPU) for n, f in functions.items()}
    seconds = case.times(functions, repeats)
    rows, slow = [], seconds["gather"]
    for name, (forward, backward) in seconds.items():
        size, used = f"{shape.height}x{shape.width}", memory[name]
        cells = [size, str(shape.heads), str(shape.dilation), name, *(_milliseconds(t) for t in (forward, backward))]
        cells += [f"{slow[0] / forward:.1f}x", f"{sum(slow) / (forward + backward):.1f}x"]
        cells.append("" if used is None else f"{used / 2**20:.0f}")
        rows.append(cells)
    mine, whole = seconds["torch"], seconds.get("dense", (float("inf"),) * 2)
    wins = [way for way, i in (("forward", 0), ("backward", 1)) if whole[i] < mine[i]]
    where = f"{shape.height}x{shape.width}, dilation {shape.dilation}"
    numbers = [f"{_milliseconds(whole[i])} to {_milliseconds(mine[i])} ms" for i in (0, 1)]
    return rows, f"{where}: {' and '.join(wins)} ({', '.join(numbers)})" if wins else None


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=2, help="at 224 px; default 2 (800x1344: 1)")
    parser.add_argument("--shapes", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="also write the tables as Markdown")
    args = parser.parse_args()
    where = f"CPU, {torch.get_num_threads()} threads"
    columns = ["map", "heads", "dilation", "", "forward ms", "backward ms", "over gather: forward"]
    columns += ["forward + backward", "memory MiB"]
    lines = []
    for name, shapes in SHAPES.items():
        if args.shapes not in (name, "all"):
            continue
        batch = args.batch if name == "224" else 1
        rows, faster = [], []
        for shape in track(shapes, f"measuring {name}", console=Console(stderr=True)):
            more, wins = measure(shape, batch, args.repeats)
            rows += more
            faster += [wins] if wins else []
        title = f"Neighborhood attention, DiNAT-Tiny at {name} px, batch {batch}, {where}, torch {torch.__version__}"
        table = Table(*columns, title=title)
        for i, row in enumerate(rows):
            table.add_row(*row, end_section=i + 1 == len(rows) or rows[i + 1][:3] != row[:3])
        Console(width=120 if not sys.stdout.isatty() else None).print(table)
        lines += [f"# {title}", "", f"Medians of {args.repeats} interleaved runs; see the benchmark's docstring.", ""]
        lines += ["| " + " | ".join(r) + " |" for r in (columns, ["---"] * len(columns), *rows)] + [""]
        if faster:
            lines += [f"Dense attention is faster (its time to ours, forward, backward) at {'; '.join(faster)}.", ""]
    if args.out:
        args.out.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
