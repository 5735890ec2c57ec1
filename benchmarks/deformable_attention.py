"""Deformable attention on a CPU: time and peak memory of the layer beside the form that people copy.

    python benchmarks/deformable_attention.py [--seconds 10] [--threads 1] [--out FILE.md]

The first deformable block of DAT++ tiny and stage 3 of DAT tiny, float32, in one process, medians of interleaved runs
after one to warm up. Times are of the processor, so that others on the machine matter less; memory is what a step needs
at its peak above what is there before. The plain form is the papers' arithmetic in NCHW: displacements of every pair of
query and key, the bias sampled at them, scores and softmax written out. Both have to agree before anything is timed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from measuring import peak_memory
from torch import Tensor, nn

from hybridzoo.layers import DeformableAttention
from hybridzoo.layers.deformable_attention import _centres, _corners, _pairs

# What: dim, heads, groups, table size, stride, offset kernel, offset range.
PLUS = (64, 2, 1, 56, 8, 9), None
FIRST = (384, 12, 3, 14, 1, 5), 1.0
CASES = [  # title, layer, batch, rows, columns, whether it is trained too
    ("DAT++ tiny, stage 1, 224 px", PLUS, 8, 56, 56, True),
    ("DAT++ tiny, stage 1, 640 x 800 px", PLUS, 1, 160, 200, True),
    ("DAT++ tiny, stage 1, 800 x 1344 px", PLUS, 1, 200, 336, False),
    ("DAT tiny, stage 3, 224 px", FIRST, 8, 14, 14, True),
]


class PlainDeformableAttention(nn.Module):
    """The published way of computing a `DeformableAttention`, with its weights."""

    def __init__(self, ours: DeformableAttention) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, x: Tensor) -> Tensor:
        o, (batch, height, width, dim) = self.ours, x.shape
        image = x.permute(0, 3, 1, 2).contiguous()
        query = _pointwise(o.query, image)
        places = o.places(query.permute(0, 2, 3, 1)).flatten(0, 1)  # (batch * groups, rows, columns, 2)
        maps = image.reshape(batch * o.groups, dim // o.groups, height, width)
        sampled = F.grid_sample(maps, places[..., (1, 0)], align_corners=True).reshape(batch, dim, 1, -1)
        heads, keys = o.num_heads, sampled.shape[3]
        q = query.reshape(batch * heads, dim // heads, height * width)
        k, v = (_pointwise(layer, sampled).reshape(batch * heads, dim // heads, keys) for layer in (o.key, o.value))
        scores = torch.einsum("bcm,bcn->bmn", q, k) * (dim // heads) ** -0.5
        line = _corners if o.offset_range is None else _centres
        grid = _pairs(line(height, x), line(width, x)).reshape(1, height * width, 1, 2)
        displacement = (grid - places.reshape(batch * o.groups, 1, keys, 2)) * 0.5
        table = o.bias.table.reshape(1, o.groups, heads // o.groups, *o.bias.table.shape[1:])
        table = table.expand(batch, -1, -1, -1, -1).reshape(batch * o.groups, *table.shape[2:])
        bias = F.grid_sample(table, displacement[..., (1, 0)], align_corners=True)
        weights = (scores + bias.reshape(batch * heads, height * width, keys)).softmax(2)
        out = torch.einsum("bmn,bcn->bcm", weights, v).reshape(batch, dim, height, width)
        return _pointwise(o.proj, out).permute(0, 2, 3, 1)


def _pointwise(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer of channels as a 1x1 convolution."""
    return F.conv2d(x, layer.weight[:, :, None, None], layer.bias)


def make_plain(model: nn.Module) -> nn.Module:
    """A network of ours with every deformable attention in the plain form; in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, DeformableAttention):
            model.set_submodule(name, PlainDeformableAttention(module))
    return model


def step_of(layer: nn.Module, x: Tensor, trained: bool) -> Callable[[], Tensor]:
    def step() -> Tensor:
        with torch.set_grad_enabled(trained):
            out = layer(x)
            if trained:
                out.sum().backward()
        return out.detach()

    return step


def measure(steps: dict[str, Callable[[], Tensor]], seconds: float) -> dict[str, tuple[float, int | None]]:
    """Median milliseconds of the processor and bytes at the peak, form by form."""
    outs = [step() for step in steps.values()]
    error = (outs[0] - outs[1]).abs().max() / outs[0].std()
    assert error < 1e-3, f"the forms differ by {error:.1e} of the deviation"
    del outs
    memory = {form: peak_memory(step, torch.device("cpu")) for form, step in steps.items()}
    times: dict[str, list[float]] = {form: [] for form in steps}
    end = time.perf_counter() + seconds
    while len(times["ours"]) < 3 or time.perf_counter() < end:
        for form, step in steps.items():
            began = time.process_time()
            step()
            times[form].append(time.process_time() - began)
    return {form: (1e3 * statistics.median(times[form]), memory[form]) for form in steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="Markdown file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = ["| layer and image | batch | step | ours, CPU ms | plain, CPU ms | faster | ours, MB | plain, MB |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for title, (numbers, offset_range), batch, rows, columns, trained in CASES:
        torch.manual_seed(0)
        layer = DeformableAttention(*numbers, offset_range=offset_range)
        nn.init.normal_(layer.bias.table)
        x = torch.randn(batch, rows, columns, numbers[0])
        for way in (False, True) if trained else (False,):
            forms = {"ours": layer, "plain": PlainDeformableAttention(layer)}
            found = measure({form: step_of(module, x, way) for form, module in forms.items()}, args.seconds)
            (ours, ours_bytes), (plain, plain_bytes) = found["ours"], found["plain"]
            memory = [f"{n / 2**20:.0f}" if n is not None else "-" for n in (ours_bytes, plain_bytes)]
            step = "training" if way else "inference"
            cells = [title, str(batch), step, f"{ours:.0f}", f"{plain:.0f}", f"{plain / ours:.2f}x", *memory]
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    if args.out:
        text = f"PyTorch {torch.__version__}, {args.threads} thread(s), float32; see `deformable_attention.py`.\n\n"
        args.out.write_text(text + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
