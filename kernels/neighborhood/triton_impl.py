"""Neighborhood attention on the GPU: which kernels run, on which tiles, with which configuration.

Tensors are `(batch, height, width, heads, head_dim)`; launches are those of `triton_common`. Everything that does not
depend on the tensors' memory is computed once for each shape, dtype and strides, and cached.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from hybridzoo.kernels import tuning
from hybridzoo.kernels.neighborhood import triton_configs, triton_kernels
from hybridzoo.kernels.neighborhood.given import Maps, Window
from hybridzoo.kernels.neighborhood.triton_configs import Axis, Cut
from hybridzoo.kernels.triton_common import Launch, Recipe, precision, same_strides
from hybridzoo.kernels.tuning import Config

MAX_IMAGES = 64  # per program
MAX_OFFSET = 2**31  # elements: offsets from the first image of a program have 32 bits
START = {"forward_whole": 1.5, "backward_bias": 6.0}  # cost of a program's start, in images; other kernels: 2.5
ENTRIES = 64  # entries of the bias table that one program of `bias_table` sums


def forward(maps: Maps, rpb: Tensor | None, window: Window) -> tuple[Tensor, Tensor]:
    """The result, and the log-sum-exp of the scores, `(batch, height, width, heads)` in float32, for `backward`."""
    query = maps.query
    out = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:4], dtype=torch.float32)
    if query.numel():
        with torch.cuda.device_of(query):
            forward_launch(maps, rpb, out, lse, window).run()
    return out, lse


def backward(
    grad: Tensor,
    maps: Maps,
    rpb: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    window: Window,
    into: Maps,
    want_rpb: bool,
) -> Tensor | None:
    """Write the gradients of `maps` to `into`; return that of rpb, in the dtype of rpb, or None if it is not needed.

    The tokens of each map in `into` follow one another row by row, at equal distances in memory.
    """
    if not grad.numel():
        return torch.zeros_like(rpb) if rpb is not None and want_rpb else None
    with torch.cuda.device_of(grad):
        launches, partial = backward_launches(
            grad.contiguous(), maps, rpb, out, lse, None if grad_lse is None else grad_lse.contiguous(), window, into,
            want_rpb,
        )  # fmt: skip
        for one in launches:
            one.run()
    return None if rpb is None or partial is None else partial.sum(0).view(rpb.shape).to(rpb.dtype)


def forward_launch(maps: Maps, rpb: Tensor | None, out: Tensor, lse: Tensor, window: Window) -> Launch:
    tensors = dict(same_strides(*maps), rpb=_table(rpb, maps.query), out=out, lse=lse)
    return _forward_recipe(_call(tensors["query"], window, rpb is not None)).launch(tensors)


def backward_launches(
    grad: Tensor,
    maps: Maps,
    rpb: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    window: Window,
    into: Maps,
    want_rpb: bool = True,
) -> tuple[list[Launch], Tensor | None]:
    """The kernels of the backward pass in order, and the tables, `(n, heads, entries)`, that one of them writes."""
    tensors = dict(same_strides(*maps), grad=grad, rpb=_table(rpb, maps.query), out=out, lse=lse)
    call = _call(tensors["query"], window, rpb is not None)
    recipes = _backward_recipes(call, into.query.stride(2), rpb is not None and want_rpb, grad_lse is not None)
    partial, blocks = None, lse  # `lse` is a placeholder that is not read
    if rpb is not None and want_rpb:
        heads, entries = call.shape[3], math.prod(2 * k - 1 for k in window.kernel)
        last = recipes[-1]
        tables = last.programs
        if last.kernel is triton_kernels.bias_table:
            tables = last.arguments["groups"]
            block = last.arguments["QUERIES"] * last.arguments["KEYS"]
            blocks = lse.new_empty(recipes[0].programs, block)
        partial = lse.new_empty(tables // heads, heads, entries)
    tensors |= dict(
        dquery=into.query, dkey=into.key, dvalue=into.value, grad_lse=lse if grad_lse is None else grad_lse,
        delta=torch.empty_like(lse), blocks=blocks, partial=lse if partial is None else partial,
    )  # fmt: skip
    return [recipe.launch(tensors) for recipe in recipes], partial


def _table(rpb: Tensor | None, query: Tensor) -> Tensor:
    return query if rpb is None else rpb.contiguous()  # without rpb, a placeholder that is not read


class _Call(NamedTuple):
    """Everything that the launches of a call depend on."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    device: torch.device
    window: Window
    bias: bool
    precision: str

    @property
    def axes(self) -> tuple[Axis, Axis]:
        rows, columns = map(Axis.of, self.shape[1:3], self.window.kernel, self.window.dilation)
        return rows, columns

    @property
    def groups(self) -> int:
        """The number of dilation groups of all heads together."""
        return self.shape[3] * math.prod(map(min, self.window.dilation, self.shape[1:3]))


def _call(query: Tensor, window: Window, bias: bool) -> _Call:
    shape, strides = tuple(query.shape), query.stride()
    return _Call(shape, strides, query.element_size(), query.device, window, bias, precision(query))


@tuning.plan
def _forward_recipe(call: _Call) -> Recipe:
    return _fitting("forward", call)


@tuning.plan
def _backward_recipes(call: _Call, grad_token: int, want_bias: bool, grad_lse: bool) -> list[Recipe]:
    """The kernels in order. If the bias needs a gradient, the last kernel writes tables of it.

    `grad_token`: elements between the gradients of two neighboring tokens.
    """
    fixed: dict[str, Any] = dict(grad_token=grad_token, GRAD_LSE=grad_lse, WANT_BIAS=want_bias)
    dense = _whole("backward_dense", call)
    if dense is not None:
        recipes = [_recipe("backward_dense", call, dense, fixed | dict(TOKENS=dense.config.queries))]
    else:
        recipes = [_fitting("backward_query", call, fixed), _fitting("backward_key", call, fixed)]
    if want_bias:
        of_query = recipes[0].kernel is triton_kernels.backward_query  # does not compute the gradient of the bias
        recipes.append(_bias_recipe(call) if of_query else _table_recipe(call, recipes[0]))
    return recipes


def _bias_recipe(call: _Call) -> Recipe:
    entries = math.prod(2 * k - 1 for k in call.window.kernel)
    columns = min(64, triton.next_power_of_2(entries))  # the kernel holds its table as a padded matrix
    rows = triton.next_power_of_2(math.ceil(entries / columns))
    return _recipe("backward_bias", call, _tiled("backward_bias", call), dict(COLUMNS=columns, ROWS=rows))


def _table_recipe(call: _Call, first: Recipe) -> Recipe:
    """The recipe of the kernel that makes tables from the blocks of sums that `first` wrote."""
    known = first.arguments
    block = (known["TOKENS"],) * 2 if "TOKENS" in known else (known["QUERIES"], known["KEYS"])
    tiles = dict(tiles_h=known.get("tiles_h", 1), tiles_w=known.get("tiles_w", 1))  # a dense group is one tile
    groups = call.groups * math.prod(tiles.values())
    arguments = known | tiles | dict(chunks=first.programs // groups, groups=groups)
    arguments |= dict(QUERIES=block[0], KEYS=block[1], ENTRIES=ENTRIES)
    parts = math.ceil(math.prod(2 * k - 1 for k in call.window.kernel) / ENTRIES)
    return Recipe.of(triton_kernels.bias_table, groups * parts, arguments, Config(*block, warps=4, stages=2))


def _fitting(direction: str, call: _Call, more: dict[str, Any] | None = None) -> Recipe:
    """The whole kernel if a block of scores can hold a tile, otherwise the kernel that loops over blocks."""
    cut = _whole(f"{direction}_whole", call)
    if cut is not None:
        return _recipe(f"{direction}_whole", call, cut, more)
    kind = "forward_tiled" if direction == "forward" else direction
    return _recipe(kind, call, _tiled(kind, call), more)


def _whole(kind: str, call: _Call) -> Cut | None:
    block_d = triton.next_power_of_2(call.shape[4])
    return triton_configs.whole(kind, *call.axes, block_d, call.itemsize, call.device)


def _tiled(kind: str, call: _Call) -> Cut:
    block_d = triton.next_power_of_2(call.shape[4])
    return triton_configs.tiled(kind, *call.axes, block_d, call.itemsize, call.device)


def _recipe(kind: str, call: _Call, cut: Cut, more: dict[str, Any] | None = None) -> Recipe:
    batch, height, width, heads, head_dim = call.shape
    window = call.window
    programs = call.groups * math.prod(cut.tiles)
    images = 1
    if kind in triton_configs.WHOLE or kind == "backward_bias":
        each = triton_configs.at_a_time(kind, cut, triton.next_power_of_2(head_dim), call.itemsize)
        images = _images(programs, batch, START.get(kind, 2.5), multiprocessors(call.device) * each)
        apart = max(call.strides[0], height * width * max((more or {}).get("grad_token", 0), heads * head_dim))
        images = min(images, max(1, MAX_OFFSET // max(1, apart) - 1))
    arguments = dict(zip(("stride_b", "stride_h", "stride_w", "stride_n"), call.strides, strict=False)) | dict(
        scale=window.scale, NEGATIVE=window.scale < 0, batch=batch, heads=heads, height=height, width=width,
        dilation_h=window.dilation[0], dilation_w=window.dilation[1], images=images,
        tiles_h=cut.tiles[0], tiles_w=cut.tiles[1],
        KERNEL_H=window.kernel[0], KERNEL_W=window.kernel[1],
        HEAD_DIM=head_dim, BLOCK_D=triton.next_power_of_2(head_dim),
        QUERIES=cut.config.queries, KEYS=cut.config.keys, BIAS=call.bias, PRECISION=call.precision,
    )  # fmt: skip
    kernel = getattr(triton_kernels, kind)
    return Recipe.of(kernel, programs * math.ceil(batch / images), arguments | (more or {}), cut.config)


def _images(groups: int, batch: int, start: float, slots: int) -> int:
    """The number of images per program with which all programs together finish first.

    One image needs `groups` programs; each program starts at the cost of `start` images; `slots` run at a time.
    """
    return min(
        range(1, min(MAX_IMAGES, batch) + 1),
        key=lambda images: (math.ceil(groups * math.ceil(batch / images) / slots) * (images + start), images),
    )


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors of a GPU; for other devices that of an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
