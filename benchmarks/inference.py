"""Inference on a CPU: every family's smallest network, as created and fused, beside timm's or a plain transcription.

    python benchmarks/inference.py [--models NAME ...] [--batches 8 1] [--repeats 9] [--threads 2] [--compile]
        [--out benchmarks/results/inference_cpu.json]
    python benchmarks/inference.py --table benchmarks/results/inference_cpu.json

float32, 224 pixels, one process a network, medians of interleaved runs after one to warm up, wall-clock and CPU
milliseconds; on a machine that others use too, only ratios of CPU times say something. timm's networks are measured as
created and turned to channels last, plain transcriptions as created. With `--compile`, torch.compile of ours and of the
other as well. Forms of the same weights have to agree before anything is timed.
Rows are added to `--out` network by network; those of a network and batch that are there already are replaced.
`--table` prints README's table of a file and measures nothing.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

import hybridzoo  # noqa: F401  (registers the models)
from hybridzoo.layers import DeformableMerging

MODELS = ["maxvit_tiny", "fastervit_0", "efficientvit_msra_m0", "efficientvit_mit_b0", "patnet_t0", "biformer_tiny"]
MODELS += ["dinat_mini", "ascan_tiny", "dat_tiny", "dat_plus_tiny", "ravlt_tiny", "litv2_small", "overlock_xtiny"]
MODELS += [f"{family}_{host}_tiny" for family in ("agent", "inline") for host in ("deit", "pvt", "swin", "cswin")]
TIMM = {"maxvit_tiny": "maxvit_tiny_tf_224", "efficientvit_msra_m0": "efficientvit_m0"}
TIMM |= {"efficientvit_mit_b0": "efficientvit_b0"}
HEAD = ("as created", "fused", "fused beside as created")


def other_forms(name: str, ours: nn.Module) -> dict[str, nn.Module]:
    """What ours is compared with; none for families that nobody else has and that PyTorch's own layers make up."""
    if name in TIMM:
        other = timm.create_model(TIMM[name]).eval()
        return {"timm": other, "timm, channels last": copy.deepcopy(other).to(memory_format=torch.channels_last)}
    if name.startswith("fastervit"):
        from window_families import PlainFasterViT

        return {"plain": PlainFasterViT(copy.deepcopy(ours))}
    if name.startswith("patnet"):
        import patnet_plain  # noqa: F401  (registers the plain form)

        return {"plain": timm.create_model(f"plain_{name}").eval().to(memory_format=torch.channels_last)}
    if name.startswith("biformer"):
        from biformer_plain import make_plain

        return {"plain": make_plain(copy.deepcopy(ours))}
    if name.startswith("dat_"):  # what stands between the deformable attentions is ours in both
        from deformable_attention import make_plain as make_plain_dat

        return {"plain": make_plain_dat(copy.deepcopy(ours))}
    if name.startswith("litv2"):
        return {"torchvision's deform_conv2d": with_torchvision(copy.deepcopy(ours))}
    if name.startswith(("agent", "inline")):
        from linear_attention_families import plain

        return {"plain": plain(ours)}
    return {}


def with_torchvision(model: nn.Module) -> nn.Module:
    """LITv2 with the operator that its own code compiles for CUDA, in torchvision's form."""

    class Merging(DeformableMerging):
        def forward(self, x: Tensor) -> Tensor:
            x = x.permute(0, 3, 1, 2)
            x = deform_conv2d(x, self.offset(x), self.conv.weight, self.conv.bias, stride=2)
            return self.act(self.norm(x)).permute(0, 2, 3, 1)

    for module in model.modules():
        if isinstance(module, DeformableMerging):
            module.__class__ = Merging
    return model


def steps(name: str, batch: int, compiled: bool) -> dict[str, Callable[[], Tensor]]:
    """One inference by every form."""
    torch.manual_seed(0)
    ours = timm.create_model(name).eval()
    models = {"ours": ours} | other_forms(name, ours)
    if compiled:
        models |= {f"{key}, compiled": torch.compile(copy.deepcopy(model)) for key, model in models.items()}
    models["fused"] = copy.deepcopy(ours).fuse()
    image = torch.randn(batch, 3, 224, 224)
    last = image.contiguous(memory_format=torch.channels_last)

    def step(key: str) -> Callable[[], Tensor]:
        inputs = last if "channels last" in key or name.startswith("patnet") else image
        return lambda: models[key](inputs)

    made = {key: step(key) for key in models}
    with torch.no_grad():
        expected = made["ours"]()
        for key in made:
            if "timm" not in key and not (name.startswith("patnet") and key.startswith("plain")):
                error = ((made[key]() - expected).abs().max() / expected.std()).item()
                assert error < 1e-3, f"{name}: {key} differs by {error:.1e} of the deviation"
    return made


def measure(job: tuple[str, int, int, int, bool]) -> list[dict[str, Any]]:
    """Rows of one network and batch."""
    name, batch, repeats, threads, compiled = job
    torch.set_num_threads(threads)
    forms = steps(name, batch, compiled)
    wall: dict[str, list[float]] = {key: [] for key in forms}
    cpu: dict[str, list[float]] = {key: [] for key in forms}
    with torch.no_grad():
        for step in forms.values():
            step()
        for _ in range(repeats):
            for key, step in forms.items():
                start, used = time.perf_counter(), time.process_time()
                step()
                wall[key].append(time.perf_counter() - start)
                cpu[key].append(time.process_time() - used)
    common = dict(model=name, batch=batch, threads=threads, repeats=repeats, torch=torch.__version__)
    return [
        common | dict(form=key, ms=1e3 * statistics.median(wall[key]), cpu_ms=1e3 * statistics.median(cpu[key]))
        for key in forms
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """README's: how many times as fast, in CPU time; beside the faster memory layout of the other network.

    Args:
        rows: as `measure` makes them.
    """
    cpu: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        cpu.setdefault((row["model"], row["batch"]), {})[row["form"]] = row["cpu_ms"]
    batches = list(dict.fromkeys(batch for _, batch in cpu))
    head = ["network", "beside", *(f"{what}, batch {batch}" for batch in batches for what in HEAD)]
    lines = [head, ["---"] * len(head)]
    for model in dict.fromkeys(model for model, _ in cpu):
        forms = [cpu[model, batch] for batch in batches]
        others = [[f for f in by_form if f not in ("ours", "fused") and "compiled" not in f] for by_form in forms]
        line = [f"`{model}`", f"`{TIMM[model]}`" if model in TIMM else next(iter(others[0]), "")]
        for by_form, names in zip(forms, others, strict=True):
            other = min((by_form[name] for name in names), default=None)
            line += ["" if other is None else f"{other / by_form[form]:.2f}x" for form in ("ours", "fused")]
            line.append(f"{by_form['ours'] / by_form['fused']:.2f}x")
        lines.append(line)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 1])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="torch.compile of ours and of the other as well")
    parser.add_argument("--out", type=Path, help="JSON file, rows are added to it")
    parser.add_argument("--table", type=Path, help="print README's table of this JSON file, and measure nothing")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())), end="")
        return
    rows: list[dict[str, Any]] = json.loads(args.out.read_text()) if args.out and args.out.exists() else []
    console = Console()
    for name in args.models:
        for batch in args.batches:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                (found,) = pool.map(measure, [(name, batch, args.repeats, args.threads, args.compile)])
            rows = [row for row in rows if (row["model"], row["batch"]) != (name, batch)] + found
            if args.out:
                args.out.write_text(json.dumps(rows, indent=1) + "\n")
            shown = Table(f"{name}, batch {batch}", "ms", "CPU ms", "ours is faster (CPU)", "fused is faster (CPU)")
            by_form = {row["form"]: row["cpu_ms"] for row in found}
            for row in found:
                ratios = [f"{row['cpu_ms'] / by_form[form]:.2f}x" for form in ("ours", "fused")]
                shown.add_row(row["form"], f"{row['ms']:.1f}", f"{row['cpu_ms']:.1f}", *ratios)
            console.print(shown)


if __name__ == "__main__":
    main()
