"""Find the fastest block sizes of the Triton kernels of neighborhood attention on this GPU.

    python benchmarks/tune_neighborhood.py --out na2d.json [--head-dims 32] [--dtypes bfloat16] [--batch 128]

Use the result as it is, `HYBRIDZOO_NA2D_CONFIGS=na2d.json python train.py`, or copy the rows it prints into
`kernels/neighborhood/triton_configs.py`. Times are medians of one kernel at a time, at the shapes of DiNAT's first
stage (56 x 56 tokens, 2 heads, kernel 7, dilation 1, and 8 for the dense kernels), with a bias.
"""

from __future__ import annotations

import itertools

import torch
import tune_common

from hybridzoo.kernels.neighborhood import triton_configs, triton_impl

SIDE, HEADS, KERNEL = 56, 2, 7


def blocks(kind: str) -> list[tuple[int, int]]:
    return [(64, 64)] if "dense" in kind else list(itertools.product((16, 32, 64, 128), (16, 32, 64)))


def milliseconds(kind: str, batch: int, head_dim: int, dtype: torch.dtype) -> float | None:
    """Median time of kernel `kind` under the table as it stands; None where it does not fit into the GPU."""
    shape, dilation = (batch, SIDE, SIDE, HEADS, head_dim), 8 if "dense" in kind else 1
    torch.manual_seed(0)
    query, key, value = torch.randn(batch, SIDE, SIDE, 3, HEADS, head_dim, device="cuda", dtype=dtype).unbind(3)
    rpb = torch.randn(HEADS, 2 * KERNEL - 1, 2 * KERNEL - 1, device="cuda")
    grad, out = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(2))
    lse = torch.empty(shape[:4], device="cuda")
    where = (KERNEL, KERNEL), (dilation, dilation), head_dim**-0.5
    launches = [triton_impl.forward_launch(query, key, value, rpb, out, lse, *where)]
    outputs = [torch.empty_like(grad) for _ in range(3)]
    launches += triton_impl.backward_launches(grad, query, key, value, rpb, out, lse, *outputs, *where)[0]
    return tune_common.time_kernel(kind, launches)


if __name__ == "__main__":
    tune_common.main(
        __doc__,
        triton_configs.TABLE,
        triton_configs.pick,
        triton_configs.KINDS,
        "HYBRIDZOO_NA2D_CONFIGS",
        blocks,
        milliseconds,
    )
