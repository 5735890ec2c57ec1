"""The attention layers of a network: which of their modules compute the values and which read the results.

Attention is linear in its values: `result[query] = sum over keys of weight[key] * value[key]`, for any kind of weights.
So `probe` needs to know only which module of a layer computes the values, which module reads the results, and which
channels a head has in both. This file lists that for each class.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import timm.layers
import timm.models.maxxvit
import timm.models.swin_transformer
from torch import nn

from hybridzoo import layers
from hybridzoo.backbones import ascan, biformer, dinat_isotropic, fastervit, maxvit
from hybridzoo.backbones.hosts import cswin, deit
from hybridzoo.layers.partial_attention import PartialAttention
from hybridzoo.train.errors import UserError

KNOWN = (
    "neighborhood, routed, window, grid, stripe, global, agent, linear, deformable, cascaded group and HiLo attention,"
    " dynamic kernels; of timm's networks its vision transformers, Swin and MaxViT"
)


@dataclasses.dataclass(frozen=True)
class Head:
    """The first channel of one head; the other channels of the head have the same weights.

    Attributes:
        values: name of the layer's module that computes the values; empty if the values are an argument.
        value: channel in the output of that module.
        result: channel in the input of the layer's `result` module.
        source: the head's channel in the input of the `values` module; default: `result`.
    """

    values: str
    value: int
    result: int
    source: int | None = None


@dataclasses.dataclass(frozen=True)
class Layer:
    """One attention, or those heads of an attention that have the same pattern.

    Attributes:
        name: path of the module in the network.
        module: the attention.
        frame: the module to run: the attention, or its block if the attention reads windows. Then the map is the output
            of `norm1`, and the input of `norm2` has the results.
        sort: type of attention, "neighborhood", …
        detail: sizes, for titles.
        heads: in the network's order.
        result: the module that reads the results of the heads.
        out: the module (usually the projection) after which the results are in the order of the output.
        axis: axis of channels in values and results, -1 or 1.
        map_axis: axis of channels in the map that the frame reads, -1 or 1.
        moved: values are not in the order of the map, but in windows; or they are means of windows, or sampled between
            tokens.
        silent: modules that add something else than attention to the results, such as convolutions of the values.
        fixed: modules that compute where values are sampled; they are held constant.
        ones: channels `(first, end)` of the `values` module that multiply the results (a gate).
        argument: index of the frame's argument that is the map (or the values, if no module computes them).
        signed: weights may be negative.
        windows: size `(rows, columns)` of the windows, if the attention reads tokens without their map (FasterViT).
        coarse: tokens of the stage's map along one side of a token of this attention.
    """

    name: str
    module: nn.Module
    frame: nn.Module
    sort: str
    detail: str
    heads: tuple[Head, ...]
    result: str = "proj"
    out: str = "proj"
    axis: int = -1
    map_axis: int = -1
    moved: bool = False
    silent: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    ones: tuple[int, int] | None = None
    argument: int = 0
    signed: bool = False
    windows: tuple[int, int] | None = None
    coarse: float = 1.0

    @property
    def place(self) -> tuple[int, int]:
        """Stage and block, counted from 1 as in papers; a network without stages has one stage."""
        stage = re.search(r"(?:^|\.)(?:stages|layers|levels)\.(\d+)\.", self.name)
        block = re.findall(r"(?:^|\.)blocks\.(\d+)\.", self.name)
        return (int(stage[1]) + 1 if stage else 1), (int(block[-1]) + 1 if block else 1)


def find_layers(model: nn.Module, name: str = "") -> list[Layer]:
    """The attention layers of a network, from image to logits.

    Args:
        model: one of ours, or a timm network with a known type of attention.
        name: name of the network, for the message.

    Raises:
        UserError: the network has no known attention.
    """
    found: list[Layer] = []
    for path, module in model.named_modules():
        describe = next((rule for kind, rule in RULES.items() if isinstance(module, kind)), None)
        for row in describe(module) if describe else ():
            below = row.pop("below", "")
            row.setdefault("module", module.get_submodule(below))
            row.setdefault("frame", module)
            found.append(Layer(name=f"{path}.{below}".strip("."), **row))
    if not found:
        raise UserError(f"{name or type(model).__name__} has no attention of a type that can be shown: {KNOWN}")
    return found


def _heads(count: int, width: int, first: int, values: str = "qkv") -> tuple[Head, ...]:
    """Heads that follow one another in values and results."""
    return tuple(Head(values, first + i * width, i * width) for i in range(count))


def _packed(module: Any, heads: int | None = None, **rest: Any) -> dict[str, Any]:
    """For a layer with `proj` and a packed `qkv`, whose last third are the values, head by head."""
    dim = module.qkv.out_features // 3
    count = heads or module.num_heads
    return dict(heads=_heads(count, dim // count, 2 * dim), **rest)


def _size(side: Any) -> str:
    rows, columns = (side, side) if isinstance(side, int) else side
    return f"{rows} x {columns}"


Rows = list[dict[str, Any]]


def _neighborhood(module: layers.NeighborhoodAttention2d) -> Rows:
    dilated = module.dilation is None or max(module.dilation) > 1
    step = "the largest that fits" if module.dilation is None else " and ".join(map(str, sorted({*module.dilation})))
    detail = _size(module.kernel_size) + (f", dilation {step}" if dilated else "")
    return [_packed(module, sort="dilated neighborhood" if dilated else "neighborhood", detail=detail)]


def _routed(module: layers.BiLevelRoutingAttention) -> Rows:
    cut = f"{_size(module.regions)} regions" if module.regions else f"regions of {_size(module.region_size)} tokens"
    return [_packed(module, sort="routed", detail=f"the best {module.topk} of {cut}", silent=("lepe",))]


def _partition(module: maxvit.PartitionAttention) -> Rows:
    sort = "grid" if module.dilated else "window"
    return [_packed(module.attn, sort=sort, detail=_size(module.window), below="attn", moved=True)]


def _shifted(module: layers.ShiftedWindowAttention) -> Rows:
    sort = "shifted window" if module.shift else "window"
    return [_packed(module, sort=sort, detail=_size(module.window), moved=True)]


def _stripes(module: cswin.StripeAttention) -> Rows:
    if module.stripe is None:
        return [_packed(module, sort="global", detail="the whole map", silent=("lepe.0",))]
    detail = f"stripes of {module.stripe}: half of the heads vertical, half horizontal"
    return [_packed(module, 2 * module.num_heads, sort="stripe", detail=detail, silent=("lepe.0", "lepe.1"))]


def _global(module: Any) -> Rows:
    return [_packed(module, sort="global", detail="the whole map")]


def _with_lepe(module: biformer.FullAttention) -> Rows:
    return [_packed(module, sort="global", detail="the whole map", silent=("lepe",))]


def _partial(module: PartialAttention) -> Rows:
    return [_packed(module, sort="global", detail="the whole map", map_axis=1)]


def _agent(module: layers.AgentAttention) -> Rows:
    return [_packed(module, sort="agent", detail=f"through {_size(module.grid)} agents", silent=("dwc",))]


def _inline(module: layers.InLineAttention) -> Rows:
    silent = ("residual",) if module.dwc is None else ("residual", "dwc")  # the generator of the kernels returns zeros
    return [_packed(module, sort="in-line linear", detail="weights of both signs", silent=silent, signed=True)]


def _gated(module: layers.GatedAttention) -> Rows:
    dim = module.proj.in_features
    linear = isinstance(module, layers.RankAugmentedAttention)
    row = dict(
        heads=_heads(module.num_heads, dim // module.num_heads, 2 * dim, "qkvg"),
        silent=("lepe",),
        ones=(3 * dim, 4 * dim),
        signed=linear,
    )
    if linear:
        return [dict(row, sort="rank-augmented linear", detail="weights of both signs")]
    return [dict(row, sort="global", detail="the whole map")]


def _multi_scale(module: layers.MultiScaleLinearAttention) -> Rows:
    width, dim = module.head_dim, module.qkv.in_channels
    heads = []
    for scale, values in enumerate(["qkv", *(f"aggregate.{i}" for i in range(len(module.aggregate)))]):
        for i in range(dim // width):  # the query, key and value of a head are neighbors
            heads.append(Head(values, (3 * i + 2) * width, scale * dim + i * width))
    return [dict(heads=tuple(heads), sort="ReLU linear", detail="every scale's heads", axis=1, map_axis=1)]


def _high_low(module: layers.HiLoAttention) -> Rows:
    width = (module.low_proj if module.low_heads else module.high_proj).in_features
    width //= module.low_heads or module.high_heads
    rows: Rows = []
    if high := module.high_heads:
        heads = _heads(high, width, 2 * high * width, "high_qkv")
        detail = f"windows of {_size(module.window)}"
        rows.append(dict(heads=heads, sort="high frequencies", detail=detail, result="high_proj"))
    if low := module.low_heads:
        heads = _heads(low, width, low * width, "low_kv")
        detail = f"means of {_size(module.window)} tokens" if module.window != (1, 1) else "the whole map"
        rows.append(dict(heads=heads, sort="low frequencies", detail=detail, result="low_proj"))
    return [dict(row, out=row["result"], moved=True) for row in rows]


def _cascaded(module: layers.CascadedGroupAttention) -> Rows:
    width = module.value_dim
    heads = tuple(Head(f"qkvs.{i}", 2 * module.key_dim, i * width, 0) for i in range(module.num_heads))
    detail = f"windows of {_size(module.window)}"
    return [dict(heads=heads, sort="cascaded group", detail=detail, result="act", axis=1, map_axis=1, moved=True)]


def _deformable(module: layers.DeformableAttention) -> Rows:
    width = module.proj.in_features // module.num_heads
    groups = f"{module.groups} group{'s' if module.groups > 1 else ''} of sampled points"
    heads = _heads(module.num_heads, width, 0, "value")
    return [dict(heads=heads, sort="deformable", detail=groups, moved=True, fixed=("offset",))]


def _dynamic(module: layers.ContextMixing) -> Rows:
    rows: Rows = []
    width = module.proj.conv.in_channels // (2 * module.num_heads)
    for half, kernel in enumerate(module.kernels):
        first = half * module.num_heads * width
        heads = tuple(Head("", first + i * width, first + i * width) for i in range(module.num_heads))
        sort = f"{('small', 'large')[half]} dynamic kernel"
        rows.append(dict(heads=heads, sort=sort, detail=_size(kernel), axis=1, map_axis=1, argument=2))
    return rows


def _fastervit(module: fastervit.AttentionBlock) -> Rows:
    attn: Any = module.tokens.attn
    window = dict(sort="window", below="tokens.attn", frame=attn, windows=module.window)
    if module.carriers is None:
        return [_packed(attn, detail=_size(module.window), **window)]
    carriers: Any = module.carriers.attn
    row = dict(sort="carrier tokens", detail="of all windows", below="carriers.attn", frame=carriers)
    return [
        _packed(attn, detail=f"{_size(module.window)} and its carrier tokens", **window),
        _packed(carriers, coarse=module.window[0] / fastervit.CARRIER_SIDE, **row),
    ]


def _timms(module: timm.layers.Attention) -> Rows:
    return [] if module.gate is not None else [_packed(module, sort="global", detail="the whole map", result="norm")]


def _timms_swin(module: timm.models.swin_transformer.SwinTransformerBlock) -> Rows:
    sort = "shifted window" if any(module.shift_size) else "window"
    return [_packed(module.attn, sort=sort, detail=_size(module.window_size), below="attn", moved=True)]


def _timms_partition(module: timm.models.maxxvit.PartitionAttentionCl) -> Rows:
    attn = module.attn
    width, count = attn.dim_head, attn.num_heads
    step, first = (3 * width, 2 * width) if attn.head_first else (width, 2 * count * width)
    heads = tuple(Head("qkv", first + i * step, i * width) for i in range(count))
    sort = "window" if module.partition_block else "grid"
    return [dict(heads=heads, sort=sort, detail=_size(module.partition_size), below="attn", moved=True)]


RULES: dict[type[nn.Module], Callable[[Any], Rows]] = {
    layers.NeighborhoodAttention2d: _neighborhood,
    layers.BiLevelRoutingAttention: _routed,
    layers.ShiftedWindowAttention: _shifted,
    maxvit.PartitionAttention: _partition,
    biformer.FullAttention: _with_lepe,
    cswin.StripeAttention: _stripes,
    deit.SoftmaxAttention: _global,
    ascan.Attention: _global,
    dinat_isotropic.FullAttention: _global,
    PartialAttention: _partial,
    layers.AgentAttention: _agent,
    layers.InLineAttention: _inline,
    layers.GatedAttention: _gated,
    layers.MultiScaleLinearAttention: _multi_scale,
    layers.HiLoAttention: _high_low,
    layers.CascadedGroupAttention: _cascaded,
    layers.DeformableAttention: _deformable,
    layers.ContextMixing: _dynamic,
    fastervit.AttentionBlock: _fastervit,
    timm.layers.Attention: _timms,
    timm.models.swin_transformer.SwinTransformerBlock: _timms_swin,
    timm.models.maxxvit.PartitionAttentionCl: _timms_partition,
}
