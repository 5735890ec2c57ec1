"""MaxViT beside timm's own with the same weights, FasterViT beside a plain transcription of its published forward pass.

    python benchmarks/window_families.py [--models maxvit_tiny fastervit_0] [--modes eager compiled training]
        [--sizes 224x224 448x672] [--batch 8] [--threads 2] [--seconds 20] [--grown]
        [--out benchmarks/window_families_cpu.md]

One process; medians of interleaved rounds, at least three and for `--seconds` a row; on a GPU if there is one
(bfloat16), else on the CPU (float32). The reference runs as created, in NCHW, and once more turned to channels last,
which many a user does; ratios are to its faster form. Ours is given NCHW images and chooses for itself. "fused" is ours
after `model.fuse()`, for inference only. Training rows are for the first size only, unless `--modes` or `--sizes` are
given. Absolute times of a shared machine prove nothing: read the ratios.

timm's MaxViT takes sizes whose maps its window divides. 448x672 is one for windows of 7, so both sides attend in the
same windows there; `--grown` adds what timm does with `img_size=`, windows of a 32nd of the image, on both sides.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import measuring
import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import hybridzoo
from hybridzoo.checkpoints import convert

MODELS = [f"maxvit_{size}" for size in ("tiny", "small", "base", "large")] + [f"fastervit_{i}" for i in range(3)]
MODES = ("eager", "compiled", "training")
COLUMNS = ("model", "pixels", "mode", "reference", "ms", "channels-last", "ours ms", "ratio", "fused ms", "ratio")
TARGETS = {"eager": 1.2, "compiled": 1.0}  # of either family


class PlainFasterViT(nn.Module):
    """FasterViT as it was published, in our parameters: NCHW, positions anew in every pass, explicit softmax."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        model = self.model
        x = plain_conv(model.stem.conv2, plain_conv(model.stem.conv1, x, F.relu), F.relu)
        for stage in model.stages[:2]:
            x = stage.downsample(x)
            for block in stage.blocks:
                x = x + plain_conv(block.conv2, plain_conv(block.conv1, x, F.gelu))
        for stage in model.stages[2:]:
            x = self.attention_stage(stage, stage.downsample(x))
        return model.forward_head(model.norm(x))

    def attention_stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        batch, dim, height, width = x.shape
        w = stage.window[0]
        x = F.pad(x, (0, -width % w, 0, -height % w))
        rows, columns = x.shape[2] // w, x.shape[3] // w
        ct = None
        if stage.carrier_tokens is not None:
            ct = stage.carrier_tokens(x)
            ct = ct.reshape(batch, rows, 2, columns, 2, dim).transpose(2, 3).reshape(batch, -1, dim)
        x = x.view(batch, dim, rows, w, columns, w).permute(0, 2, 4, 3, 5, 1).reshape(-1, w * w, dim)
        for block in stage.blocks:
            x = x + embedding(block.pos_embed, (w, w))
            if ct is not None:
                size = (2 * rows, 2 * columns)
                ct = ct.view(batch, rows, columns, 2, 2, dim).transpose(2, 3).reshape(batch, -1, dim)
                ct = layer(block.carriers, ct + embedding(block.carrier_pos_embed, size), size, 0)
                ct = ct.view(batch, rows, 2, columns, 2, dim).transpose(2, 3).reshape(-1, 4, dim)
                x = torch.cat([ct, x], dim=1)
            x = layer(block.tokens, x, (w, w), 0 if ct is None else 4)
            if ct is not None:
                ct, x = x.split([4, w * w], dim=1)
                ct = ct.reshape(batch, -1, dim)
        x = x.view(batch, rows, columns, w, w, dim).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(batch, dim, rows * w, columns * w)[:, :, :height, :width].contiguous()


def plain_conv(module: nn.Module, x: Tensor, act: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    x = module.norm(module.conv(x))
    return x if act is None else act(x)


def embedding(module: nn.Module, size: tuple[int, int]) -> Tensor:
    axes = [
        (torch.arange(n, dtype=torch.float32, device=module.mlp.fc1.weight.device) - n // 2) / (n // 2) for n in size
    ]
    return module.mlp(torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)).flatten(0, 1)


def layer(branches: nn.Module, x: Tensor, size: tuple[int, int], extra: int) -> Tensor:
    x = x + attention(branches.attn, branches.norm1(x), size, extra)
    return x + branches.mlp(branches.norm2(x))


def attention(module: nn.Module, x: Tensor, size: tuple[int, int], extra: int) -> Tensor:
    batch, tokens, dim = x.shape
    q, k, v = module.qkv(x).view(batch, tokens, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    axes = []
    for n in size:
        offset = torch.arange(1 - n, n, device=x.device) * 8 / (n - 1)
        axes.append(offset.sign() * torch.log2(offset.abs() + 1) / 3)
    table = module.bias.mlp(torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)).flatten(0, 1)
    place = torch.stack(torch.meshgrid(*(torch.arange(n, device=x.device) for n in size), indexing="ij")).flatten(1)
    offset = place[:, :, None] - place[:, None]
    index = (offset[0] + size[0] - 1) * (2 * size[1] - 1) + offset[1] + size[1] - 1
    bias = F.pad(16 * torch.sigmoid(table[index].permute(2, 0, 1)), (extra, 0, extra, 0))
    weights = (q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1)
    return module.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, dim))


class Job(NamedTuple):
    model: str
    size: tuple[int, int]
    mode: str
    grown: bool = False


def contestants(job: Job, device: torch.device) -> dict[str, nn.Module]:
    """The reference in both layouts, ours, and ours fused (eager inference), in this order, with the same weights."""
    torch.manual_seed(0)
    grown = {"img_size": job.size} if job.grown else {}
    ours = timm.create_model(job.model, **grown).to(device)
    if job.model.startswith("maxvit"):
        other = timm.create_model(f"{job.model}_tf_224", **grown).to(device)
        ours.load_state_dict(convert(other.state_dict(), job.model))
    else:
        other = PlainFasterViT(copy.deepcopy(ours))
    last = copy.deepcopy(other).to(memory_format=torch.channels_last)
    models: dict[str, nn.Module] = {"other": other, "channels-last": last, "ours": ours}
    if job.mode == "eager":
        models["fused"] = copy.deepcopy(ours).fuse()
    for model in models.values():
        model.train(job.mode == "training")
    if job.mode == "compiled":
        torch._dynamo.reset()
        return {name: torch.compile(model) for name, model in models.items()}
    return models


def measure(models: dict[str, nn.Module], image: Tensor, training: bool, seconds: float) -> dict[str, float]:
    """Median seconds of every model on the image, after a check that they compute the same."""
    last = image.contiguous(memory_format=torch.channels_last)

    def step(name: str) -> Tensor:
        with torch.set_grad_enabled(training), torch.autocast(image.device.type, torch.bfloat16, image.is_cuda):
            out = models[name](last if name == "channels-last" else image)
        if training:
            out.float().square().mean().backward()
            models[name].zero_grad()
        return out.detach().float()

    expected, *outputs = [step(name) for name in models]
    for out in outputs:
        error = ((out - expected).abs().max() / expected.std()).item()
        assert error < (0.2 if image.is_cuda else 1e-3), f"the outputs differ by {error:.1e} of their deviation"
    return measuring.medians({name: partial(step, name) for name in models}, seconds, image.device)


def row(job: Job, batch: int, seconds: float, device: torch.device) -> tuple[list[str], list[str]]:
    """A row of the table, and what of it stays below its target, with the arithmetic."""
    models = contestants(job, device)
    times = measure(models, torch.randn(batch, 3, *job.size, device=device), job.mode == "training", seconds)
    size = f"{job.size[0]}x{job.size[1]}{' grown' if job.grown else ''}"
    forms = [times.pop("other"), times.pop("channels-last")]
    reference = "timm" if job.model.startswith("maxvit") else "plain"
    cells = [job.model, size, job.mode, reference, *(f"{t * 1e3:.0f}" for t in forms)]
    missed, target = [], TARGETS.get(job.mode, 0.0)
    for name, fast in times.items():
        cells += [f"{fast * 1e3:.0f}", f"{min(forms) / fast:.2f}x"]
        if min(forms) / fast < target:
            numbers = f"{min(forms) * 1e3:.0f} / {fast * 1e3:.0f} = {min(forms) / fast:.2f}x, wanted {target:.1f}x"
            missed.append(f"{job.model} {size} {job.mode}{' fused' if name == 'fused' else ''} ({numbers})")
    return cells + ["-"] * (len(COLUMNS) - len(cells)), missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["maxvit_tiny", "fastervit_0"], choices=MODELS)
    parser.add_argument("--modes", nargs="+", choices=MODES)
    parser.add_argument("--sizes", nargs="+", help="height x width in pixels; 224x224 448x672 by default")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--seconds", type=float, default=20, help="a row is measured, at least")
    parser.add_argument("--grown", action="store_true", help="MaxViT also with windows grown to a 32nd of the image")
    parser.add_argument("--out", type=Path, help="also write the table as Markdown")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = [(int(h), int(w)) for h, w in (size.split("x") for size in args.sizes or ("224x224", "448x672"))]
    if any(side % 224 for size in sizes for side in size) and any(name.startswith("maxvit") for name in args.models):
        parser.error("--sizes: timm's MaxViT takes multiples of 224; other sizes with --models fastervit_… only")
    jobs = []
    for mode in args.modes or MODES:
        everywhere = mode != "training" or args.modes or args.sizes
        for model in args.models:
            jobs += [Job(model, size, mode) for size in (sizes if everywhere else sizes[:1])]
            if args.grown and model.startswith("maxvit"):
                jobs.append(Job(model, sizes[-1], mode, grown=True))
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {args.threads} threads"
    title = f"Window families, batch {args.batch}, {where}, torch {torch.__version__}"
    table = Table(*COLUMNS, title=title)
    rows, missed = [], []
    for job in track(jobs, "measuring", console=Console(stderr=True)):
        cells, below = row(job, args.batch, args.seconds, device)
        table.add_row(*cells)
        rows.append(cells)
        missed += below
    Console(width=max(Console().width, 110)).print(table)
    if args.out:
        lines = ["| " + " | ".join(cells) + " |" for cells in (COLUMNS, ["---"] * len(COLUMNS), *rows)]
        note = (
            f"Medians of interleaved rounds, hybridzoo {hybridzoo.__version__}, timm {timm.__version__}; ratios to\n"
            "the faster form of the reference. 448x672 is a multiple of 224, so timm's MaxViT attends in the same\n"
            'windows of 7 as ours; "grown" is `img_size=` on both sides.\n\n'
            "Wanted: 1.2x eager, never slower compiled.\n"
            f"Missed by: {'; '.join(missed) or 'none'}."
        )
        args.out.write_text(f"# {title}\n\n{note}\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
