"""The convolution-heavy families beside what a user would otherwise run: ours, ours folded, a training step.

    python benchmarks/convolutional_families.py [--threads 2] [--out benchmarks/convolutional_families_cpu.md]
        [--models efficientvit] [--all] [--batch 8] [--size 224] [--seconds 6] [--compile]

Whole models with the same weights, in one process, medians of interleaved runs. On the CPU in float32 and NCHW; on a
GPU, if there is one, in bfloat16 with channels last. First all three networks are checked to agree in float32.
Absolute times of a shared machine prove nothing: read the ratios.

On one thread PyTorch multiplies 1x1 convolutions image by image, on more it leaves them to oneDNN: ratios differ.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import patnet_plain  # noqa: F401  (registers the plain form of PATNet)
import timm
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import hybridzoo  # noqa: F401
from hybridzoo import checkpoints


@dataclasses.dataclass(frozen=True)
class Row:
    """One of our models and its rival, both as `timm.create_model` knows them."""

    ours: str
    rival: str
    rival_is: str = "timm's port"


def _rows(ours: str, rival: str, sizes: str, rival_is: str = "timm's port") -> list[Row]:
    return [Row(ours + size, rival + size, rival_is) for size in sizes.split()]


ROWS = [
    *_rows("efficientvit_msra_", "efficientvit_", "m0 m1 m2 m3 m4 m5"),
    *_rows("efficientvit_mit_", "efficientvit_", "b0 b1 b2 b3 l1"),
    *_rows("patnet_", "plain_patnet_", "t0 t1 t2 s", "plain form"),
    *_rows("partialnet_", "plain_partialnet_", "t0 t1 t2", "plain form"),
]
HEAVY_ROWS = [  # minutes each on a CPU; alike in structure
    *_rows("efficientvit_mit_", "efficientvit_", "l2 l3"),
    *_rows("patnet_", "plain_patnet_", "m l", "plain form"),
]


def timed(step: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(steps: dict[str, Callable[[], object]], seconds: float, device: torch.device) -> dict[str, float]:
    """Median seconds of each step after two runs to warm up; in turns, at least three, until `seconds` have passed."""
    for step in steps.values():
        step()
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    start = time.perf_counter()
    while (done := len(next(iter(times.values())))) < 3 or (done < 50 and time.perf_counter() - start < seconds):
        for name, step in steps.items():
            times[name].append(timed(step, device))
    return {name: statistics.median(values) for name, values in times.items()}


@torch.enable_grad()
def train_step(model: nn.Module, image: Tensor) -> None:
    """Forward and backward, without the optimizer."""
    model.zero_grad()
    model(image).float().square().mean().backward()


def wake(model: nn.Module, image: Tensor) -> nn.Module:
    """Give a fresh model activations of ordinary size: untrained ones fade into denormal numbers, which are slow."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.ones_(module.weight)  # residual branches start at zero
            module.momentum = 1.0
    model.train()(image)
    return model.eval()


@torch.no_grad()
def measure(row: Row, args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Median seconds of a forward pass and of a training step; asserts first that the networks agree."""
    cuda = device.type == "cuda"
    dtype, layout = (torch.bfloat16, torch.channels_last) if cuda else (torch.float32, torch.contiguous_format)
    torch.manual_seed(0)
    image = torch.randn(args.batch, 3, args.size, args.size, device=device)
    with device:
        rival, ours = timm.create_model(row.rival), timm.create_model(row.ours).eval()
    wake(rival, image)
    ours.load_state_dict(checkpoints.convert(rival.state_dict(), row.ours))  # the same weights
    models: dict[str, nn.Module] = {"rival": rival, "ours": ours, "folded": copy.deepcopy(ours).fuse()}
    expected = rival(image)
    for name in ("ours", "folded"):
        error = (models[name](image) - expected).abs().max().item() / expected.std().item()
        assert error < 5e-2, f"{row.ours}, {name}: {error:.1e} of the logits' deviation away from {row.rival}"
    image = image.to(dtype, memory_format=layout)
    models = {name: model.to(device, dtype, memory_format=layout) for name, model in models.items()}
    if args.compile:
        models = {name: torch.compile(model) for name, model in models.items()}
    steps = {name: partial(model, image) for name, model in models.items()}
    result = medians(steps, args.seconds, device)
    training = {name: partial(train_step, models[name].train(), image) for name in ("rival", "ours")}
    return result | {f"{name} step": t for name, t in medians(training, args.seconds, device).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="", help="only rows whose name contains this")
    parser.add_argument("--all", action="store_true", help="the largest models too")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=6.0, help="of measuring, for each half of a row")
    parser.add_argument("--threads", type=int, help="of a CPU; PyTorch's choice by default")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, help="also write the table as Markdown")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cpu = f"CPU, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}, float32"
    where = f"{torch.cuda.get_device_name()}, bfloat16 channels-last" if device.type == "cuda" else cpu
    columns = ["model", "against", "its ms", "ours", "folded", "its step ms", "ours, step"]
    rows = [row for row in ROWS + (HEAVY_ROWS if args.all else []) if args.models in row.ours]
    table_rows = []
    for row in track(rows, "measuring", console=Console(stderr=True)):
        t = measure(row, args, device)
        ratios = {name: f"{t['rival'] / t[name]:.2f}x" for name in ("ours", "folded")}
        step, its_step = t["ours step"], t["rival step"]
        times = [f"{t['rival'] * 1e3:.1f}", *ratios.values(), f"{its_step * 1e3:.1f}", f"{its_step / step:.2f}x"]
        table_rows.append([row.ours, row.rival_is, *times])
    how = "compiled" if args.compile else "eager"
    title = f"Convolution-heavy families: {args.size} px, batch {args.batch}, {how}, {where}, torch {torch.__version__}"
    table = Table(title=title)
    for column in columns:
        table.add_column(column, no_wrap=True)
    for cells in table_rows:
        table.add_row(*cells)
    Console(width=120).print(table)
    if args.out:
        lines = ["| " + " | ".join(r) + " |" for r in (columns, ["---"] * len(columns), *table_rows)]
        words = "How many times faster than the other: forward as created, folded by `fuse()`, and forward + backward."
        args.out.write_text(f"# {title}\n\n{words}\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
