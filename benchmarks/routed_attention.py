"""Routed attention at BiFormer's shapes: ours beside the published gather formulation, and dense attention.

    python benchmarks/routed_attention.py [--sizes 224 512 800x1344] [--variants small base] [--batch 8] [--seconds 2]
        [--no-models] [--out benchmarks/routed_attention_cpu.md]

On the CPU, float32; for a GPU see `python -m benchmarks.gpu`. One process, medians of interleaved runs, after a check
that both agree. Absolute times of a shared machine prove nothing: read the ratios. Regions are the authors': 7 x 7 at
224 px, 8 x 8 at 512, 16 x 16 at 800 x 1344. BiFormer-T has the shapes of -S: its rows stand for both.

"Dense" is attention of the whole map without routing (PyTorch's `scaled_dot_product_attention`): what one would run
otherwise, not the same function. It is left out where its scores, written out, would exceed the machine's memory; the
cell says how large they are. So is the gather formulation's backward pass where the gradient of what it gathers from
would take half of it.

A second table holds the peak memory of forward + backward, and the bytes that the operators of each formulation read
and write (`measuring.Traffic`) as multiples of the floor: the maps that must move, 4 forward (query, key, value, out)
and 8 more backward (the same, the gradient of out, and three results). Dense attention is near its floor in bytes; it
pays in products.

At the end, images per second of whole biformer_small at 224 px, inference and training step, with the plain layer and
with ours, eager.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import biformer_plain
import measuring
import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import hybridzoo  # noqa: F401  (registers the models)
from hybridzoo.kernels import routed_attention2d
from hybridzoo.kernels.routed import operators, torch_impl
from hybridzoo.kernels.routed.grid import Grid

HEAD_DIM = 32
REGIONS = {"224": 7, "512": 8, "800x1344": 16}
HEADS = {"small": (2, 4, 8), "base": (3, 6, 12)}
MODELS = {"small": "T, S", "base": "B"}
TOPK = (1, 4, 16)
TARGETS = (1.3, 2.0)  # times the speed of the gather formulation on a CPU, forward and both ways
RUNS = 15  # at most
BATCHES = {"224": 8, "512": 2, "800x1344": 1}
CPU = torch.device("cpu")
Function = Callable[[Tensor, Tensor, Tensor, "Tensor | None", Tensor, Grid, float], Tensor]


def ours(q: Tensor, k: Tensor, v: Tensor, fill: Tensor | None, routes: Tensor, grid: Grid, scale: float) -> Tensor:
    return routed_attention2d(q, k, v, routes, grid[:2], fill=fill, scale=scale)


def dense(q: Tensor, k: Tensor, v: Tensor, fill: Tensor | None, routes: Tensor, grid: Grid, scale: float) -> Tensor:
    """Every token to every other; not the same function."""
    query, key, value = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2).reshape(q.shape)


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    *tensors, grid, scale, _ = args
    return torch_impl.forward(*tensors, Grid(*grid), scale), tensors[0].new_empty(0)


def _backward(*args: Any) -> tuple[Tensor, ...]:
    *tensors, _, _, grid, scale, _, want_fill = args
    *grads, dfill = torch_impl.backward(*tensors, Grid(*grid), scale, want_fill)
    return *grads, tensors[0].new_empty(0) if dfill is None else dfill


# Of what our operators consist on a CPU, for `measuring.Traffic`.
INSIDE = {operators.routed_attention2d: _forward, operators.routed_attention2d_backward: _backward}


class Shape(NamedTuple):
    models: str
    stage: str
    height: int
    width: int
    heads: int
    topk: int
    regions: int


def shapes(size: str, variant: str) -> list[Shape]:
    sides = [int(n) for n in size.split("x")]
    return [
        Shape(
            MODELS[variant],
            f"stage {i + 1}",
            *(math.ceil(n / (4 << i)) for n in (sides[0], sides[-1])),
            heads,
            topk,
            REGIONS[size],
        )
        for i, (heads, topk) in enumerate(zip(HEADS[variant], TOPK, strict=True))
    ]


class Case:
    """One shape's tensors; runs and measures functions on them."""

    def __init__(self, shape: Shape, batch: int) -> None:
        torch.manual_seed(0)
        size = (batch, shape.height, shape.width, 3, shape.heads, HEAD_DIM)
        self.packed = torch.randn(size, requires_grad=True)
        self.grad = torch.randn(*size[:3], *size[4:])
        self.grid = Grid.of(self.grad, shape.regions, shape.regions)
        self.routes = torch.rand(batch, self.grid.regions, self.grid.regions).topk(shape.topk).indices
        self.leaves = [self.packed]
        self.fill = None
        if any(self.grid.beyond(self.grad)):
            self.fill = torch.randn(2, shape.heads, HEAD_DIM, requires_grad=True)
            self.leaves.append(self.fill)
        self.where = self.routes, self.grid, (shape.heads * HEAD_DIM) ** -0.5

    def forward(self, function: Function) -> Tensor:
        return function(*self.packed.unbind(3), self.fill, *self.where)

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, self.leaves, self.grad, allow_unused=True)

    @property
    def floor(self) -> int:
        """Bytes that any forward pass must move."""
        return 4 * self.grad.nbytes

    @property
    def scores(self) -> int:
        """Bytes of the scores of dense attention in float32."""
        batch, height, width, heads, _ = self.grad.shape
        return 4 * batch * heads * (height * width) ** 2

    @property
    def gathered_gradient(self) -> int:
        """Bytes of the gradient of what the published code gathers from: all keys and values once per region."""
        grid = self.grid
        return 2 * self.grad.nbytes * grid.regions**2 * grid.tokens // (self.grad.shape[1] * self.grad.shape[2])

    def walk(self, function: Function, both: bool) -> tuple[list[Tensor], list[float]]:
        """The result and all gradients, and the traffic forward and both ways in floors. One pass, not timed."""
        leaves = [t.detach().requires_grad_() for t in (*self.packed.unbind(3), self.fill) if t is not None]
        with measuring.Traffic(INSIDE) as traffic:
            out = function(*leaves[:3], leaves[3] if self.fill is not None else None, *self.where)
            forward = traffic.bytes / self.floor
            if not both:
                return [out], [forward]
            grads = torch.autograd.grad(out, leaves, self.grad, allow_unused=True)  # dense attention has no fill
        return [out.detach(), *(g for g in grads if g is not None)], [forward, traffic.bytes / (3 * self.floor)]

    def sample(self, function: Function, both: bool) -> tuple[float, float]:
        """Seconds of one forward and one backward pass (nan without)."""
        with torch.no_grad():
            forward = measuring.seconds(lambda: self.forward(function), CPU)
        if not both:
            return forward, math.nan
        out = self.forward(function)
        return forward, measuring.seconds(lambda: self.backward(out), CPU)


class Result(NamedTuple):
    """Of one function on one shape; nan and None for what could not run."""

    forward: float = math.nan  # seconds
    backward: float = math.nan
    memory: int | None = None
    traffic: tuple[float, ...] = ()  # in floors: forward, both ways


def run_all(case: Case, functions: dict[str, tuple[Function, bool]], budget: float) -> dict[str, Result]:
    """Check ours against the gather formulation, then measure all; the flags say which can go backward."""
    walked = {name: case.walk(function, both) for name, (function, both) in functions.items()}
    names = ("out", "gradient of query", "of key", "of value", "of fill")
    for name, ours, right in zip(names, walked["ours"][0], walked["gather"][0], strict=False):
        error = ((ours.float() - right.float()).abs().max() / right.float().abs().max()).item()
        if not error <= 1e-4:
            raise SystemExit(f"ours disagrees with the gather formulation: {name} off by {error:.1e}")
    traffic = {name: tuple(factors) for name, (_, factors) in walked.items()}
    walked.clear()
    memory: dict[str, int | None] = {}
    for name, (function, both) in functions.items():  # also the warm-up
        step = (lambda f=function: case.backward(case.forward(f))) if both else (lambda f=function: case.forward(f))
        used = measuring.peak_memory(step, CPU)
        memory[name] = used if both else None
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    spent = dict.fromkeys(functions, 0.0)
    for _ in range(RUNS):
        for name, (function, both) in functions.items():
            if spent[name] < budget:
                samples[name].append(case.sample(function, both))
                spent[name] += sum(t for t in samples[name][-1] if t == t)
    medians = {name: [statistics.median(t) for t in zip(*s, strict=True)] for name, s in samples.items()}
    return {name: Result(*medians[name], memory[name], traffic[name]) for name in functions}


def measure(shape: Shape, batch: int, budget: float) -> tuple[list[str], list[str], list[str]]:
    """A row of each table, and remarks on it: targets missed, and where attending to everything is faster than ours."""
    case = Case(shape, batch)
    limit = measuring.total_memory(CPU)
    fits = case.gathered_gradient < limit / 2  # there is more that it takes
    functions: dict[str, tuple[Function, bool]] = {
        "gather": (biformer_plain.routed_attention, fits),
        "ours": (ours, True),
    }
    if case.scores < limit:
        functions["dense"] = (dense, True)
    results = run_all(case, functions, budget)
    gather, mine, whole = results["gather"], results["ours"], results.get("dense", Result())
    too_large = "" if "dense" in results else f"scores: {case.scores / 2**30:.0f} GiB"
    no_backward = "" if fits else f"gradient: {case.gathered_gradient / 2**30:.0f} GiB"
    name = [shape.models, shape.stage, f"{shape.height}x{shape.width}", str(shape.heads), str(shape.topk)]
    both = [sum(r[:2]) for r in (gather, mine, whole)]
    times = [ms(gather.forward), ms(mine.forward), ratio(gather.forward, mine.forward), ms(whole.forward) or too_large]
    times += [ms(both[0]) or no_backward, ms(both[1]), ratio(both[0], both[1]), ms(both[2]) or too_large]
    details = ["" if r.memory is None else f"{r.memory / 2**20:.0f}" for r in (gather, mine, whole)]
    for way in (0, 1):
        details += [f"{r.traffic[way]:.1f}x" if len(r.traffic) > way else "" for r in (gather, mine, whole)]
    remarks = []
    where = f"{shape.models} {shape.stage}"
    for way, old, new, all_of_it, target in zip(
        ("forward", "forward + backward"), (gather.forward, both[0]), (mine.forward, both[1]), (whole.forward, both[2]),
        TARGETS, strict=True,
    ):  # fmt: skip
        if old / new < target:
            remarks.append(f"{where}, {way}, misses {target}x: {ms(old)} / {ms(new)} = {old / new:.2f}x.")
        if all_of_it < new:
            remarks.append(f"{where}, {way}: dense attention is faster than ours, {ms(all_of_it)} to {ms(new)} ms.")
    return [*name, *times], [*name[:3], *details], remarks


def ms(seconds: float) -> str:
    return "" if math.isnan(seconds) else f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def ratio(slow: float, fast: float) -> str:
    return "" if math.isnan(slow) else f"{slow / fast:.1f}x"


def measure_models(batch: int, budget: float) -> list[list[str]]:
    """Rows of images per second of biformer_small at 224 px."""
    torch.manual_seed(0)
    model = timm.create_model("biformer_small")
    models = {"plain": biformer_plain.make_plain(copy.deepcopy(model)), "ours": model}
    images = torch.randn(batch, 3, 224, 224)
    with torch.no_grad():
        right, out = (m.eval()(images[:1]) for m in models.values())
    torch.testing.assert_close(out, right, rtol=1e-3, atol=1e-3)

    def infer(m: torch.nn.Module) -> None:
        with torch.inference_mode():
            m(images)

    def train(m: torch.nn.Module) -> None:
        m(images).square().mean().backward()
        m.zero_grad()

    rows = []
    for way, step in (("inference", infer), ("training step", train)):
        for m in models.values():
            m.train(way == "training step")
        steps = {name: partial(step, m) for name, m in models.items()}
        seconds = measuring.medians(steps, budget, CPU)
        plain, mine = (batch / seconds[name] for name in ("plain", "ours"))
        rows.append(["biformer_small", way, "eager", f"{plain:.4g}", f"{mine:.4g}", f"{mine / plain:.2f}x"])
    return rows


def show(title: str, columns: list[str], rows: list[list[str]], note: str) -> list[str]:
    """Print a table; the same in lines of Markdown."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    Console(width=200).print(table)
    lines = ["| " + " | ".join(r) + " |" for r in (columns, ["---"] * len(columns), *rows)]
    return [f"# {title}", "", note, "", *lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", choices=REGIONS, default=list(REGIONS))
    parser.add_argument("--variants", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--batch", type=int, help=f"default by size: {BATCHES}")
    parser.add_argument("--seconds", type=float, default=2.0, help="of running each contender on each shape")
    parser.add_argument("--no-models", dest="models", action="store_false", help="leave out the whole model")
    parser.add_argument("--out", type=Path, help="also write the tables as Markdown")
    args = parser.parse_args()
    where = f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
    shape = ["BiFormer", "stage", "map"]
    columns = [*shape, "heads", "top-k", "gather fwd ms", "ours", "ratio", "dense"]
    columns += ["gather fwd+bwd ms", "ours", "ratio", "dense"]
    details = [*shape, "gather MiB", "ours", "dense", "gather fwd, over the floor", "ours", "dense"]
    details += ["gather fwd+bwd, over the floor", "ours", "dense"]
    note = f"Medians of interleaved runs, as many as fit {args.seconds:.0f} seconds a contender, {RUNS} at most."
    lines = []
    for size in args.sizes:
        batch = args.batch or BATCHES[size]
        todo = [s for variant in args.variants for s in shapes(size, variant)]
        rows = [measure(s, batch, args.seconds) for s in track(todo, f"measuring {size}", console=Console(stderr=True))]
        title = f"Routed attention at {size} px, batch {batch}, {where}"
        remarks = " ".join(text for *_, texts in rows for text in texts)
        lines += show(title, columns, [times for times, *_ in rows], f"{note} {remarks}".strip())
        what = "Peak memory of forward + backward, and bytes read and written over the least there is to move."
        lines += show(f"Memory and traffic at {size} px, batch {batch}", details, [more for _, more, _ in rows], what)
    if args.models:
        batch = args.batch or BATCHES["224"]
        columns = ["model", "", "", "plain images/s", "ours", "ratio"]
        budget = 15 * args.seconds
        rows = measure_models(batch, budget)
        what = f"Medians of interleaved runs, three at least, for {budget:.0f} seconds."
        lines += show(f"Whole model at 224 px, batch {batch}, {where}", columns, rows, what)
    if args.out:
        args.out.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
