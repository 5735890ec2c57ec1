"""Routed attention at BiFormer-S shapes: ours beside the published gather formulation, and the layer's share of memory.

    python benchmarks/routed_attention.py [--batch 8] [--repeats 15] [--out benchmarks/routed_attention_cpu.md]

One process, medians of interleaved runs; on a GPU if there is one (bf16), else on the CPU (float32). Absolute times of
a shared machine prove nothing: read the ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from hybridzoo.kernels import routed_attention2d

REGIONS = 7
SHAPES = {  # BiFormer-S at 224 px: side, heads, topk; head_dim 32
    "stage 1": (56, 2, 1),
    "stage 2": (28, 4, 4),
    "stage 3": (14, 8, 16),
}


def gather_formulation(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, scale: float) -> Tensor:
    """The way of the published code: partition, expand keys and values over all query regions, gather, attend."""
    batch, side, _, heads, dim = q.shape
    size, count, topk = side // REGIONS, REGIONS**2, routes.shape[2]
    tokens, channels = size * size, heads * dim

    def partition(x: Tensor) -> Tensor:
        x = x.reshape(batch, REGIONS, size, REGIONS, size, channels)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(batch, count, tokens, channels)

    query, both = partition(q), torch.cat([partition(k), partition(v)], dim=-1)
    expanded = both[:, None].expand(-1, count, -1, -1, -1)
    index = routes[..., None, None].expand(-1, -1, -1, tokens, 2 * channels)
    key, value = torch.gather(expanded, 2, index).split(channels, dim=-1)
    key = key.reshape(batch * count, topk * tokens, heads, dim).permute(0, 2, 3, 1)
    value = value.reshape(batch * count, topk * tokens, heads, dim).transpose(1, 2)
    query = query.reshape(batch * count, tokens, heads, dim).transpose(1, 2)
    out = ((query * scale) @ key).softmax(-1) @ value
    out = out.transpose(1, 2).reshape(batch, REGIONS, REGIONS, size, size, channels).transpose(2, 3)
    return out.reshape(batch, side, side, heads, dim)


def ours(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, scale: float) -> Tensor:
    return routed_attention2d(q, k, v, routes, REGIONS, scale=scale)


def timed(step: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(side: int, heads: int, topk: int, batch: int, repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of both formulations, forward and forward + backward; checks that they agree."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    packed = torch.randn(batch, side, side, 3, heads, 32, device=device, dtype=dtype, requires_grad=True)
    routes = torch.rand(batch, REGIONS**2, REGIONS**2, device=device).topk(topk).indices
    scale = (heads * 32) ** -0.5
    grad = torch.randn(batch, side, side, heads, 32, device=device, dtype=dtype)

    def forward(function: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad():
            return function(*packed.unbind(3), routes, scale)

    def both_ways(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*packed.unbind(3), routes, scale), packed, grad)

    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(forward(ours), forward(gather_formulation), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(both_ways(ours), both_ways(gather_formulation), rtol=tolerance, atol=tolerance)
    times: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, function in (("gather", gather_formulation), ("ours", ours)):
            times.setdefault(f"{name} forward", []).append(timed(lambda f=function: forward(f), device))
            times.setdefault(f"{name} both", []).append(timed(lambda f=function: both_ways(f), device))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="also write the table as Markdown")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    columns = ["shape", "map", "heads", "top-k", "gather fwd ms", "ours", "ratio", "gather fwd+bwd ms", "ours", "ratio"]
    rows = []
    for name, (side, heads, topk) in track(SHAPES.items(), "measuring", console=Console(stderr=True)):
        t = measure(side, heads, topk, args.batch, args.repeats, device)
        cells = [name, f"{side}x{side}", str(heads), str(topk)]
        for way in ("forward", "both"):
            slow, fast = t[f"gather {way}"], t[f"ours {way}"]
            cells += [f"{slow * 1e3:.1f}", f"{fast * 1e3:.1f}", f"{slow / fast:.1f}x"]
        rows.append(cells)
    title = f"Routed attention, BiFormer-S at 224 px, batch {args.batch}, {where}, torch {torch.__version__}"
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    if args.out:
        lines = ["| " + " | ".join(r) + " |" for r in (columns, ["---"] * len(columns), *rows)]
        args.out.write_text(f"# {title}\n\nMedians of {args.repeats} interleaved runs.\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
