"""Neighborhood attention on the GPU: which kernels run, on which tiles, with which configuration.

Tensors are `(batch, height, width, heads, head_dim)`; launches are those of `triton_common`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from hybridzoo.kernels.neighborhood import triton_backward, triton_bias, triton_configs, triton_forward
from hybridzoo.kernels.triton_common import Launch, launch, same_strides, sizes

DENSE_MAX_TOKENS = 64  # per group, and
DENSE_MAX_BYTES = 8192  # per group and tensor: all of it stays in registers, with the scores
PROGRAMS = 2048  # enough to keep a large GPU busy; beyond it, a program takes several images
MAX_IMAGES = 16


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The result, and the log-sum-exp of the scores, `(batch, height, width, heads)` in float32, for `backward`."""
    out = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:4], dtype=torch.float32)
    if query.numel():
        with torch.cuda.device_of(query):
            forward_launch(query, key, value, rpb, out, lse, kernel, dilation, scale).run()
    return out, lse


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
    want_rpb: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and rpb, each in the dtype of its own; None for rpb where it is not wanted."""
    dquery, dkey, dvalue = (query.new_empty(query.shape) for _ in range(3))
    if not query.numel():
        return dquery, dkey, dvalue, torch.zeros_like(rpb) if rpb is not None and want_rpb else None
    with torch.cuda.device_of(query):
        launches, partial = backward_launches(
            grad.contiguous(), query, key, value, rpb, out, lse, dquery, dkey, dvalue, kernel, dilation, scale,
            want_rpb=want_rpb, grad_lse=None if grad_lse is None else grad_lse.contiguous(),
        )  # fmt: skip
        for one in launches:
            one.run()
    if rpb is None or partial is None:
        return dquery, dkey, dvalue, None
    return dquery, dkey, dvalue, partial.sum(0).view(rpb.shape).to(rpb.dtype)


def forward_launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
) -> Launch:
    tensors = dict(same_strides(query, key, value), rpb=_table(rpb, query), out=out, lse=lse)
    common = dict(_common(tensors["query"], rpb, kernel, dilation), scale=scale)
    if (tokens := _dense_tokens(query, kernel, dilation)) is not None:
        return _dense("forward_dense", triton_forward.forward_dense, tensors | common, query, dilation, tokens)
    return _tiled("forward_tiled", triton_forward.forward_tiled, tensors | common, query, dilation)


def backward_launches(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
    want_rpb: bool = True,
    grad_lse: Tensor | None = None,
) -> tuple[list[Launch], Tensor | None]:
    """The kernels of the backward pass in order, and the tables, `(n, heads, entries)`, that the last one fills."""
    inputs = dict(same_strides(query, key, value), grad=grad, rpb=_table(rpb, query), lse=lse)
    common = inputs | dict(_common(inputs["query"], rpb, kernel, dilation), scale=scale, delta=torch.empty_like(lse))
    common |= dict(grad_lse=lse if grad_lse is None else grad_lse, GRAD_LSE=grad_lse is not None)
    if (tokens := _dense_tokens(query, kernel, dilation)) is not None:
        arguments = common | dict(out=out, dquery=dquery, dkey=dkey, dvalue=dvalue)
        launches = [_dense("backward_dense", triton_backward.backward_dense, arguments, query, dilation, tokens)]
    else:
        arguments = common | dict(out=out, dquery=dquery)
        launches = [_tiled("backward_query", triton_backward.backward_query, arguments, query, dilation)]
        arguments = common | dict(dkey=dkey, dvalue=dvalue)
        launches.append(_tiled("backward_key", triton_backward.backward_key, arguments, query, dilation))
    if rpb is None or not want_rpb:
        return launches, None
    last = _tiled("backward_bias", triton_bias.backward_bias, common, query, dilation)
    entries = (2 * kernel[0] - 1) * (2 * kernel[1] - 1)
    heads = query.shape[3]
    partial = torch.empty(last.programs // heads, heads, entries, dtype=torch.float32, device=query.device)
    columns = min(64, triton.next_power_of_2(entries))  # the kernel holds its table as a matrix, padded
    rows = triton.next_power_of_2(math.ceil(entries / columns))
    last.arguments.update(partial=partial, COLUMNS=columns, ROWS=rows)
    return [*launches, last], partial


def _table(rpb: Tensor | None, query: Tensor) -> Tensor:
    return query if rpb is None else rpb.contiguous()  # without one, a pointer that nobody reads


def _common(query: Tensor, rpb: Tensor | None, kernel: tuple[int, int], dilation: tuple[int, int]) -> dict[str, Any]:
    """Arguments of all kernels: sizes, strides, and what is fixed when compiling."""
    return sizes(query) | dict(
        dilation_h=dilation[0], dilation_w=dilation[1], KERNEL_H=kernel[0], KERNEL_W=kernel[1], BIAS=rpb is not None
    )


def _dense_tokens(query: Tensor, kernel: tuple[int, int], dilation: tuple[int, int]) -> int | None:
    """Block for a whole dilation group, where the window of every query is its group and the block is small."""
    members = [math.ceil(size / d) for size, d in zip(query.shape[1:3], dilation, strict=True)]
    tokens = max(16, triton.next_power_of_2(math.prod(members)))
    size = tokens * triton.next_power_of_2(query.shape[4]) * query.element_size()
    dense = all(n <= k for n, k in zip(members, kernel, strict=True))
    return tokens if dense and tokens <= DENSE_MAX_TOKENS and size <= DENSE_MAX_BYTES else None


def _dense(
    kind: str, kernel: Any, arguments: dict[str, Any], query: Tensor, dilation: tuple[int, int], tokens: int
) -> Launch:
    batch, height, width, heads, _ = query.shape
    shape = f"{tokens} tokens, kernel {arguments['KERNEL_H']}x{arguments['KERNEL_W']}"
    config = triton_configs.pick(kind, arguments["BLOCK_D"], query.element_size(), tokens, shape, query.device)
    groups = heads * min(dilation[0], height) * min(dilation[1], width)
    images = _images(groups, batch)
    programs = groups * math.ceil(batch / images)
    arguments = arguments | dict(batch=batch, images=images, TOKENS=tokens)
    return launch(kernel, programs, arguments, config)


def _tiled(kind: str, kernel: Any, arguments: dict[str, Any], query: Tensor, dilation: tuple[int, int]) -> Launch:
    batch, height, width, heads, _ = query.shape
    members = [math.ceil(size / d) for size, d in zip((height, width), dilation, strict=True)]
    shape = f"{members[0]}x{members[1]}, kernel {arguments['KERNEL_H']}x{arguments['KERNEL_W']}"
    config = triton_configs.pick(kind, arguments["BLOCK_D"], query.element_size(), None, shape, query.device)
    tile = _tile(members[0], members[1], config.keys if kind == "backward_key" else config.queries)
    tiles = [math.ceil(n / t) for n, t in zip(members, tile, strict=True)]
    programs = heads * min(dilation[0], height) * min(dilation[1], width) * math.prod(tiles)
    arguments = arguments | dict(
        tile_h=tile[0], tile_w=tile[1], tiles_h=tiles[0], tiles_w=tiles[1], QUERIES=config.queries, KEYS=config.keys
    )
    if kind == "backward_bias":
        images = _images(programs, batch)
        arguments |= dict(batch=batch, images=images)
        programs *= math.ceil(batch / images)
    else:
        programs *= batch
    return launch(kernel, programs, arguments, config)


def _tile(members_h: int, members_w: int, block: int) -> tuple[int, int]:
    """Rows and columns of a tile of at most `block` tokens, about square, all tiles of a group about equal."""
    side = 1 << ((block.bit_length() - 1) // 2)
    tile_h = math.ceil(members_h / math.ceil(members_h / side))
    side = block // tile_h
    return tile_h, math.ceil(members_w / math.ceil(members_w / side))


def _images(programs: int, batch: int) -> int:
    """Images per program, given the programs that one image takes."""
    return max(1, min(MAX_IMAGES, batch, programs * batch // PROGRAMS))
