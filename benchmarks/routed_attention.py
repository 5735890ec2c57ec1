"""Routed attention at BiFormer's shapes: ours beside the published gather formulation, and dense attention.

    python benchmarks/routed_attention.py [--sizes 224] [--variants small] [--details] [--models] [--batch 8]
        [--repeats 15] [--out benchmarks/routed_attention_cpu.md]

On a GPU if there is one (bf16), else on the CPU (float32). One process, medians of interleaved runs, after a check that
all agree. Absolute times of a shared machine prove nothing: read the ratios. Regions are the authors': 7 x 7 at 224 px,
8 x 8 at 512, 16 x 16 at 800 x 1344. BiFormer-T has the shapes of -S.

* `--details` (always on a GPU) adds peak memory of forward + backward, dense attention of the whole map without routing
  (PyTorch's `scaled_dot_product_attention`: what one would run otherwise, not the same function), and the share of the
  floor: the time in which the maps that must move (4 forward, 8 backward) move at this GPU's measured copy speed.
* `--models` adds images per second of whole biformer_small, inference and training, with the plain layer and with ours,
  eager and, on a GPU, compiled.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

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
from hybridzoo.kernels.routed.grid import Grid

HEAD_DIM = 32
REGIONS = {"224": 7, "512": 8, "800x1344": 16}
HEADS = {"small": (2, 4, 8), "base": (3, 6, 12)}
TOPK = (1, 4, 16)
DENSE_MAX_TOKENS = 4096  # on a CPU
BATCHES = {"cuda": {"224": 128, "512": 32, "800x1344": 2}, "cpu": {"224": 8, "512": 2, "800x1344": 1}}
Function = Callable[[Tensor, Tensor, Tensor, "Tensor | None", Tensor, Grid, float], Tensor]


def ours(q: Tensor, k: Tensor, v: Tensor, fill: Tensor | None, routes: Tensor, grid: Grid, scale: float) -> Tensor:
    return routed_attention2d(q, k, v, routes, grid[:2], fill=fill, scale=scale)


def dense(q: Tensor, k: Tensor, v: Tensor, fill: Tensor | None, routes: Tensor, grid: Grid, scale: float) -> Tensor:
    """Every token to every other; not the same function."""
    query, key, value = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2).reshape(q.shape)


class Shape(NamedTuple):
    stage: str
    height: int
    width: int
    heads: int
    topk: int
    regions: int


def shapes(size: str, variant: str) -> list[Shape]:
    sides = [int(n) for n in size.split("x")]
    return [
        Shape(f"stage {i + 1}", *(math.ceil(n / (4 << i)) for n in (sides[0], sides[-1])), heads, topk, REGIONS[size])
        for i, (heads, topk) in enumerate(zip(HEADS[variant], TOPK, strict=True))
    ]


class Case:
    """One shape's tensors; runs and measures functions on them."""

    def __init__(self, shape: Shape, batch: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device = device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        size = (batch, shape.height, shape.width, 3, shape.heads, HEAD_DIM)
        self.packed = torch.randn(size, device=device, dtype=dtype, requires_grad=True)
        self.grad = torch.randn(*size[:3], *size[4:], device=device, dtype=dtype)
        self.grid = Grid.of(self.grad, shape.regions, shape.regions)
        self.routes = torch.rand(batch, self.grid.regions, self.grid.regions, device=device).topk(shape.topk).indices
        self.leaves = [self.packed]
        self.fill = None
        if any(self.grid.beyond(self.grad)):
            self.fill = torch.randn(2, shape.heads, HEAD_DIM, device=device, dtype=dtype, requires_grad=True)
            self.leaves.append(self.fill)
        self.scale = (shape.heads * HEAD_DIM) ** -0.5

    def forward(self, function: Function) -> Tensor:
        return function(*self.packed.unbind(3), self.fill, self.routes, self.grid, self.scale)

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, self.leaves, self.grad, allow_unused=True)

    def check(self, function: Function, truth: Function) -> None:
        tolerance = 2e-2 if self.packed.dtype == torch.bfloat16 else 1e-4
        out, right = self.forward(function), self.forward(truth)
        torch.testing.assert_close(out, right, rtol=tolerance, atol=tolerance)
        for name, got, wanted in zip(("qkv", "fill"), self.backward(out), self.backward(right), strict=False):
            error = ((got.float() - wanted.float()).abs().max() / wanted.float().abs().max()).item()
            if not error <= tolerance:
                raise SystemExit(f"ours disagrees with the gather formulation: gradient of {name} off by {error:.1e}")

    def times(self, functions: dict[str, Function], repeats: int) -> dict[str, tuple[float, float]]:
        """Median seconds of every function, forward and backward, runs interleaved."""
        samples: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in functions}
        for _ in range(repeats):
            for name, function in functions.items():
                with torch.no_grad():
                    samples[name][0].append(measuring.seconds(lambda f=function: self.forward(f), self.device))
                out = self.forward(function)
                samples[name][1].append(measuring.seconds(lambda out=out: self.backward(out), self.device))
                del out
        return {name: (statistics.median(f), statistics.median(b)) for name, (f, b) in samples.items()}

    def peak_memory(self, function: Function) -> str:
        used = measuring.peak_memory(lambda: self.backward(self.forward(function)), self.device)
        return "" if used is None else f"{used / 2**20:.0f}"


def measure(
    shape: Shape, batch: int, repeats: int, device: torch.device, speed: float | None, details: bool
) -> list[str]:
    """A row of the table."""
    case = Case(shape, batch, device)
    functions: dict[str, Function] = {"gather": biformer_plain.routed_attention, "ours": ours}
    case.check(ours, functions["gather"])
    with_dense = details and (device.type == "cuda" or shape.height * shape.width <= DENSE_MAX_TOKENS)
    if with_dense:
        functions["dense"] = dense
    memory = [case.peak_memory(functions[name]) for name in ("gather", "ours")] if details else []
    t = case.times(functions, repeats)
    cells = [shape.stage, f"{shape.height}x{shape.width}", str(shape.heads), str(shape.topk)]
    for seconds in ({name: f for name, (f, _) in t.items()}, {name: f + b for name, (f, b) in t.items()}):
        cells += [f"{seconds['gather'] * 1e3:.3g}", f"{seconds['ours'] * 1e3:.3g}"]
        cells.append(f"{seconds['gather'] / seconds['ours']:.1f}x")
    if details:
        cells += [f"{t['gather'][1] / t['ours'][1]:.1f}x"]
        cells += [f"{t['dense'][0] * 1e3:.3g}", f"{sum(t['dense']) * 1e3:.3g}"] if with_dense else ["", ""]
        cells += memory
    if speed:
        cells += [f"{maps * case.grad.nbytes / speed / s:.0%}" for maps, s in zip((4, 8), t["ours"], strict=True)]
    return cells


def measure_models(batch: int, repeats: int, device: torch.device) -> list[list[str]]:
    """Rows of images per second of biformer_small at 224 px."""
    torch.manual_seed(0)
    model = timm.create_model("biformer_small").to(device)
    models = {"plain": biformer_plain.make_plain(copy.deepcopy(model)), "ours": model}
    images = torch.randn(batch, 3, 224, 224, device=device)
    with torch.no_grad():
        right, out = (m.eval()(images[:1]) for m in models.values())
    torch.testing.assert_close(out, right, rtol=1e-3, atol=1e-3)
    half = torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")

    def infer(m: torch.nn.Module) -> None:
        with torch.inference_mode(), half:
            m(images)

    def train(m: torch.nn.Module) -> None:
        with half:
            loss = m(images).float().square().mean()
        loss.backward()
        m.zero_grad()

    rows = []
    for mode in ("eager", "compiled") if device.type == "cuda" else ("eager",):
        if mode == "compiled":
            models = {name: torch.compile(m) for name, m in models.items()}
        for way, step in (("inference", infer), ("training", train)):
            samples: dict[str, list[float]] = {name: [] for name in models}
            for m in models.values():
                m.train(way == "training")
                for _ in range(3 if device.type == "cuda" else 1):
                    step(m)
            for _ in range(repeats):
                for name, m in models.items():
                    samples[name].append(measuring.seconds(lambda m=m, step=step: step(m), device))
            plain, ours = (batch / statistics.median(samples[name]) for name in ("plain", "ours"))
            rows.append(["biformer_small", way, mode, f"{plain:.4g}", f"{ours:.4g}", f"{ours / plain:.2f}x"])
    return rows


def show(title: str, columns: list[str], rows: list[list[str]], repeats: int) -> list[str]:
    """Print a table; the same in lines of Markdown."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    lines = ["| " + " | ".join(r) + " |" for r in (columns, ["---"] * len(columns), *rows)]
    return [f"# {title}", "", f"Medians of {repeats} interleaved runs.", "", *lines, ""]


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=REGIONS, default=list(REGIONS) if gpu else ["224"])
    parser.add_argument("--variants", nargs="+", choices=HEADS, default=list(HEADS) if gpu else ["small"])
    parser.add_argument("--batch", type=int, help=f"default by size: {BATCHES}")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--details", action="store_true", default=gpu)
    parser.add_argument("--models", action="store_true")
    parser.add_argument("--out", type=Path, help="also write the tables as Markdown")
    args = parser.parse_args()
    where = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    where += f", torch {torch.__version__}"
    speed = measuring.copy_speed(device) if gpu else None
    columns = ["shape", "map", "heads", "top-k", "gather fwd ms", "ours", "ratio", "gather fwd+bwd ms", "ours", "ratio"]
    if args.details:
        columns += ["bwd ratio", "dense fwd ms", "dense fwd+bwd ms", "gather MiB", "ours MiB"]
    if gpu:
        columns += ["floor fwd", "floor bwd"]
    lines = []
    for size in args.sizes:
        batch = args.batch or BATCHES[device.type][size]
        for variant in args.variants:
            stages = track(shapes(size, variant), f"measuring {size}", console=Console(stderr=True))
            rows = [measure(shape, batch, args.repeats, device, speed, args.details) for shape in stages]
            title = f"Routed attention, BiFormer-{variant[0].upper()} at {size} px, batch {batch}, {where}"
            lines += show(title, columns, rows, args.repeats)
    if args.models:
        batch = args.batch or BATCHES[device.type]["224"]
        columns = ["model", "", "", "plain images/s", "ours", "ratio"]
        rows = measure_models(batch, args.repeats, device)
        lines += show(f"Whole models at 224 px, batch {batch}, {where}", columns, rows, args.repeats)
    if speed:
        lines.append(f"Measured copy speed: {speed / 1e12:.2f} TB/s.")
    if args.out:
        args.out.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
