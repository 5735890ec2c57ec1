"""Our operators at the papers' shapes: inputs, and other implementations that compute the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hybridzoo.train.bench import forms, routed_forms
from hybridzoo.train.bench.forms import Function
from hybridzoo.train.bench.ops import LAYERS

HEAD_DIM = 32
NA2D_KERNEL = 7
Shape = dict[str, int]


class Form(NamedTuple):
    """One way to compute an operator.

    Attributes:
        make: returns the function; this may compile it.
        same: it computes the same result as ours.
        needs: about the bytes of its largest temporary.
    """

    make: Callable[[], Function]
    same: bool = True
    needs: int = 0


class Case(NamedTuple):
    """One operator at one shape.

    Attributes:
        leaves: tensors that get gradients in the backward pass.
        call: the forward pass with a form's function.
        grad: gradient of the result.
        forms: name -> form, ours first.
    """

    op: str
    shape: Shape
    leaves: list[Tensor]
    call: Callable[[Function], Tensor]
    grad: Tensor
    forms: dict[str, Form]

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, self.leaves, self.grad, allow_unused=True)


def _stages(size: tuple[int, int], count: int = 4) -> Iterator[tuple[int, int]]:
    """Heights and widths of the maps at strides 4, 8, 16, 32."""
    for stride in (4, 8, 16, 32)[:count]:
        yield -(-size[0] // stride), -(-size[1] // stride)


def _na2d_shapes(size: tuple[int, int]) -> Iterator[Shape]:
    """DiNAT-T's shapes: local, and with the largest dilation that fits."""
    for (height, width), heads in zip(_stages(size), (2, 4, 8, 16), strict=True):
        if min(height, width) >= NA2D_KERNEL:
            for dilation in dict.fromkeys((1, min(height, width) // NA2D_KERNEL)):
                yield dict(height=height, width=width, heads=heads, dilation=dilation)


def _routed_shapes(size: tuple[int, int]) -> Iterator[Shape]:
    """BiFormer-T's and -S's shapes; regions: 7 x 7 in classifiers, 8 x 8 at 512 px, 16 x 16 in detectors."""
    regions = 7 if min(size) < 512 else 8 if min(size) < 800 else 16
    for (height, width), heads, topk in zip(_stages(size, 3), (2, 4, 8), (1, 4, 16), strict=True):
        yield dict(height=height, width=width, heads=heads, topk=topk, regions=regions)


def _mix_shapes(size: tuple[int, int]) -> Iterator[Shape]:
    """OverLoCK-XT's Focus-Net: a large and a small window in each of its two stages."""
    maps = list(_stages(size))[2:]
    for (height, width), heads, head_dim, kernel in zip(maps, (8, 12), (16, 14), (13, 7), strict=True):
        for window in (kernel, 5):
            if min(height, width) >= window:
                yield dict(height=height, width=width, heads=heads, head_dim=head_dim, kernel=window)


def _channel_shapes(size: tuple[int, int], widths: tuple[int, ...]) -> Iterator[Shape]:
    for (height, width), channels in zip(_stages(size, len(widths)), widths, strict=True):
        yield dict(height=height, width=width, channels=channels)


SHAPES: dict[str, Callable[[tuple[int, int]], Iterator[Shape]]] = {
    "na2d": _na2d_shapes,
    "routed": _routed_shapes,
    "mix": _mix_shapes,
    "depthwise": lambda size: _channel_shapes(size, (96, 192, 384)),  # InLine-Swin-T
    "dat": lambda size: iter([s for i, s in enumerate(_channel_shapes(size, (64, 128, 384))) if i != 1]),
    "merging": lambda size: _channel_shapes(size, (96, 192, 384)),  # LITv2-S
    "ravlt": lambda size: _channel_shapes(size, (64, 128, 256)),  # RAVLT-T
}


def shapes(op: str, size: tuple[int, int] = (224, 224)) -> list[Shape]:
    """The operator's shapes in its paper's network, for images of `size` (height, width)."""
    return list(SHAPES[op](size))


def make(
    op: str, shape: Shape, batch: int, device: str, dtype: torch.dtype, impl: str = "auto", flex: bool = False
) -> Case:
    """Random inputs of a shape, the same in every call.

    Args:
        op: a key of `SHAPES`.
        shape: one of `shapes`.
        batch: images.
        device, dtype: of the inputs.
        impl: implementation of our operator.
        flex: include FlexAttention.
    """
    torch.manual_seed(0)
    made = {"na2d": _na2d, "routed": _routed, "mix": _mix, "depthwise": _depthwise}
    if op in LAYERS:
        return _layer(op, shape, batch, device, dtype)
    return made[op](shape, batch, dict(device=torch.device(device), dtype=dtype), impl, flex)


def _packed(shape: Shape, batch: int, where: dict[str, Any]) -> tuple[Tensor, Tensor]:
    size = (batch, shape["height"], shape["width"])
    packed = torch.randn(*size, 3, shape["heads"], HEAD_DIM, **where).requires_grad_()
    return packed, torch.randn(*size, shape["heads"], HEAD_DIM, **where)


def _na2d(shape: Shape, batch: int, where: dict[str, Any], impl: str, flex: bool) -> Case:
    from hybridzoo.kernels import na2d_packed

    packed, grad = _packed(shape, batch, where)
    kernel, dilation = shape.get("kernel", NA2D_KERNEL), shape["dilation"]
    rpb = torch.randn(shape["heads"], 2 * kernel - 1, 2 * kernel - 1, **where).requires_grad_()
    map_size, device = (shape["height"], shape["width"]), where["device"]

    def ours(qkv: Tensor, rpb: Tensor) -> Tensor:  # what the layer calls
        return na2d_packed(qkv, kernel, dilation, rpb=rpb, impl=impl)

    def unpacked(make: Callable[..., Function]) -> Callable[[], Function]:
        def made() -> Function:
            form = make(map_size, kernel, dilation, device)
            return lambda qkv, rpb: form(*qkv.unbind(3), rpb)

        return made

    square = shape["heads"] * (map_size[0] * map_size[1]) ** 2 * grad.element_size()
    found = {"ours": Form(lambda: ours), "gather": Form(unpacked(forms.na2d_gather), True, 4 * 49 * grad.nbytes)}
    found["dense"] = Form(unpacked(forms.na2d_dense), True, 4 * square)
    if flex:
        found["flex"] = Form(unpacked(forms.na2d_flex))
    return Case("na2d", shape, [packed, rpb], lambda f: f(packed, rpb), grad, found)


def _routed(shape: Shape, batch: int, where: dict[str, Any], impl: str, flex: bool) -> Case:
    from hybridzoo.kernels import routed_attention2d
    from hybridzoo.kernels.routed.grid import Grid

    packed, grad = _packed(shape, batch, where)
    map_size = (shape["height"], shape["width"])
    grid = Grid.of(grad, shape["regions"], shape["regions"])
    scale = (shape["heads"] * HEAD_DIM) ** -0.5
    routes = torch.rand(batch, grid.regions, grid.regions, device=where["device"]).topk(shape["topk"]).indices
    fill, leaves = None, [packed]
    if any(grid.beyond(grad)):
        fill = torch.randn(2, shape["heads"], HEAD_DIM, **where).requires_grad_()
        leaves.append(fill)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return routed_attention2d(q, k, v, routes, grid[:2], fill=fill, scale=scale, impl=impl)

    def gather(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return routed_forms.gather(q, k, v, fill, routes, grid, scale)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return forms.dense_attention(q, k, v, None, scale)

    scores = batch * shape["heads"] * (map_size[0] * map_size[1]) ** 2 * grad.element_size()
    found = {"ours": Form(lambda: ours), "gather": Form(lambda: gather, True, 2 * grid.regions * grad.nbytes)}
    found["dense, all tokens"] = Form(lambda: dense, False, scores)
    if flex and fill is None:
        region, seen = routed_forms.region_of(grid, *map_size, grad.device), routed_forms.seen(routes, grid)
        found["flex"] = Form(lambda: routed_forms.flex(seen, region, scale, map_size))
    return Case("routed", shape, leaves, lambda f: f(*packed.unbind(3)), grad, found)


def _mix(shape: Shape, batch: int, where: dict[str, Any], impl: str, flex: bool) -> Case:
    from hybridzoo.kernels import neighborhood_mix2d

    heads, head_dim, kernel = shape["heads"], shape["head_dim"], shape["kernel"]
    size = (shape["height"], shape["width"])
    query, value, grad = (torch.randn(batch, *size, heads, head_dim, **where) for _ in range(3))
    taps = torch.randn(batch, heads, kernel * kernel, head_dim, **where)
    tap_bias = torch.randn(heads, kernel * kernel, **where)
    rpb = torch.randn(heads, 2 * kernel - 1, 2 * kernel - 1, **where)
    leaves = [t.requires_grad_() for t in (query, taps, value, tap_bias, rpb)]

    def ours(query: Tensor, taps: Tensor, value: Tensor, tap_bias: Tensor, rpb: Tensor) -> Tensor:
        return neighborhood_mix2d(query, taps, value, kernel, tap_bias=tap_bias, rpb=rpb, impl=impl)

    found = {"ours": Form(lambda: ours)}
    gather = lambda: forms.mix_gather(size, kernel, where["device"])  # noqa: E731
    found["gather"] = Form(gather, True, 3 * kernel * kernel * grad.nbytes)
    return Case("mix", shape, leaves, lambda f: f(*leaves), grad, found)


def _depthwise(shape: Shape, batch: int, where: dict[str, Any], impl: str, flex: bool) -> Case:
    from hybridzoo.kernels import dynamic_depthwise_conv2d

    channels = shape["channels"]
    x, grad = (torch.randn(batch, shape["height"], shape["width"], channels, **where) for _ in range(2))
    kernels, bias = torch.randn(batch, channels, 9, **where), torch.randn(batch, channels, **where)
    leaves = [t.requires_grad_() for t in (x, kernels, bias)]

    def ours(x: Tensor, kernels: Tensor, bias: Tensor) -> Tensor:
        return dynamic_depthwise_conv2d(x, kernels, bias, impl=impl)

    found = {"ours": Form(lambda: ours), "grouped convolution": Form(lambda: forms.depthwise_grouped)}
    found["unfold"] = Form(lambda: forms.depthwise_unfold, True, 9 * x.nbytes)
    return Case("depthwise", shape, leaves, lambda f: f(*leaves), grad, found)


def _layer(op: str, shape: Shape, batch: int, device: str, dtype: torch.dtype) -> Case:
    from hybridzoo import layers
    from hybridzoo.train.bench import plain_layers

    dim, name = shape["channels"], "plain"
    ours: Any
    plain: Any
    if op == "dat":
        plus = dim == 64
        ours = layers.DeformableAttention(64, 2, 1, 56, 8, 9) if plus else _dat(dim)
        nn.init.normal_(ours.bias.table)
        plain = plain_layers.PlainDeformableAttention(ours)
    elif op == "merging":
        ours, name = layers.DeformableMerging(dim, 2 * dim), "torchvision's deform_conv2d"
        nn.init.normal_(ours.offset.weight, std=0.1)
        plain = plain_layers.TorchvisionMerging(ours)
    else:
        ours = layers.RankAugmentedAttention(dim, dim // 64)
        plain = plain_layers.PlainRankAugmentedAttention(ours)
    ours = ours.to(device, dtype).eval()
    x = torch.randn(batch, shape["height"], shape["width"], dim, device=device, dtype=dtype).requires_grad_()
    with torch.no_grad():
        grad = torch.randn_like(ours(x[:1])).expand(batch, -1, -1, -1)
    found = {"ours": Form(lambda: ours), name: Form(lambda: plain)}
    return Case(op, shape, [x, *ours.parameters()], lambda f: f(x), grad, found)


def _dat(dim: int) -> nn.Module:
    """Deformable attention of DAT tiny's third stage."""
    from hybridzoo.layers import DeformableAttention

    return DeformableAttention(dim, dim // 32, dim // 128, 14, 1, 5, offset_range=1.0)
