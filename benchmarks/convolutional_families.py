"""The convolution-heavy families beside what a user would otherwise run: ours, ours folded, and the other's.

    python benchmarks/convolutional_families.py [--models efficientvit] [--batch 8] [--size 224] [--repeats 15]
        [--channels-last] [--compile] [--out benchmarks/convolutional_families_cpu.md]

Whole models in evaluation, one process, medians of interleaved runs; on a GPU if there is one (bf16), else on the CPU
(float32). Absolute times of a shared machine prove nothing: read the ratios.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import time
from collections.abc import Callable
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


ROWS = [
    *(Row(f"efficientvit_msra_m{i}", f"efficientvit_m{i}") for i in range(6)),
    *(Row(f"efficientvit_mit_{size}", f"efficientvit_{size}") for size in ("b0", "b1", "b2", "b3", "l1", "l2", "l3")),
    *(Row(f"patnet_{size}", f"plain_patnet_{size}", "plain form") for size in ("t0", "t1", "t2", "s", "m", "l")),
    *(Row(f"partialnet_{size}", f"plain_partialnet_{size}", "plain form") for size in ("t0", "t1", "t2")),
]


def timed(step: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


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
    """Median seconds of a forward pass: rival, ours, ours folded; checks that they agree."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    torch.manual_seed(0)
    image = torch.randn(args.batch, 3, args.size, args.size, device=device, dtype=dtype).contiguous(
        memory_format=layout
    )
    rival, ours = wake(timm.create_model(row.rival), image.to("cpu", torch.float32)), timm.create_model(row.ours).eval()
    ours.load_state_dict(checkpoints.convert(rival.state_dict(), row.ours))  # the same weights
    models: dict[str, nn.Module] = {"rival": rival, "ours": ours, "folded": copy.deepcopy(ours).fuse()}
    models = {name: model.to(device, dtype, memory_format=layout) for name, model in models.items()}
    if dtype == torch.float32:
        expected = rival(image)
        for model in (ours, models["folded"]):
            torch.testing.assert_close(model(image), expected, rtol=0, atol=1e-2 * expected.std().item())
    if args.compile:
        models = {name: torch.compile(model) for name, model in models.items()}
    for model in models.values():  # warm up
        model(image)
        model(image)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(args.repeats):
        for name, model in models.items():
            times[name].append(timed(lambda m=model: m(image), device))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="", help="only rows whose name contains this")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, help="also write the table as Markdown")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    columns = ["model", "against", "its ms", "ours", "ratio", "ours folded", "ratio"]
    table_rows = []
    for row in track([r for r in ROWS if args.models in r.ours], "measuring", console=Console(stderr=True)):
        t = measure(row, args, device)
        cells = [row.ours, row.rival_is, f"{t['rival'] * 1e3:.1f}"]
        for ours in ("ours", "folded"):
            cells += [f"{t[ours] * 1e3:.1f}", f"{t['rival'] / t[ours]:.2f}x"]
        table_rows.append(cells)
    how = ", ".join(["compiled" if args.compile else "eager", *(["channels-last"] if args.channels_last else [])])
    title = (
        f"Convolution-heavy families at {args.size} px, batch {args.batch}, {how}, {where}, torch {torch.__version__}"
    )
    table = Table(title=title)
    for column in columns:
        table.add_column(column, no_wrap=True)
    for cells in table_rows:
        table.add_row(*cells)
    Console().print(table)
    if args.out:
        lines = ["| " + " | ".join(r) + " |" for r in (columns, ["---"] * len(columns), *table_rows)]
        args.out.write_text(f"# {title}\n\nMedians of {args.repeats} interleaved runs.\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
