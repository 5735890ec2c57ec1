"""Find the fastest block sizes of the Triton kernels of routed attention on this GPU.

    python benchmarks/tune_routed.py --out routed.json [--head-dims 32] [--dtypes bfloat16] [--batch 128]

Use the result as it is, `HYBRIDZOO_ROUTED_CONFIGS=routed.json python train.py`, or copy the rows it prints into
`kernels/routed/triton_configs.py`. Times are medians of one kernel at a time, at BiFormer-S shapes for 224 pixels: the
sum of the first two stages (regions of 64 and 16 tokens, whose blocks and warps follow from one row of the table), and
the third stage (4 tokens) for the dense form.
"""

from __future__ import annotations

import itertools

import torch
import tune_common

from hybridzoo.kernels.routed import triton_configs, triton_impl
from hybridzoo.kernels.routed.grid import Grid

REGIONS = 7
STAGES = {False: ((56, 2, 1), (28, 4, 4)), True: ((14, 8, 16),)}  # by form, dense or not: side, heads, topk


def blocks(kind: str) -> list[tuple[int, int]]:
    return list(itertools.product((16, 32, 64, 128), repeat=2))


def milliseconds(kind: str, batch: int, head_dim: int, dtype: torch.dtype) -> float | None:
    """Median time of kernel `kind` under the table as it stands; None where it does not fit into the GPU."""
    total = 0.0
    for side, heads, topk in STAGES["dense" in kind]:
        torch.manual_seed(0)
        shape = (batch, side, side, heads, head_dim)
        query, key, value = torch.randn(batch, side, side, 3, heads, head_dim, device="cuda", dtype=dtype).unbind(3)
        routes = torch.rand(batch, REGIONS**2, REGIONS**2, device="cuda").topk(topk).indices
        grad, out = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(2))
        lse = torch.empty(shape[:4], device="cuda")
        inputs = query, key, value, routes, None, out, lse
        where = Grid.of(query, REGIONS, REGIONS), (heads * head_dim) ** -0.5
        launches = triton_impl.forward_launches(*inputs, *where)
        outputs = [torch.empty_like(grad) for _ in range(3)]
        launches += triton_impl.backward_launches(grad, *inputs, *outputs, *where)[0]
        time = tune_common.time_kernel(kind.removesuffix("_dense"), launches)
        if time is None:
            return None
        total += time
    return total


if __name__ == "__main__":
    tune_common.main(
        __doc__,
        triton_configs.TABLE,
        triton_configs.pick,
        triton_configs.KINDS,
        "HYBRIDZOO_ROUTED_CONFIGS",
        blocks,
        milliseconds,
    )
