"""The operators at the paper's shapes: inputs, the forms that compute the same, and the least that must be done.

Batch 128, bfloat16, 224 pixels: DiNAT-T's four stages with their dilations (head_dim 32, kernel 7, with a bias),
BiFormer-S's (head_dim 32, 7 x 7 regions; one of 8 x 8 at 512 pixels), the windows of OverLoCK-T's two (head_dim 16,
both biases), and the one of OverLoCK-XT whose head_dim is 14. A dry run takes a small map and one image, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

HEAD_DIM = 32
NA2D = [(56, 2, 1), (56, 2, 8), (28, 4, 1), (28, 4, 4), (14, 8, 1), (14, 8, 2), (7, 16, 1)]  # side, heads, dilation
ROUTED = [(56, 2, 1), (28, 4, 4), (14, 8, 16), (7, 16, 49)]  # side, heads, regions attended to
# BiFormer-S's first stage in a segmentation network at 512 pixels: regions of 256 tokens
LARGE = dict(side=128, heads=2, topk=1, regions=8)
MIX2D = [
    (14, 8, 16, 13),
    (14, 8, 16, 5),
    (7, 16, 16, 7),
    (7, 16, 16, 5),
    (7, 12, 14, 7),
]  # side, heads, head_dim, kernel
SHAPES = {"na2d": NA2D, "routed": ROUTED, "mix2d": MIX2D}
AXES = {
    "na2d": ("side", "heads", "dilation"),
    "routed": ("side", "heads", "topk"),
    "mix2d": ("side", "heads", "head_dim", "kernel"),
}
DRY = {"na2d": [(5, 1, 1), (3, 1, 1)], "routed": [(4, 1, 1), (2, 1, 3)], "mix2d": [(3, 1, 16, 3)]}
# In order of worth. "sdpa, all tokens" is another function: what one would run without routing.
FORMS = {
    "na2d": ("ours", "sdpa, same mask and bias", "gather", "torch"),
    "routed": ("ours", "auto", "sdpa, all tokens", "sdpa, same mask", "gather"),
    "mix2d": ("ours", "gather", "torch"),
}
MOST_WRITTEN = 4 << 30  # bytes of scores or of a mask that a form may write
Function = Callable[..., Tensor]


class Case(NamedTuple):
    """One operator at one shape."""

    op: str  # of `SHAPES`
    shape: dict[str, int]
    leaves: list[Tensor]  # packed projection, and the bias of na2d; all that mix2d is given
    call: Callable[[Function], Tensor]  # forward, with a form of the operator
    grad: Tensor
    forms: dict[str, Callable[[], Function]]  # by name; made when used, for that may take a compiler

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, self.leaves, self.grad)


def shapes(op: str, dry: bool) -> list[dict[str, int]]:
    found = [dict(zip(AXES[op], numbers, strict=True)) for numbers in (DRY if dry else SHAPES)[op]]
    return [*found, LARGE] if op == "routed" and not dry else found


def label(op: str, shape: dict[str, int]) -> str:
    rest = ", ".join(f"{name.replace('topk', 'top')} {shape[name]}" for name in list(shape)[2:])
    return f"{op} {shape['side']}x{shape['side']}, {shape['heads']} heads, {rest}"


def work(op: str, shape: dict[str, int], batch: int, itemsize: int, dry: bool) -> dict[str, tuple[int, int]]:
    """Bytes and floating-point operations of a pass, by name; of both: every map once, no product twice.

    Forward reads query, key (of mix2d: the taps) and value and writes the result; backward reads those, the result and
    its gradient, and writes three gradients. Of a bias, nothing counts.
    """
    side, heads, head_dim = shape["side"], shape["heads"], shape.get("head_dim", HEAD_DIM)
    tokens = side * side
    one = batch * tokens * heads * head_dim * itemsize
    key = one
    if op == "routed":
        pairs = tokens * shape["topk"] * tokens // _regions(shape, dry) ** 2
    else:
        kernel, dilation = shape.get("kernel", 3 if dry else 7), shape.get("dilation", 1)
        members = [math.ceil((side - r) / dilation) for r in range(min(dilation, side))]
        pairs = sum(n * min(n, kernel) for n in members) ** 2
        if op == "mix2d":
            key = one * kernel * kernel // tokens
    products = 2 * batch * heads * pairs * head_dim
    return {"forward": (3 * one + key, 2 * products), "both": (9 * one + 3 * key, 7 * products)}


def written(op: str, shape: dict[str, int], form: str, way: str, batch: int) -> int:
    """Bytes as large as the map squared that a dense form writes: the gradient of a bias, the mask of every image."""
    square = batch * shape["side"] ** 4 * 2
    if form == "sdpa, same mask and bias" and way == "both":
        return square * shape["heads"]
    return square if form == "sdpa, same mask" else 0


def make(op: str, shape: dict[str, int], batch: int, dry: bool, seed: int = 0) -> Case:
    device, dtype = ("cpu", torch.float32) if dry else ("cuda", torch.bfloat16)
    torch.manual_seed(seed)
    if op == "mix2d":
        return _mix2d(shape, batch, dict(device=device, dtype=dtype))
    side, heads = shape["side"], shape["heads"]
    packed = torch.randn(batch, side, side, 3, heads, HEAD_DIM, device=device, dtype=dtype).requires_grad_()
    grad = torch.randn(batch, side, side, heads, HEAD_DIM, device=device, dtype=dtype)
    return (_na2d if op == "na2d" else _routed)(shape, packed, grad, dry)


def _na2d(shape: dict[str, int], packed: Tensor, grad: Tensor, dry: bool) -> Case:
    from hybridzoo.kernels import na2d_packed
    from hybridzoo.train.bench import forms

    kernel = 3 if dry else 7
    table = 2 * kernel - 1
    rpb = torch.randn(shape["heads"], table, table, device=packed.device, dtype=packed.dtype).requires_grad_()
    size, dilation = (shape["side"], shape["side"]), shape["dilation"]

    def by(impl: str) -> Function:
        return lambda qkv, rpb: na2d_packed(qkv, kernel, dilation, rpb=rpb, impl=impl)

    def apart(make: Callable[..., Function]) -> Callable[[], Function]:
        def made() -> Function:
            form = make(size, kernel, dilation, packed.device)
            return lambda qkv, rpb: form(*qkv.unbind(3), rpb)

        return made

    found: dict[str, Any] = {"ours": lambda: by("triton")}
    if not dry:
        found["torch"] = lambda: by("torch")
        found["gather"] = apart(forms.na2d_gather)
        found["sdpa, same mask and bias"] = apart(forms.na2d_dense)
        found["flex"] = apart(forms.na2d_flex)
    return Case("na2d", shape, [packed, rpb], lambda f: f(packed, rpb), grad, found)


def _routed(shape: dict[str, int], packed: Tensor, grad: Tensor, dry: bool) -> Case:
    from hybridzoo.kernels import routed_attention2d
    from hybridzoo.kernels.routed.grid import Grid
    from hybridzoo.train.bench import forms, routed_forms

    regions = _regions(shape, dry)
    grid = Grid.of(grad, regions, regions)
    scale = (shape["heads"] * HEAD_DIM) ** -0.5
    routes = torch.rand(len(grad), grid.regions, grid.regions, device=grad.device).topk(shape["topk"]).indices
    size = (shape["side"], shape["side"])

    def ours(impl: str) -> Function:
        return lambda q, k, v: routed_attention2d(q, k, v, routes, regions, scale=scale, impl=impl)

    def gather(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return routed_forms.gather(q, k, v, None, routes, grid, scale)

    def dense(mask: Tensor | None) -> Function:
        return lambda q, k, v: forms.dense_attention(q, k, v, mask, scale)

    region, seen = routed_forms.region_of(grid, *size, grad.device), routed_forms.seen(routes, grid)
    found: dict[str, Any] = {"ours": lambda: ours("triton"), "auto": lambda: ours("auto")}
    if not dry:
        found |= {"gather": lambda: gather, "sdpa, all tokens": lambda: dense(None)}
        found["sdpa, same mask"] = lambda: dense(seen[:, None, region[:, None], region[None]])
        found["flex"] = lambda: routed_forms.flex(seen, region, scale, size)
    return Case("routed", shape, [packed], lambda f: f(*packed.unbind(3)), grad, found)


def _regions(shape: dict[str, int], dry: bool) -> int:
    """Rows, and columns, of the grid of regions."""
    return 2 if dry else shape.get("regions", 7)


def _mix2d(shape: dict[str, int], batch: int, where: dict[str, Any]) -> Case:
    from hybridzoo.kernels import neighborhood_mix2d
    from hybridzoo.train.bench import forms

    side, heads, head_dim, kernel = shape.values()
    size, device = (batch, side, side, heads, head_dim), torch.device(where["device"])
    query, value, grad = (torch.randn(size, **where) for _ in range(3))
    taps = torch.randn(batch, heads, kernel * kernel, head_dim, **where)
    tables = [torch.randn(heads, kernel * kernel, device=device)]  # float32, as in training
    tables.append(torch.randn(heads, 2 * kernel - 1, 2 * kernel - 1, device=device))
    leaves = [t.requires_grad_() for t in (query, taps, value, *tables)]

    def by(impl: str) -> Function:
        return lambda q, t, v, bias, rpb: neighborhood_mix2d(q, t, v, kernel, tap_bias=bias, rpb=rpb, impl=impl)

    found = {
        "ours": lambda: by("triton"),
        "gather": lambda: forms.mix_gather((side, side), kernel, device),
        "torch": lambda: by("torch"),
    }
    return Case("mix2d", shape, leaves, lambda f: f(*leaves), grad, found)


def batches(op: str, dry: bool) -> int:
    return 1 if dry else 128


def walk(dry: bool) -> Iterator[tuple[str, dict[str, int]]]:
    for op in SHAPES:
        for shape in shapes(op, dry):
            yield op, shape


def small_first(dry: bool) -> list[tuple[str, dict[str, int]]]:
    return sorted(walk(dry), key=lambda pair: pair[1]["side"])
