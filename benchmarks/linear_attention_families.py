"""Agent attention and InLine attention: each host beside a plain transcription, and cost against image size.

    python benchmarks/linear_attention_families.py hosts [--batch 8] [--repeats 7] [--out FILE.md]
    python benchmarks/linear_attention_families.py cost [--largest 1792] [--plot FILE.png]

`hosts` swaps the attention of our own networks, weights and all, for modules that say what the papers say, line by
line; everything else is the same code in both. `cost` runs one host with three attentions, the third one dense softmax
(`scaled_dot_product_attention`), and fits time and memory ~ pixels ** exponent.

One process, medians of interleaved runs; on a GPU if there is one (bf16, channels-last, `--compile` for compiled), else
on the CPU (float32). Absolute times of a shared machine prove nothing: read the ratios.
"""

from __future__ import annotations

import argparse
import copy
import math
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

import hybridzoo  # noqa: F401  (registers the models)
from hybridzoo.backbones.hosts.cswin import StripeAttention
from hybridzoo.backbones.hosts.swin import ShiftedWindowAttention
from hybridzoo.layers import AgentAttention, InLineAttention

SIZES = (224, 320, 448, 640, 896, 1280, 1792)
HOSTS = ("deit", "pvt", "swin", "cswin")


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


class PlainAgent(nn.Module):
    """Tables re-made and repeated for every image, both maps formed, NCHW copies for pooling and convolution."""

    def __init__(self, ours: AgentAttention) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if x.ndim == 4:
            return self(x.flatten(1, 2), x.shape[1:3]).view(x.shape)
        o, (batch, tokens, dim), heads, first = self.ours, x.shape, self.ours.num_heads, int(self.ours.class_token)
        q, k, v = o.qkv(x).chunk(3, -1)
        as_map = lambda t: t[:, first:].transpose(1, 2).reshape(batch, dim, *size)  # noqa: E731
        agent = split_heads(F.adaptive_avg_pool2d(as_map(q), o.grid).flatten(2).transpose(1, 2), heads)
        q, k, value = (split_heads(t, heads) for t in (q, k, v))
        scale = (dim // heads) ** -0.5
        gather = F.interpolate(o.an_bias, size, mode="bilinear") + o.ah_bias[..., None] + o.aw_bias[:, :, None]
        spread = F.interpolate(o.na_bias, size, mode="bilinear") + o.ha_bias[..., None] + o.wa_bias[:, :, None]
        gather, spread = gather.flatten(2), spread.flatten(2).transpose(1, 2)
        if first:
            gather, spread = torch.cat([o.ac_bias[..., None], gather], 2), torch.cat([o.ca_bias[:, None], spread], 1)
        gather, spread = gather.repeat(batch, 1, 1, 1), spread.repeat(batch, 1, 1, 1)
        agent_value = ((agent * scale) @ k.transpose(2, 3) + gather).softmax(-1) @ value
        out = ((q * scale) @ agent.transpose(2, 3) + spread).softmax(-1) @ agent_value
        out = out.transpose(1, 2).reshape(batch, tokens, dim)
        local = o.dwc(as_map(v)).flatten(2).transpose(1, 2)
        out = torch.cat([out[:, :1], out[:, 1:] + local], 1) if first else out + local
        return o.proj(out)


class PlainInLine(nn.Module):
    """The published evaluation order, and one convolution of batch x channels groups."""

    def __init__(self, ours: InLineAttention) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, x: Tensor, size: tuple[int, int] | None = None, *, summary: Tensor | None = None) -> Tensor:
        if x.ndim == 4:
            return self(x.flatten(1, 2), x.shape[1:3], summary=summary).view(x.shape)
        o, (batch, tokens, dim), heads, first = self.ours, x.shape, self.ours.num_heads, int(self.ours.class_token)
        q, k, v = o.qkv(x).chunk(3, -1)
        maps = v[:, first:].transpose(1, 2).reshape(batch, dim, *size)
        q, k, value = (split_heads(t, heads) for t in (q, k, v))
        scale = (dim // heads) ** -0.5
        root = (scale / tokens) ** 0.5
        share = 1 - scale * q @ k.mean(2, keepdim=True).transpose(2, 3)
        out = q @ ((k * root).transpose(2, 3) @ (value * root)) + share * value.mean(2, keepdim=True)
        out = out.transpose(1, 2).reshape(batch, tokens, dim)
        kernels = o.residual((x.mean(1) if summary is None else summary)[..., None]).reshape(batch * dim, 1, 3, 3)
        local = F.conv2d(maps.reshape(1, batch * dim, *size), kernels, padding=1, groups=batch * dim)
        local = local.view(batch, dim, *size)
        if o.dwc is not None:
            local = local + o.dwc(maps)
        local = local.flatten(2).transpose(1, 2)
        out = torch.cat([out[:, :1], out[:, 1:] + local], 1) if first else out + local
        return o.proj(out)


class PlainWindow(nn.Module):
    """Swin's window attention with its softmax written out; sides that windows divide."""

    def __init__(self, ours: ShiftedWindowAttention) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, x: Tensor) -> Tensor:
        o, (batch, height, width, dim), w = self.ours, x.shape, self.ours.window
        shift = w // 2 if o.shifted and height > w else 0
        x = torch.roll(x, (-shift, -shift), (1, 2))
        windows = x.reshape(batch, height // w, w, width // w, w, dim).transpose(2, 3).reshape(-1, w * w, dim)
        q, k, v = (split_heads(t, o.num_heads) for t in o.qkv(windows).chunk(3, -1))
        scores = (q * (dim // o.num_heads) ** -0.5) @ k.transpose(2, 3) + o.bias((w, w))
        if shift:
            wrapped = torch.arange(height, device=x.device) >= height - shift
            label = (2 * wrapped[:, None] + 1 * wrapped).reshape(height // w, w, width // w, w).transpose(1, 2)
            label = label.reshape(-1, w * w)
            mask = (label[:, None] != label[:, :, None]) * -100.0
            scores = (scores.unflatten(0, (batch, -1)) + mask[None, :, None]).flatten(0, 1)
        out = o.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, w * w, dim))
        out = out.reshape(batch, height // w, width // w, w, w, dim).transpose(2, 3).reshape(batch, height, width, dim)
        return torch.roll(out, (shift, shift), (1, 2))


class PlainStripes(nn.Module):
    """CSwin's stripes with their softmax written out and LePE in NCHW; sides that stripes divide."""

    def __init__(self, ours: StripeAttention) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, x: Tensor) -> Tensor:
        o, (batch, height, width, dim) = self.ours, x.shape
        parts = len(o.lepe)
        qkv = o.qkv(x.flatten(1, 2)).reshape(batch, height * width, 3, dim).permute(2, 0, 1, 3)
        outs = []
        for i, (lepe, part) in enumerate(zip(o.lepe, qkv.chunk(parts, -1), strict=True)):
            h, w = (height, o.stripe or width) if i == 0 else (o.stripe, width)
            windows = part.reshape(3, batch, height // h, h, width // w, w, dim // parts).transpose(3, 4)
            q, k, v = windows.reshape(3, -1, h * w, dim // parts).unbind(0)
            local = lepe(v.transpose(1, 2).reshape(-1, dim // parts, h, w)).flatten(2).transpose(1, 2)
            q, k, v = (split_heads(t, o.num_heads) for t in (q, k, v))
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
            out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(local.shape) + local
            out = out.reshape(batch, height // h, width // w, h, w, dim // parts).transpose(2, 3)
            outs.append(out.reshape(batch, height, width, dim // parts))
        return o.proj(torch.cat(outs, -1))


PLAIN: dict[type, Callable[[nn.Module], nn.Module]] = {
    AgentAttention: PlainAgent,
    InLineAttention: PlainInLine,
    ShiftedWindowAttention: PlainWindow,
    StripeAttention: PlainStripes,
}


def plain(model: nn.Module) -> nn.Module:
    """A copy of the network with every attention written plainly."""
    model = copy.deepcopy(model)
    for stage in model.stages:
        for block in stage.blocks:
            if type(block.attn) in PLAIN:  # DeiT's own softmax attention is SDPA in both
                block.attn = PLAIN[type(block.attn)](block.attn)
    return model


def timed(step: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def prepared(model: nn.Module, device: torch.device) -> nn.Module:
    if device.type == "cuda":
        return model.to(device, torch.bfloat16, memory_format=torch.channels_last)
    return model


def images(batch: int, side: int, device: torch.device) -> Tensor:
    x = torch.randn(batch, 3, side, side, device=device)
    return x.to(torch.bfloat16, memory_format=torch.channels_last) if device.type == "cuda" else x


def measure_host(name: str, args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Median seconds of both networks, forward and forward + backward; checks that they agree."""
    torch.manual_seed(0)
    ours = timm.create_model(name).eval()
    pair = {"plain": plain(ours), "ours": ours}
    x = images(2, 224, torch.device("cpu")).float()
    with torch.no_grad():
        torch.testing.assert_close(pair["ours"](x), pair["plain"](x), rtol=1e-3, atol=1e-3)
    pair = {key: prepared(model, device) for key, model in pair.items()}
    run = {key: torch.compile(model) if args.compile else model for key, model in pair.items()}
    x = images(args.batch, 224, device)
    times: dict[str, list[float]] = {}

    def forward(model: Callable[[Tensor], Tensor]) -> None:
        with torch.no_grad():
            model(x)

    def both_ways(model: Callable[[Tensor], Tensor]) -> None:
        model(x).float().square().mean().backward()

    for way, step in (("forward", forward), ("both", both_ways)):
        for model in pair.values():
            model.train(way == "both")
        for repeat in range(args.repeats + 1):
            for key, model in run.items():
                seconds = timed(lambda m=model, s=step: s(m), device)
                if repeat:  # the first one warms up
                    times.setdefault(f"{key} {way}", []).append(seconds)
    return {key: statistics.median(values) for key, values in times.items()}


def hosts(args: argparse.Namespace, device: torch.device, where: str) -> None:
    columns = ["network", "plain fwd ms", "ours", "ratio", "plain fwd+bwd ms", "ours", "ratio"]
    names = args.models or [f"{family}_{host}_tiny" for family in ("agent", "inline") for host in HOSTS]
    rows = []
    for name in track(names, "measuring", console=Console(stderr=True)):
        t = measure_host(name, args, device)
        cells = [name]
        for way in ("forward", "both"):
            slow, fast = t[f"plain {way}"], t[f"ours {way}"]
            cells += [f"{slow * 1e3:.0f}", f"{fast * 1e3:.0f}", f"{slow / fast:.2f}x"]
        rows.append(cells)
    title = f"Whole networks at 224 px beside a plain transcription, batch {args.batch}, {where}"
    report(title, columns, rows, args.out, f"Medians of {args.repeats} interleaved runs.")


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """What a forward pass keeps for the backward pass, without the weights; on a GPU its peak."""
    if x.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(x).float().sum().backward()
        return torch.cuda.max_memory_allocated() - before
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(x)  # alive until counted: no storage is counted twice or reused
    del out
    return sum(kept.values())


def exponent(pixels: list[int], values: list[float]) -> float:
    """Least-squares slope of log(values) over log(pixels)."""
    xs, ys = [math.log(p) for p in pixels], [math.log(v) for v in values]
    mx, my = statistics.mean(xs), statistics.mean(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sum((x - mx) ** 2 for x in xs)


def cost(args: argparse.Namespace, device: torch.device, where: str) -> None:
    models = {
        "DeiT-T, dense SDPA": ("agent_deit_tiny", dict(linear=(0, 0, 0, 0))),
        "Agent-DeiT-T": ("agent_deit_tiny", {}),
        "InLine-DeiT-T": ("inline_deit_tiny", {}),
        "Agent-PVT-T": ("agent_pvt_tiny", {}),
        "InLine-PVT-T": ("inline_pvt_tiny", {}),
    }
    sides = [s for s in SIZES if s <= args.largest]
    seconds: dict[str, list[float]] = {}
    bytes_: dict[str, list[float]] = {}
    for label, (name, kwargs) in track(models.items(), "measuring", console=Console(stderr=True)):
        model = prepared(timm.create_model(name, num_classes=0, **kwargs).eval(), device)
        for side in sides:
            x = images(1, side, device)
            repeats = max(1, args.repeats * 224**2 // side**2) if device.type == "cpu" else args.repeats
            with torch.no_grad():
                model(x)
                runs = [timed(lambda m=model, x=x: m(x), device) for _ in range(repeats)]
            seconds.setdefault(label, []).append(statistics.median(runs))
            bytes_.setdefault(label, []).append(saved_bytes(model, x))
    pixels = [s * s for s in sides]
    columns = ["network", *(f"{s} px" for s in sides), "exponent of time", "of memory"]
    rows = []
    for label in models:
        cells = [f"{t * 1e3:.0f} ms, {b / 2**20:.0f} MB" for t, b in zip(seconds[label], bytes_[label], strict=True)]
        rows.append(
            [label, *cells, f"{exponent(pixels, seconds[label]):.2f}", f"{exponent(pixels, bytes_[label]):.2f}"]
        )
    title = f"Cost of one image against its size, {where}"
    memory = "the peak of forward + backward" if device.type == "cuda" else "what forward keeps for backward"
    report(title, columns, rows, args.out, f"Time of the forward pass; memory: {memory}.")
    if args.plot:
        megabytes = {label: [value / 2**20 for value in values] for label, values in bytes_.items()}
        plot(args.plot, sides, {"forward pass, seconds": seconds, f"{memory}, MB": megabytes}, where)


def plot(file: Path, sides: list[int], panels: dict[str, dict[str, list[float]]], where: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pixels = [s * s for s in sides]
    figure, axes = plt.subplots(1, len(panels), figsize=(6.2 * len(panels), 4.6), layout="constrained")
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for label, values in lines.items():
            dense = "dense" in label
            style = dict(color="black", linestyle="--") if dense else {}
            axis.plot(pixels, values, marker="o", label=f"{label}: pixels^{exponent(pixels, values):.2f}", **style)
        axis.set(xscale="log", yscale="log", title=title, xlabel="image side, pixels")
        axis.set_xticks(pixels, [str(s) for s in sides])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(f"Linear attention beside dense attention, one image, {where}")
    figure.savefig(file, dpi=120)


def report(title: str, columns: list[str], rows: list[list[str]], out: Path | None, note: str) -> None:
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    Console(width=200).print(table)
    if out:
        lines = ["| " + " | ".join(r) + " |" for r in (columns, ["---"] * len(columns), *rows)]
        out.write_text(f"# {title}\n\n{note}\n\n" + "\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("hosts", "cost"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--models", nargs="*", help="registered names, for `hosts`")
    parser.add_argument("--compile", action="store_true", help="torch.compile both networks, for `hosts`")
    parser.add_argument("--largest", type=int, default=SIZES[-1], help="largest image side, for `cost`")
    parser.add_argument("--out", type=Path, help="also write the table as Markdown")
    parser.add_argument("--plot", type=Path, help="write the picture of `cost`")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    {"hosts": hosts, "cost": cost}[args.what](args, device, f"{where}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
