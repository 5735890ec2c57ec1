"""The dynamic convolution of neighborhoods on the GPU: which kernels run, on which tiles, with which configuration.

It works like that of neighborhood attention. Taps and tables are made contiguous; query and value may have any strides.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from hybridzoo.kernels import tuning
from hybridzoo.kernels.mix import triton_kernels
from hybridzoo.kernels.mix.given import Mix
from hybridzoo.kernels.neighborhood import triton_configs
from hybridzoo.kernels.neighborhood.given import Window
from hybridzoo.kernels.neighborhood.triton_configs import Axis, Cut
from hybridzoo.kernels.neighborhood.triton_impl import multiprocessors
from hybridzoo.kernels.triton_common import Launch, Recipe, precision
from hybridzoo.kernels.tuning import Config, Key, Table

PROGRAMS = 4  # programs per multiprocessor in the pass that sums; fewer programs write fewer partial sums

# NOT yet measured: chosen from the compiler's reports (registers, shared memory), to be replaced by a tuning run.
TABLE: Table = {
    (kind, block_d, itemsize): Config(16, 64 if itemsize == 2 else 32, 4 if itemsize == 2 else 8, 1)
    for kind in ("mix_forward", "mix_backward_query", "mix_backward_taps", "mix_backward_value")
    for block_d in (16, 32)
    for itemsize in (2, 4)
}
TABLE |= {("mix_backward_value", block_d, 2): Config(16, 64, 8, 1) for block_d in (16, 32)}
TABLE[("mix_backward_value", 16, 4)] = Config(16, 32, 4, 1)
TABLE[("mix_backward_taps", 32, 2)] = Config(16, 64, 8, 1)
TABLE[("mix_backward_query", 16, 4)] = Config(16, 32, 8, 1, 168)  # without a limit, the compiler spills a few bytes
PART = 64  # places that the backward passes process at a time


class _Call(NamedTuple):
    """Everything that the launches of a call depend on."""

    shape: tuple[int, ...]  # of query
    value_dim: int
    strides: tuple[int, ...]
    value_strides: tuple[int, ...]
    itemsize: int
    device: torch.device
    window: Window
    tap_bias: bool
    bias: bool
    precision: str


def forward(given: Mix, window: Window) -> tuple[Tensor, Tensor]:
    """The result, and the log-sum-exp of the scores, `(batch, height, width, heads)` in float32, for `backward`."""
    query, value = given.query, given.value
    out = value.new_empty(value.shape)
    lse = query.new_empty(query.shape[:4], dtype=torch.float32)
    if query.numel():
        with torch.cuda.device_of(query):
            forward_launch(given, out, lse, window).run()
    return out, lse


def backward(grad: Tensor, given: Mix, out: Tensor, lse: Tensor, window: Window) -> Mix:
    """Gradients of all inputs, each in the dtype of its input."""
    query, taps, value, tap_bias, rpb = given
    dquery, dvalue = query.new_empty(query.shape), value.new_empty(value.shape)
    if not query.numel():
        tables = [None if t is None else torch.zeros_like(t) for t in (tap_bias, rpb)]
        return Mix(dquery, torch.zeros_like(taps), dvalue, *tables)
    with torch.cuda.device_of(query):
        launches, sums = backward_launches(grad.contiguous(), given, out, lse, dquery, dvalue, window)
        for one in launches:
            one.run()
    dtaps, dtap_bias, drpb = sums
    return Mix(
        dquery,
        dtaps.sum(1).to(taps.dtype),
        dvalue,
        None if tap_bias is None else dtap_bias.sum(0).to(tap_bias.dtype),
        None if rpb is None else drpb.sum((0, 2)).view(rpb.shape).to(rpb.dtype),
    )


def forward_launch(given: Mix, out: Tensor, lse: Tensor, window: Window) -> Launch:
    tensors = _tensors(given) | dict(out=out, lse=lse)
    return _recipes(_call(tensors, given, window))[0].launch(tensors)


def backward_launches(
    grad: Tensor, given: Mix, out: Tensor, lse: Tensor, dquery: Tensor, dvalue: Tensor, window: Window
) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor]]:
    """The kernels of the backward pass, and the partial sums of taps, tap_bias and rpb that the second one writes."""
    tensors = _tensors(given)
    _, *recipes = _recipes(_call(tensors, given, window))
    batch, heads, places, head_dim = given.taps.shape
    shares = recipes[1].arguments["shares"]
    entries = math.prod(2 * k - 1 for k in window.kernel)
    dtaps = lse.new_empty(batch, shares, heads, places, head_dim)
    dtap_bias = dtaps if given.tap_bias is None else lse.new_empty(batch * shares, heads, places)
    drpb = dtaps if given.rpb is None else lse.new_empty(batch * shares, heads, math.ceil(places / PART), entries)
    tensors |= dict(grad=grad, out=out, lse=lse, dquery=dquery, dvalue=dvalue, delta=torch.empty_like(lse))
    tensors |= dict(dtaps=dtaps, dtap_bias=dtap_bias, drpb=drpb)
    return [recipe.launch(tensors) for recipe in recipes], (dtaps, dtap_bias, drpb)


def _tensors(given: Mix) -> dict[str, Tensor]:
    query, value = (t if t.stride(4) == 1 else t.contiguous() for t in (given.query, given.value))
    # Without a table, `query` is a placeholder that is not read.
    tap_bias, rpb = (query if t is None else t.contiguous() for t in (given.tap_bias, given.rpb))
    return dict(query=query, taps=given.taps.contiguous(), value=value, tap_bias=tap_bias, rpb=rpb)


def _call(tensors: dict[str, Tensor], given: Mix, window: Window) -> _Call:
    query, value = tensors["query"], tensors["value"]
    return _Call(
        tuple(query.shape), value.shape[4], query.stride(), value.stride(), query.element_size(), query.device,
        window, given.tap_bias is not None, given.rpb is not None, precision(query),
    )  # fmt: skip


@tuning.plan
def _recipes(call: _Call) -> list[Recipe]:
    """The forward pass, then the three backward passes."""
    kinds = "mix_forward", "mix_backward_query", "mix_backward_taps", "mix_backward_value"
    return [_recipe(kind, call) for kind in kinds]


def _recipe(kind: str, call: _Call) -> Recipe:
    batch, height, width, heads, head_dim = call.shape
    window = call.window
    rows, columns = map(Axis.of, (height, width), window.kernel, window.dilation)
    block_d, block_e = (max(16, triton.next_power_of_2(n)) for n in (head_dim, call.value_dim))
    entries = math.prod(2 * k - 1 for k in window.kernel)
    table_columns = max(16, min(64, triton.next_power_of_2(entries)))
    cut = _cut(kind, rows, columns, max(block_d, block_e), call)
    groups = math.prod(map(min, window.dilation, (height, width)))
    tiles = groups * math.prod(cut.tiles)
    share, shares, programs = 1, 1, batch * heads * tiles
    parts = math.ceil(math.prod(window.kernel) / PART)
    if kind == "mix_backward_taps":
        wanted = math.ceil(PROGRAMS * multiprocessors(call.device) / (batch * heads * parts))
        share = math.ceil(tiles / min(tiles, wanted))
        shares = math.ceil(tiles / share)
        programs = batch * heads * shares * parts
    strides = dict(zip(("stride_b", "stride_h", "stride_w", "stride_n"), call.strides, strict=False))
    strides |= dict(zip(("value_b", "value_h", "value_w", "value_n"), call.value_strides, strict=False))
    arguments: dict[str, Any] = strides | dict(
        scale=window.scale, heads=heads, height=height, width=width, share=share, shares=shares,
        dilation_h=window.dilation[0], dilation_w=window.dilation[1],
        tiles_h=cut.tiles[0], tiles_w=cut.tiles[1],
        KERNEL_H=window.kernel[0], KERNEL_W=window.kernel[1], HEAD_DIM=head_dim, BLOCK_D=block_d,
        VALUE_DIM=call.value_dim, BLOCK_E=block_e, QUERIES=cut.config.queries, KEYS=cut.config.keys,
        TAPS=max(16, triton.next_power_of_2(math.prod(window.kernel))),
        PART=PART, COLUMNS=table_columns, ROWS=triton.next_power_of_2(math.ceil(entries / table_columns)),
        TAP_BIAS=call.tap_bias, BIAS=call.bias, PRECISION=call.precision,
    )  # fmt: skip
    return Recipe.of(getattr(triton_kernels, kind), programs, arguments, cut.config)


def _cut(kind: str, rows: Axis, columns: Axis, block: int, call: _Call) -> Cut:
    shape = f"kernel {rows.kernel} x {columns.kernel}"
    config = tuning.pick(TABLE, Key("neighborhood_mix2d", kind, block, call.itemsize, shape), call.device)
    return triton_configs.square(rows, columns, config.keys if kind == "mix_backward_value" else config.queries, config)
