"""The convolution-heavy families beside what a user would otherwise run: ours, ours folded, a training step.

    python benchmarks/convolutional_families.py [--threads 2] [--out benchmarks/convolutional_families_cpu.md]
        [--models efficientvit] [--batch 8] [--size 224] [--seconds 6] [--compile]

Whole models with the same weights, in one process, medians of interleaved runs; on the CPU in float32, on a GPU, if
there is one, in bfloat16. First all networks are checked to agree in float32. The other network runs as created, in
NCHW, and once more turned to channels last, which many a user does; ours is given NCHW images and turns them itself.
Ratios are to the faster form of the other. Absolute times of a shared machine prove nothing: read the ratios.

On one thread PyTorch multiplies 1x1 convolutions image by image, on more it leaves them to oneDNN: ratios differ.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from functools import partial
from pathlib import Path

import measuring
import patnet_plain  # noqa: F401  (registers the plain form of PATNet)
import timm
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import hybridzoo  # noqa: F401
from hybridzoo import checkpoints


@dataclasses.dataclass(frozen=True)
class Row:
    """One of our models and its rival, both as `timm.create_model` knows them."""

    ours: str
    rival: str
    rival_is: str = "timm's port"


def _rows(ours: str, rival: str, sizes: str, rival_is: str = "timm's port") -> list[Row]:
    return [Row(ours + size, rival + size, rival_is) for size in sizes.split()]


ROWS = [
    *_rows("efficientvit_msra_", "efficientvit_", "m0 m1 m2 m3 m4 m5"),
    *_rows("efficientvit_mit_", "efficientvit_", "b0 b1 b2 b3 l1 l2 l3"),
    *_rows("patnet_", "plain_patnet_", "t0 t1 t2 s m l", "plain form"),
    *_rows("partialnet_", "plain_partialnet_", "t0 t1 t2 s m l", "plain form"),
]
TARGETS = {"timm's port": 1.0, "plain form": 1.2}  # of the forward pass, as created
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


@torch.enable_grad()
def train_step(model: nn.Module, image: Tensor) -> None:
    """Forward and backward, without the optimizer."""
    model.zero_grad()
    model(image).float().square().mean().backward()


def wake(model: nn.Module, image: Tensor) -> nn.Module:
    """Give a fresh model activations of ordinary size: untrained ones fade into denormal numbers, which are slow."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.ones_(module.weight)  # residual branches start at zero
            module.momentum = 1.0
    model.train()(image)
    return model.eval()


@torch.no_grad()
def measure(row: Row, args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Median seconds of forward passes and of training steps; asserts first that the networks agree."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    image = torch.randn(args.batch, 3, args.size, args.size, device=device)
    with device:
        rival, ours = timm.create_model(row.rival), timm.create_model(row.ours).eval()
    wake(rival, image)
    ours.load_state_dict(checkpoints.convert(rival.state_dict(), row.ours))  # the same weights
    folded = copy.deepcopy(ours).fuse()
    expected = rival(image)
    for name, model in (("ours", ours), ("folded", folded)):
        error = (model(image) - expected).abs().max().item() / expected.std().item()
        assert error < 5e-2, f"{row.ours}, {name}: {error:.1e} of the logits' deviation away from {row.rival}"
    models = {name: copy.deepcopy(rival).to(memory_format=layout) for name, layout in LAYOUTS.items()}
    models |= {"ours": ours, "folded": folded}
    images = {name: image.to(dtype, memory_format=layout) for name, layout in LAYOUTS.items()}
    steps, training = {}, {}
    for name, model in models.items():
        model.to(device, dtype)
        run = torch.compile(model) if args.compile else model
        steps[name] = partial(run, images.get(name, images["NCHW"]))
        training[name] = partial(train_step, run, images.get(name, images["NCHW"]))
    result = measuring.medians(steps, args.seconds, device)
    del training["folded"]
    for name in training:
        models[name].train()
    return result | {f"{name} step": t for name, t in measuring.medians(training, args.seconds, device).items()}


def misses(row: Row, t: dict[str, float]) -> list[str]:
    """What of this row stays below its target, with the arithmetic."""
    better, target = min(t["NCHW"], t["NHWC"]), TARGETS[row.rival_is]
    found = []
    for name, wanted in (("ours", target), ("folded", max(target, 1.0))):
        if better / t[name] < wanted:
            which = row.ours if name == "ours" else f"{row.ours} folded"
            numbers = f"{better * 1e3:.1f} / {t[name] * 1e3:.1f} = {better / t[name]:.2f}x"
            found.append(f"{which} ({numbers}, wanted {wanted:.1f}x)")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="", help="only rows whose name contains this")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=6.0, help="of measuring, for each half of a row")
    parser.add_argument("--threads", type=int, help="of a CPU; PyTorch's choice by default")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, help="also write the table as Markdown")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cpu = f"CPU, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}, float32"
    where = f"{torch.cuda.get_device_name()}, bfloat16" if device.type == "cuda" else cpu
    columns = ["model", "against", "its ms", "channels-last", "ours", "folded"]
    columns += ["its step ms", "channels-last", "ours, step"]
    rows = [row for row in ROWS if args.models in row.ours]
    table_rows, missed = [], []
    for row in track(rows, "measuring", console=Console(stderr=True)):
        t = measure(row, args, device)
        missed += misses(row, t)
        cells = [row.ours, row.rival_is]
        for way, names in (("", ("ours", "folded")), (" step", ("ours",))):
            both = [t[layout + way] for layout in LAYOUTS]
            cells += [f"{seconds * 1e3:.1f}" for seconds in both]
            cells += [f"{min(both) / t[name + way]:.2f}x" for name in names]
        table_rows.append(cells)
    how = "compiled" if args.compile else "eager"
    title = f"Convolution-heavy families: {args.size} px, batch {args.batch}, {how}, {where}, torch {torch.__version__}"
    table = Table(title=title)
    for column in columns:
        table.add_column(column, no_wrap=True)
    for cells in table_rows:
        table.add_row(*cells)
    Console(width=120).print(table)
    if args.out:
        lines = ["| " + " | ".join(r) + " |" for r in (columns, ["---"] * len(columns), *table_rows)]
        words = (
            "How many times faster than the faster form of the other: forward as created, folded by `fuse()`, and\n"
            "forward + backward. Medians of interleaved runs.\n\n"
            "Wanted: forward, as created and folded, not slower than timm's port; 1.2x the plain form of PATNet.\n"
            f"Missed by: {'; '.join(missed) or 'none'}."
        )
        args.out.write_text(f"# {title}\n\n{words}\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
