"""MaxViT beside timm's own with the same weights, FasterViT beside a plain transcription of its published forward pass.

    python benchmarks/window_families.py [--families maxvit fastervit] [--sizes 224x224 448x672] [--batch 8]
        [--train] [--compile] [--repeats 7] [--out benchmarks/window_families_cpu.md]

One process, medians of interleaved runs; on a GPU if there is one (bf16), else on the CPU (float32). "fused" is ours
after `model.fuse()`, for inference only. Absolute times of a shared machine prove nothing: read the ratios.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from hybridzoo.checkpoints import convert

NAMES = {"maxvit": "maxvit_tiny", "fastervit": "fastervit_0"}


class PlainFasterViT(nn.Module):
    """FasterViT as it was published, in our parameters: NCHW, positions anew in every pass, explicit softmax."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        model = self.model
        x = model.stem.conv2(model.stem.conv1(x))
        for stage in model.stages[:2]:
            x = stage(x)
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


def contestants(family: str, train: bool, compiled: bool, device: torch.device) -> dict[str, nn.Module]:
    """The reference, ours, and ours fused (not for training), in this order and with the same weights."""
    torch.manual_seed(0)
    ours = timm.create_model(NAMES[family]).to(device)
    if family == "maxvit":
        other = timm.create_model("maxvit_tiny_tf_224").to(device)
        ours.load_state_dict(convert(other.state_dict(), NAMES[family]))
        models: dict[str, nn.Module] = {"timm": other, "ours": ours}
    else:
        models = {"plain": PlainFasterViT(copy.deepcopy(ours)), "ours": ours}
    if not train:
        models["fused"] = copy.deepcopy(ours).fuse()
    for model in models.values():
        model.train(train)
        if device.type == "cuda":
            model.to(memory_format=torch.channels_last)
    return {name: torch.compile(model) for name, model in models.items()} if compiled else models


def timed(step: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(models: dict[str, nn.Module], image: Tensor, train: bool, repeats: int) -> dict[str, float]:
    """Median seconds of every model on the image; checks that they agree in evaluation."""

    def step(model: nn.Module) -> Tensor:
        with torch.set_grad_enabled(train), torch.autocast(image.device.type, torch.bfloat16, image.is_cuda):
            out = model(image)
        if train:
            out.float().square().mean().backward()
        return out.detach().float()

    outputs = [step(model) for model in models.values()]  # also the warm-up
    if not train:
        for out in outputs[1:]:
            error = ((out - outputs[0]).abs().max() / outputs[0].std()).item()
            assert error < (0.2 if image.is_cuda else 1e-3), f"the outputs differ by {error:.1e} of their deviation"
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats):
        for name, model in models.items():
            times[name].append(timed(lambda m=model: step(m), image.device))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--families", nargs="+", default=list(NAMES), choices=list(NAMES))
    parser.add_argument("--sizes", nargs="+", default=["224x224", "448x672"], help="height x width in pixels")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--train", action="store_true", help="forward and backward instead of inference")
    parser.add_argument("--compile", action="store_true", help="torch.compile both sides")
    parser.add_argument("--out", type=Path, help="also write the table as Markdown")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    columns = ["model", "pixels", "reference", "ms", "ours ms", "ratio", "fused ms", "ratio"]
    rows = []
    jobs = [(family, size) for family in args.families for size in args.sizes]
    for family, size in track(jobs, "measuring", console=Console(stderr=True)):
        torch._dynamo.reset()
        models = contestants(family, args.train, args.compile, device)
        image = torch.randn(args.batch, 3, *map(int, size.split("x")), device=device)
        if device.type == "cuda":
            image = image.contiguous(memory_format=torch.channels_last)
        (reference, slow), *ours = measure(models, image, args.train, args.repeats).items()
        cells = [NAMES[family], size, reference, f"{slow * 1e3:.0f}"]
        for _, fast in ours:
            cells += [f"{fast * 1e3:.0f}", f"{slow / fast:.2f}x"]
        rows.append(cells + ["-"] * (len(columns) - len(cells)))
    how = f"{'training' if args.train else 'inference'}, {'compiled' if args.compile else 'eager'}"
    title = f"Window families, {how}, batch {args.batch}, {where}, torch {torch.__version__}"
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    if args.out:
        lines = ["| " + " | ".join(r) + " |" for r in (columns, ["---"] * len(columns), *rows)]
        args.out.write_text(f"# {title}\n\nMedians of {args.repeats} interleaved runs.\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
