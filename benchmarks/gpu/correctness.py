"""Part "correctness": every kernel and gradient against float64, as exact as PyTorch's own operators are.

What is allowed follows from the torch implementation in the same precision: twice its error, and a few roundings of the
largest value. Fresh memory is filled with NaN before, so an element that nobody writes shows; two runs must give the
same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import operators
from benchmarks.gpu.rows import Row, Store, Task

# batch, height, width, heads, head_dim, kernel, dilation, bias, fill
NA2D = [
    *((4, 56, 56, 2, 32, 7, d, True, False) for d in (1, 8)),
    *((4, 28, 28, 4, 32, 7, d, True, False) for d in (1, 4)),
    *((4, 14, 14, 8, 32, 7, d, True, False) for d in (1, 2)),
    (4, 7, 7, 16, 32, 7, 1, True, False),
    (2, 57, 43, 2, 32, 7, 2, True, False),
    (3, 5, 6, 1, 32, (3, 3), (2, 2), True, False),
    (1, 3, 9, 1, 16, (5, 3), (1, 2), True, False),
    (1, 4, 5, 1, 16, 7, 1, True, False),
    (1, 9, 10, 1, 24, (3, 5), 1, True, False),
    (2, 30, 41, 2, 64, (7, 3), 1, False, False),
    (1, 33, 17, 1, 128, 13, 1, True, False),
    (2, 10, 12, 2, 32, 7, 2, True, True),
]
# batch, height, width, heads, head_dim, regions, topk, fill
ROUTED = [
    (4, 56, 56, 2, 32, 7, 1, False),
    (4, 28, 28, 4, 32, 7, 4, False),
    (4, 14, 14, 8, 32, 7, 16, False),
    (4, 7, 7, 16, 32, 7, 49, False),
    (2, 64, 64, 2, 32, 8, 4, False),
    (1, 128, 128, 2, 32, 8, 1, False),
    (2, 63, 55, 3, 32, 7, 4, True),
    (2, 13, 12, 2, 32, 7, 9, True),
    (1, 7, 11, 2, 40, (2, 3), 2, False),
    (1, 9, 17, 1, 16, (1, 2), 1, False),
    (2, 3, 4, 1, 64, 1, 2, False),
    (1, 20, 24, 1, 128, (2, 3), 3, False),
]
# batch, height, width, channels, bias
DEPTHWISE = [(4, 56, 56, 64, True), (2, 14, 13, 96, False), (1, 1, 5, 40, True), (3, 7, 7, 384, True)]
# batch, height, width, heads, head_dim, value_dim, kernel, dilation, biases
MIX2D = [
    *((4, 14, 14, 8, 16, 16, kernel, 1, True) for kernel in (5, 13)),
    *((4, 7, 7, 12, 16, 16, kernel, 1, True) for kernel in (5, 7)),
    (2, 33, 25, 4, 16, 16, 13, 1, True),
    (1, 17, 9, 2, 32, 8, (3, 7), (2, 1), True),
    (1, 4, 5, 1, 24, 32, 7, 1, False),
]
CASES = {"na2d": NA2D, "routed": ROUTED, "mix2d": MIX2D, "depthwise": DEPTHWISE}
DRY = {"na2d": [(1, 5, 6, 1, 16, (3, 3), (2, 2), True, False)], "routed": [(1, 6, 6, 1, 16, 3, 2, False)],
       "mix2d": [(1, 4, 5, 1, 16, 16, 3, 1, True)], "depthwise": [(1, 4, 5, 24, True)]}  # fmt: skip
DTYPES = ("bfloat16", "float16", "float32")


def tasks(dry: bool, store: Store) -> list[Task]:
    code = operators.CODE | {"depthwise": ("kernels/depthwise", "kernels/triton_common.py")}
    return [
        Task(f"correctness/{op} {case} {dtype}", "correctness:check", dict(op=op, case=case, dtype=dtype, dry=dry),
             code[op])
        for dtype in (("float32",) if dry else DTYPES)
        for op, found in (DRY if dry else CASES).items()
        for case in found
    ]  # fmt: skip


def check(op: str, case: Sequence[Any], dtype: str, dry: bool) -> Iterator[Row | None]:
    """A row with the error of every result over what is allowed: `worst` above 1 is a failure."""
    yield None
    device = "cpu" if dry else "cuda"
    torch.manual_seed(0)
    call, tensors, names = MAKERS[op](case, device)
    low = getattr(torch, dtype)
    # A bias or fill stays float32, as in training; maps have the precision that is asked for.
    given = [t if t.ndim <= 3 and op in ("na2d", "mix2d") else t.to(low) for t in tensors]
    shape = call("torch", *(t.detach() for t in given)).shape
    grad = torch.randn(shape, device=device).to(low)
    found = _results(call, "triton", given, grad)
    again = _results(call, "triton", given, grad)
    naive = _results(call, "torch", given, grad)
    exact = _results(call, "torch", [t.double() for t in given], grad.double())
    rounding = torch.finfo(low).eps * max(e.abs().max().item() for e in exact)
    ratios = {}
    for name, f, n, e in zip(("result", *(f"gradient of {n}" for n in names)), found, naive, exact, strict=True):
        allowed = 2 * (n.double() - e).abs().max().item() + 4 * rounding
        error = (f.double() - e).abs().max().item()
        ratios[name] = error / allowed if error == error else float("inf")
    row: Row = dict(op=op, shape=list(case), dtype=dtype, worst=max(ratios.values()), ratios=ratios)
    row["same_bits"] = all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    if row["worst"] > 1 or not row["same_bits"]:
        wrong = [f"{name} {ratio:.2g} times what is allowed" for name, ratio in ratios.items() if ratio > 1]
        row["error"] = "; ".join(wrong) or "two runs differ"
    yield row


def _results(call: Callable[..., Tensor], impl: str, tensors: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    try:
        out = call(impl, *leaves)
        grads = torch.autograd.grad(out, leaves, grad, allow_unused=True, materialize_grads=True)
    finally:
        torch.use_deterministic_algorithms(False)
    return [out.detach(), *grads]


def _na2d(case: Sequence[Any], device: str) -> tuple[Callable[..., Tensor], list[Tensor], list[str]]:
    from hybridzoo.kernels import na2d

    batch, height, width, heads, head_dim, kernel, dilation, bias, fill = (_pair(n) for n in case)
    rows, columns = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    tensors = [torch.randn(batch, height, width, heads, head_dim, device=device) for _ in range(3)]
    names = ["query", "key", "value"]
    if bias:
        tensors.append(torch.randn(heads, 2 * rows - 1, 2 * columns - 1, device=device))
        names.append("bias")
    if fill:
        tensors.append(torch.randn(2, heads, head_dim, device=device))
        names.append("fill")

    def call(impl: str, *t: Tensor) -> Tensor:
        more = dict(zip([n.replace("bias", "rpb") for n in names[3:]], t[3:], strict=True))
        return na2d(*t[:3], kernel, dilation, impl=impl, **more)

    return call, tensors, names


def _routed(case: Sequence[Any], device: str) -> tuple[Callable[..., Tensor], list[Tensor], list[str]]:
    from hybridzoo.kernels import routed_attention2d

    batch, height, width, heads, head_dim, regions, topk, fill = (_pair(n) for n in case)
    count = regions[0] * regions[1] if isinstance(regions, tuple) else regions**2
    routes = torch.randint(0, count, (batch, count, topk), device=device)
    tensors = [torch.randn(batch, height, width, heads, head_dim, device=device) for _ in range(3)]
    if fill:
        tensors.append(torch.randn(2, heads, head_dim, device=device))

    def call(impl: str, *t: Tensor) -> Tensor:
        return routed_attention2d(*t[:3], routes, regions, fill=t[3] if fill else None, impl=impl)

    return call, tensors, ["query", "key", "value", "fill"][: len(tensors)]


def _depthwise(case: Sequence[Any], device: str) -> tuple[Callable[..., Tensor], list[Tensor], list[str]]:
    from hybridzoo.kernels import dynamic_depthwise_conv2d

    batch, height, width, channels, bias = case
    tensors = [torch.randn(batch, height, width, channels, device=device)]
    tensors.append(torch.randn(batch, channels, 9, device=device))
    if bias:
        tensors.append(torch.randn(batch, channels, device=device))

    def call(impl: str, *t: Tensor) -> Tensor:
        return dynamic_depthwise_conv2d(*t, impl=impl)

    return call, tensors, ["maps", "kernels", "bias"][: len(tensors)]


def _mix2d(case: Sequence[Any], device: str) -> tuple[Callable[..., Tensor], list[Tensor], list[str]]:
    from hybridzoo.kernels import neighborhood_mix2d

    batch, height, width, heads, head_dim, value_dim, kernel, dilation, biases = (_pair(n) for n in case)
    rows, columns = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    tensors = [torch.randn(batch, height, width, heads, head_dim, device=device)]
    tensors.append(torch.randn(batch, heads, rows * columns, head_dim, device=device))
    tensors.append(torch.randn(batch, height, width, heads, value_dim, device=device))
    names = ["query", "taps", "value"]
    if biases:
        tensors.append(torch.randn(heads, rows * columns, device=device))
        tensors.append(torch.randn(heads, 2 * rows - 1, 2 * columns - 1, device=device))
        names += ["tap_bias", "rpb"]

    def call(impl: str, *t: Tensor) -> Tensor:
        return neighborhood_mix2d(*t[:3], kernel, dilation, impl=impl, **dict(zip(names[3:], t[3:], strict=True)))

    return call, tensors, names


MAKERS = {"na2d": _na2d, "routed": _routed, "mix2d": _mix2d, "depthwise": _depthwise}


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
