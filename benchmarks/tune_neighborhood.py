"""Find the fastest block sizes of the Triton kernels of neighborhood attention on this GPU.

    python benchmarks/tune_neighborhood.py --out na2d.json [--head-dims 32] [--dtypes bfloat16] [--batch 128]

Use the result as it is, `HYBRIDZOO_NA2D_CONFIGS=na2d.json python train.py`, or copy the rows it prints into
`kernels/neighborhood/triton_configs.py`. Times are medians of one kernel at a time, at the shapes of DiNAT's first
stage (56 x 56 tokens, 2 heads, kernel 7, dilation 1, and 8 for the dense kernels), with a bias.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from pathlib import Path

import torch
import triton
from rich.console import Console
from rich.progress import track

from hybridzoo.kernels.neighborhood import triton_configs, triton_impl
from hybridzoo.kernels.neighborhood.triton_configs import Config

SIDE, HEADS, KERNEL = 56, 2, 7


def candidates(kind: str) -> list[Config]:
    """What is worth trying: 8 to 64 scores per thread."""
    blocks = [(64, 64)] if "dense" in kind else list(itertools.product((16, 32, 64, 128), (16, 32, 64)))
    return [
        Config(queries, keys, warps, stages)
        for queries, keys in blocks
        for warps in (1, 2, 4, 8)
        if 8 <= queries * keys / (32 * warps) <= 64
        for stages in (1, 2, 3)
    ]


def milliseconds(kind: str, config: Config, batch: int, head_dim: int, dtype: torch.dtype) -> float | None:
    """Median time of kernel `kind` under `config`; None where it does not fit into the GPU."""
    triton_configs.TABLE[kind, triton.next_power_of_2(head_dim), dtype.itemsize] = config
    shape, dilation = (batch, SIDE, SIDE, HEADS, head_dim), 8 if "dense" in kind else 1
    torch.manual_seed(0)
    query, key, value = torch.randn(batch, SIDE, SIDE, 3, HEADS, head_dim, device="cuda", dtype=dtype).unbind(3)
    rpb = torch.randn(HEADS, 2 * KERNEL - 1, 2 * KERNEL - 1, device="cuda")
    grad = torch.randn(shape, device="cuda", dtype=dtype)
    where = (KERNEL, KERNEL), (dilation, dilation), head_dim**-0.5
    out, lse = triton_impl.forward(query, key, value, rpb, *where)
    launches = [triton_impl.forward_launch(query, key, value, rpb, out, lse, *where)]
    outputs = [torch.empty_like(grad) for _ in range(3)]
    launches += triton_impl.backward_launches(grad, query, key, value, rpb, out, lse, *outputs, *where)[0]
    try:
        for launch in launches:  # in order: the later ones read what the earlier ones leave
            launch.run()
        (launch,) = (launch for launch in launches if launch.kernel.__name__ == kind)
        return triton.testing.do_bench(launch.run, return_mode="median")
    except triton.runtime.errors.OutOfResources:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[32], choices=(32, 64, 128))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--kinds", nargs="+", default=triton_configs.KINDS, choices=triton_configs.KINDS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("tuning takes a GPU, and PyTorch finds none here")
    if os.environ.get("HYBRIDZOO_NA2D_CONFIGS"):
        parser.error("unset HYBRIDZOO_NA2D_CONFIGS: it would come before every candidate")

    console = Console()
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    found: dict[str, list[int]] = {}
    for dtype_name, head_dim, kind in itertools.product(args.dtypes, args.head_dims, args.kinds):
        dtype = getattr(torch, dtype_name)
        before = triton_configs.pick(kind, head_dim, dtype.itemsize)
        key = kind, head_dim, dtype.itemsize
        times: dict[Config, float] = {}
        trials = [before, *(c for c in candidates(kind) if c != before)]
        for config in track(trials, f"{kind} {head_dim} {dtype_name}", console=console, transient=True):
            time = milliseconds(kind, config, args.batch, head_dim, dtype)
            if time is not None:
                times[config] = time
        best = min(times, key=lambda config: times[config])
        triton_configs.TABLE[key] = best
        gain = times[before] / times[best] if before in times else float("nan")
        numbers = best.queries, best.keys, best.warps, best.stages
        console.print(
            f"    {key!r}: Config{numbers},  # {times[best] * 1e3:.0f} us, {gain:.2f} times as fast as before"
        )
        found[",".join(map(str, key))] = list(numbers)
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
