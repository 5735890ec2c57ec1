"""Small pictures of attention for the families' pages, as inline SVG: what one query sees on a small map.

Colours come from the site's style sheet, so that pictures suit a dark page too. Where an operator or a layer decides
what is seen, it is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

import torch
from torch import Tensor

CELL = 10  # of the SVG's units


def neighborhood() -> str:
    """Keys of `na2d`, for two dilations, in the middle and near a corner."""
    panels = []
    for dilation in (1, 2):
        for place, query in (("middle", (7, 7)), ("corner", (1, 0))):
            panels.append(panel(_window_of(15, 5, dilation, query), query, f"dilation {dilation}, {place}"))
    return row(panels)


def routed() -> str:
    """Regions that three regions look at."""
    from hybridzoo.kernels import bi_level_route

    generator = torch.Generator().manual_seed(5)
    coarse = torch.randn(1, 3, 5, 5, generator=generator)  # neighbouring regions are alike, as in pictures
    smooth = torch.nn.functional.interpolate(coarse, size=(14, 14), mode="bicubic").permute(0, 2, 3, 1)[:, :, :, None]
    routes = bi_level_route(smooth, smooth, regions=7, topk=4)[0]
    panels = []
    for region in (8, 24, 40):
        values = torch.zeros(7, 7)
        values.view(-1)[routes[region]] = 1.0
        seen = values.repeat_interleave(2, 0).repeat_interleave(2, 1)
        asking = [(2 * (region // 7) + i, 2 * (region % 7) + j) for i in (0, 1) for j in (0, 1)]
        panels.append(panel(seen, asking, f"region {region + 1} of 49", lines=2))
    return row(panels)


def window_and_grid() -> str:
    """The two partitions of MaxViT on a map of 12 x 12 tokens, with windows of 4 x 4."""
    side, window, query = 12, 4, (5, 6)
    panels = []
    for dilated, name in ((False, "window"), (True, "grid")):
        panels.append(panel(_partner(side, window, query, dilated), query, name))
    return row(panels)


def hilo() -> str:
    """A query's window, and the averages of all windows."""
    side, query = 8, (2, 5)
    averages = torch.full((side, side), 0.55)
    return row(
        [
            panel(_partner(side, 2, query), query, "high frequencies"),
            panel(averages, query, "low frequencies", lines=2),
        ]
    )


def carriers() -> str:
    """A window of FasterViT, and the windows' carrier tokens."""
    side, window, query = 12, 4, (5, 6)
    tokens = torch.full((side // window, side // window), 0.8)
    return row(
        [
            panel(_partner(side, window, query), query, "window", lines=window),
            panel(tokens, (query[0] // window, query[1] // window), "carrier tokens"),
        ]
    )


def agents() -> str:
    """The cells that agents average, one agent that collects, one query that reads from all agents."""
    side, grid = 12, 3
    size = side // grid
    cells = torch.tensor([[0.25 + 0.3 * ((i // size + j // size) % 2) for j in range(side)] for i in range(side)])
    cell = [(i, j) for i in range(4, 8) for j in range(4, 8)]
    return row(
        [
            panel(cells, [], "agents: means of cells", lines=size),
            panel(torch.full((side, side), 0.45), cell, "an agent collects"),
            panel(torch.full((grid, grid), 0.8), [], "nine agents, read by"),
            panel(torch.zeros(side, side), (2, 9), "a query"),
        ]
    )


def deformable() -> str:
    """Places at which DAT++'s attention reads keys, of two random images."""
    from hybridzoo.layers import DeformableAttention

    torch.manual_seed(1)
    side, stride = 16, 4
    layer = DeformableAttention(32, num_heads=1, groups=1, table_size=side, stride=stride, offset_kernel=5)
    torch.nn.init.normal_(layer.offset.proj.weight, std=0.05)
    panels = []
    for number in (1, 2):
        with torch.no_grad():
            moved = layer.places(layer.query(torch.randn(1, side, side, 32)))[0, 0].flatten(0, 1)
            layer.offset.proj.weight.mul_(0.0)
            still = layer.places(layer.query(torch.zeros(1, side, side, 32)))[0, 0].flatten(0, 1)
            torch.nn.init.normal_(layer.offset.proj.weight, std=0.05)
        marks = []
        for (y0, x0), (y1, x1) in zip(still.tolist(), moved.tolist(), strict=True):
            a, b, c, d = (((value + 1) / 2 * (side - 1) + 0.5) * CELL for value in (x0, y0, x1, y1))
            marks.append(f'<line class="hz-path" x1="{a:.1f}" y1="{b:.1f}" x2="{c:.1f}" y2="{d:.1f}"/>')
            marks.append(f'<circle class="hz-from" cx="{a:.1f}" cy="{b:.1f}" r="3"/>')
            marks.append(f'<circle class="hz-to" cx="{c:.1f}" cy="{d:.1f}" r="4"/>')
        panels.append(panel(torch.zeros(side, side), [], f"image {number}", extra="".join(marks)))
    return row(panels)


def mixed() -> str:
    """OverLoCK's two neighborhoods, which shift inward at a border."""
    panels = []
    for place, query in (("middle", (7, 7)), ("border", (1, 12))):
        for kernel in (5, 9):
            panels.append(panel(_window_of(15, kernel, 1, query), query, f"{kernel} x {kernel}, {place}"))
    return row(panels)


def mix_weights() -> str:
    """Weights of one query's window in `neighborhood_mix2d`, of three random images: the derivative by the values."""
    from hybridzoo.kernels import neighborhood_mix2d

    side, kernel, spot = 11, 7, (4, 6)
    generator = torch.Generator().manual_seed(2)
    panels = []
    for number in (1, 2, 3):
        query = torch.randn(1, side, side, 1, 8, generator=generator)
        taps = torch.randn(1, 1, kernel * kernel, 8, generator=generator)
        value = torch.zeros(1, side, side, 1, 1, requires_grad=True)
        neighborhood_mix2d(query, taps, value, kernel_size=kernel)[0, spot[0], spot[1]].sum().backward()
        weights = value.grad[0, :, :, 0, 0]
        panels.append(panel((weights / weights.max()).sqrt(), spot, f"image {number}"))
    return row(panels)


def local_global() -> str:
    """InLine: every token a little, the nearest by weights of their own."""
    query = (4, 7)
    values = torch.full((12, 12), 0.3)
    values[query[0] - 1 : query[0] + 2, query[1] - 1 : query[1] + 2] = 1.0
    return row([panel(values, query, "all tokens, and 3 x 3")])


def linear() -> str:
    """Pairs of queries and keys, beside one sum that is read by all queries."""
    return row([_wires(True, "softmax: all pairs"), _wires(False, "linear: one sum")])


def weighted_linear() -> str:
    """Keys that enter the sum alike, and with weights (of the softmax of random scores)."""
    weights = torch.randn(8, 8, generator=torch.Generator().manual_seed(3)).mul(1.2).flatten().softmax(0).view(8, 8)
    even = torch.full((8, 8), 0.4)
    return row([panel(even, (2, 5), "linear"), panel(weights / weights.max(), (2, 5), "rank-augmented")])


def cascade() -> str:
    """Four heads, each with its quarter of the channels and the output of the one before."""
    heads = [f"head {i}: channels {i}/4{f' + output of head {i - 1}' if i > 1 else ''}" for i in range(1, 5)]
    return chain([*heads, "join, project"])


def partial() -> str:
    """A quarter of the channels convolved, the others gated."""
    values = torch.tensor([[1.0] * 4 + [0.35] * 12])
    return row([panel(values, [], "channels: convolved (dark), gated (light)", cell=16)])


def arrangement() -> str:
    """AsCAN's blocks by stage, from the variant's own table."""
    from hybridzoo.backbones.ascan import VARIANTS

    stages = VARIANTS["ascan_tiny"].stages
    return chain([f"stage {index + 1}: {' '.join(blocks)}" for index, blocks in enumerate(stages)])


def chain(steps: Sequence[str]) -> str:
    """Steps one after another; one that begins with `+` is added to what goes in."""
    boxes = []
    for step in steps:
        added, text = step.startswith("+ "), step.removeprefix("+ ")
        kind = "hz-step hz-added" if added else "hz-step"
        boxes.append(f'<li class="{kind}">{escape(text)}</li>')
    return f'<ol class="hz-chain">{"".join(boxes)}</ol>\n'


def row(panels: Sequence[str]) -> str:
    return f'<div class="hz-row">{"".join(panels)}</div>\n'


def panel(
    values: Tensor,
    queries: tuple[int, int] | Sequence[tuple[int, int]],
    title: str,
    *,
    lines: int = 0,
    cell: int = CELL,
    extra: str = "",
) -> str:
    """A map as squares.

    Args:
        values: `(rows, columns)`, how much each token is seen, 0 to 1.
        queries: the token that looks, or several.
        title: below the picture.
        lines: tokens between dividing lines, 0 for none.
        cell: side of a square.
        extra: further SVG over it.
    """
    asking = {queries} if isinstance(queries, tuple) else set(queries)
    rows, columns = values.shape
    parts = []
    for i in range(rows):
        for j in range(columns):
            place = f'x="{j * cell}" y="{i * cell}" width="{cell - 1}" height="{cell - 1}"'
            parts.append(f'<rect class="hz-token" {place}/>')
            if values[i, j] > 0:
                parts.append(f'<rect class="hz-key" {place} opacity="{values[i, j].item():.2f}"/>')
            if (i, j) in asking:
                parts.append(f'<rect class="hz-query" {place}/>')
    width, height = columns * cell, rows * cell
    for at in range(lines, rows, lines) if lines else ():
        parts.append(f'<line class="hz-line" x1="0" x2="{width}" y1="{at * cell - 0.5}" y2="{at * cell - 0.5}"/>')
    for at in range(lines, columns, lines) if lines else ():
        parts.append(f'<line class="hz-line" y1="0" y2="{height}" x1="{at * cell - 0.5}" x2="{at * cell - 0.5}"/>')
    return _figure("".join(parts) + extra, width, height, title)


def _figure(inside: str, width: int, height: int, title: str) -> str:
    svg = f'<svg viewBox="-1 -1 {width + 1} {height + 1}" role="img" aria-label="{escape(title)}">{inside}</svg>'
    return f'<div class="hz-panel">{svg}<span>{escape(title)}</span></div>'


def _wires(pairs: bool, title: str) -> str:
    """Six queries on the left, six keys on the right; wires between all, or through one sum."""
    left, right, middle, parts = 15, 135, 75, []
    heights = [10 + 20 * i for i in range(6)]
    for a in heights:
        if not pairs:
            parts.append(f'<line class="hz-path" x1="{left}" y1="{a}" x2="{middle}" y2="60"/>')
            parts.append(f'<line class="hz-path" x1="{right}" y1="{a}" x2="{middle}" y2="60"/>')
        for b in heights if pairs else ():
            parts.append(f'<line class="hz-path" x1="{left}" y1="{a}" x2="{right}" y2="{b}"/>')
    for a in heights:
        parts.append(f'<circle class="hz-query" cx="{left}" cy="{a}" r="6"/>')
        parts.append(f'<circle class="hz-to" cx="{right}" cy="{a}" r="6"/>')
    if not pairs:
        parts.append(f'<rect class="hz-to" x="{middle - 12}" y="48" width="24" height="24"/>')
    return _figure("".join(parts), 150, 120, title)


def _window_of(side: int, kernel: int, dilation: int, query: tuple[int, int]) -> Tensor:
    from hybridzoo.kernels.neighborhood.reference import axis_table

    keys = [seen for seen, _ in axis_table(side, kernel, dilation)]
    values = torch.zeros(side, side)
    for i in keys[query[0]]:
        values[i, keys[query[1]]] = 1.0
    return values


def _partner(side: int, window: int, query: tuple[int, int], dilated: bool = False) -> Tensor:
    """1 where a token shares the query's window."""
    from hybridzoo.layers.windows import to_windows

    numbers = torch.arange(side * side).view(1, side, side, 1)
    windows = to_windows(numbers, (window, window), dilated).flatten(3).flatten(0, 2)
    mine = windows[(windows == query[0] * side + query[1]).any(1)]
    return torch.isin(numbers[0, :, :, 0], mine).float()


PICTURES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (agents, arrangement, carriers, cascade, deformable, hilo, linear, local_global, mix_weights, mixed)
} | {function.__name__: function for function in (neighborhood, partial, routed, weighted_linear, window_and_grid)}
