"""Draw docs/linear_cost.png: time and memory of agent, in-line and dense attention against the image's size.

    python docs/linear_cost.py [CURVE ...]

Measures the named curves (all by default; a minute or two, one image on the CPU), keeps the numbers in
docs/linear_cost.json and draws all that are there. Dense attention's curves end where a pass takes more than `PATIENCE`
seconds. Memory is counted, not measured: what a forward pass keeps for the backward pass, apart from weights.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import hybridzoo  # noqa: F401  (registers the models)
from hybridzoo.backbones import hosts
from hybridzoo.layers import AgentAttention, InLineAttention
from hybridzoo.layers.heads import merge_heads, split_heads

SIDES = (224, 320, 448, 640, 896, 1280, 1792)
PATIENCE = 2.0
DATA = Path(__file__).with_suffix(".json")


class DenseAttention(nn.Module):
    """Every token attends to every token of a `(B, H, W, dim)` map, by PyTorch's fused attention."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (split_heads(t, self.num_heads) for t in self.qkv(x.flatten(1, 2)).chunk(3, -1))
        return self.proj(merge_heads(F.scaled_dot_product_attention(query, key, value))).view(x.shape)


def dense_pvt() -> nn.Module:
    row = hosts.PVTConfig((2, 2, 2, 2), (1, 2, 5, 8))
    return hosts.PVT(row, lambda stage, dim, heads, side: DenseAttention(dim, heads), num_classes=0)


def image(side: int) -> Tensor:
    return torch.zeros(1, 3, side, side)


def stage2(side: int) -> Tensor:
    return torch.zeros(1, side // 8, side // 8, 192)


CURVES: dict[str, tuple[str, Callable[[], Any], Callable[[int], Tensor]]] = {
    "agent": ("layer", lambda: AgentAttention(192, 6, 4, 28, grid=12), stage2),
    "in-line": ("layer", lambda: InLineAttention(192, 6), stage2),
    "dense": ("layer", lambda: DenseAttention(192, 6), stage2),
    "Agent-Swin-T, dense form": (
        "network",
        lambda: timm.create_model("agent_swin_tiny", agent_grid="dense", num_classes=0),
        image,
    ),
    "InLine-PVT-T": ("network", lambda: timm.create_model("inline_pvt_tiny", num_classes=0), image),
    "PVT-T, dense attention": ("network", dense_pvt, image),
}
PANELS = {"layer": "one layer, 192 channels, stride 8", "network": "whole network"}


def seconds(make: Callable[[], Any], sample: Callable[[int], Tensor]) -> dict[str, float]:
    """Median seconds of a forward pass for every side that patience allows."""
    model, times = make().eval(), {}
    quadratic = any(isinstance(module, DenseAttention) for module in model.modules())
    for side in SIDES:
        x, runs = torch.randn_like(sample(side)), []
        with torch.no_grad():
            while len(runs) < 5 and sum(runs) < PATIENCE / 2:
                start = time.perf_counter()
                model(x)
                runs.append(time.perf_counter() - start)
        times[str(side)] = statistics.median(runs[1:] or runs)  # the first one warms up
        if quadratic and times[str(side)] > PATIENCE:
            break
    return times


def kept_bytes(make: Callable[[], Any], sample: Callable[[int], Tensor]) -> dict[str, int]:
    """What forward keeps for backward, for every side: storages counted on tensors without data."""
    model, result = make(), {}
    for side in SIDES:
        with FakeTensorMode() as mode:
            state, x = {name: mode.from_tensor(p) for name, p in model.named_parameters()}, sample(side)
            weights = {p.untyped_storage()._cdata for p in state.values()}
            kept: dict[int, torch.UntypedStorage] = {}

            def pack(t: Tensor, weights: set[int] = weights, kept: Any = kept) -> Tensor:
                storage = t.untyped_storage()
                if storage._cdata not in weights:
                    kept[storage._cdata] = storage
                return t

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                torch.func.functional_call(model, state, (x,))
            result[str(side)] = sum(storage.nbytes() for storage in kept.values())
    return result


def exponent(values: dict[str, float]) -> float:
    """Least-squares slope of log(values) over log(pixels)."""
    xs, ys = [2 * math.log(int(side)) for side in values], [math.log(v) for v in values.values()]
    return statistics.linear_regression(xs, ys).slope


def draw(data: dict[str, dict[str, dict[str, float]]]) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharex=True, layout="constrained")
    for column, (panel, title) in enumerate(PANELS.items()):
        names = [name for name, (of, *_) in CURVES.items() if of == panel and name in data]
        for row, (kind, label, unit) in enumerate(
            (("seconds", "forward pass, seconds", 1), ("bytes", "kept for the backward pass, MB", 2**20))
        ):
            axis = axes[row][column]
            for name in names:
                values = {side: value / unit for side, value in data[name][kind].items()}
                style = dict(color="black", linestyle="--") if "dense" in name and "form" not in name else {}
                axis.plot(
                    [int(side) ** 2 for side in values],
                    list(values.values()),
                    marker="o",
                    label=f"{name}: area^{exponent(values):.2f}",
                    **style,
                )
            axis.set(xscale="log", yscale="log", ylabel=label, title=title if not row else "")
            axis.set_xticks([side**2 for side in SIDES], [str(side) for side in SIDES])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            if names:
                axis.legend(fontsize=9)
            if row:
                axis.set_xlabel("side of the image, pixels")
    figure.suptitle("Cost of one image against its area, float32 on a CPU")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=100)


def main() -> None:
    data = json.loads(DATA.read_text()) if DATA.exists() else {}
    for name in sys.argv[1:] or CURVES:
        _, make, sample = CURVES[name]
        data[name] = {"seconds": seconds(make, sample), "bytes": kept_bytes(make, sample)}
        print(name, *(f"{kind}: area^{exponent(values):.2f}" for kind, values in data[name].items()))
        DATA.write_text(json.dumps(data, indent=1) + "\n")
    draw(data)


if __name__ == "__main__":
    main()
