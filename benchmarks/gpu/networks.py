"""Parts "networks" and "compiled": images a second of whole networks, ours beside timm's and beside plain forms.

bfloat16 weights and channels-last images for inference; float32 weights under bfloat16 autocast for training, forward
and backward without an optimizer. 224 pixels. "graph" replays a CUDA graph of the same step,
"fused" is after `model.fuse()`.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.gpu import operators, timing
from benchmarks.gpu.importable import ROOT
from benchmarks.gpu.rows import Row, Store, Task

FIRST = ["dinat_tiny", "plain dinat_tiny", "biformer_small", "plain biformer_small"]
TIMM = ["convnext_tiny", "swin_tiny_patch4_window7_224", "maxvit_tiny_tf_224"]
OTHERS = ["maxvit_tiny", "agent_swin_tiny", "plain agent_swin_tiny", "inline_swin_tiny", "plain inline_swin_tiny"]
OTHERS += ["fastervit_0", "efficientvit_msra_m5", "efficientvit_mit_b2", "patnet_t2", "ascan_tiny", "dat_plus_tiny"]
OTHERS += ["ravlt_tiny", "litv2_small", "overlock_xtiny", "overlock_tiny"]
PROFILED = ["dinat_tiny", "biformer_small", "agent_swin_tiny", "inline_swin_tiny", "swin_tiny_patch4_window7_224"]
NORMS = re.compile("layer_?norm|GammaBeta|RowwiseMoments", re.I)  # PyTorch's kernels, and those of compilers
CODE = ("kernels", "layers", "backbones")
BATCH, PIXELS = 64, 224
WAVE = 5  # networks that are compiled side by side: training graphs took 80 s and more among eight
SLOW = 2.0  # seconds: a network launches hundreds of kernels, and its first calls take several times as long


def tasks(dry: bool, store: Store) -> list[Task]:
    """Eager, which needs no preparation."""
    if dry:
        return [_task("eager", "biformer_tiny", None, True, ())]
    return [_task("eager", name, None, False, _settings(store)) for name in FIRST + TIMM + OTHERS]


def compiled_tasks(dry: bool, store: Store) -> list[Task]:
    """What matters most first: a wave is prepared together, and what is not ready in time is cut off."""
    if dry:
        return []
    found = [*((name, "training") for name in FIRST), ("agent_swin_tiny", "inference")]  # the first wave
    for names in (FIRST + TIMM[:1], TIMM[1:] + OTHERS):
        found += [(name, way) for way in ("inference", "training") for name in names]
    return [_task("compiled", name, way, False, _settings(store)) for name, way in dict.fromkeys(found)]


def _settings(store: Store) -> tuple[tuple[str, str], ...]:
    table = operators.table_file(store)
    return (("HYBRIDZOO_TUNED", str(table)),) if table.exists() else ()


def _task(mode: str, name: str, way: str | None, dry: bool, settings: tuple[tuple[str, str], ...]) -> Task:
    args: dict[str, Any] = dict(name=name, dry=dry) | (dict(way=way) if way else {})
    title = f"networks/{name}" if mode == "eager" else f"compiled/{name}, {way}"
    return Task(title, f"networks:{mode}", args, CODE, settings)


def create(name: str, **arguments: Any) -> nn.Module:
    """By timm's registry, ours or "plain" ones: ours with the formulation that people copy, weights and all."""
    import timm

    import hybridzoo  # noqa: F401

    torch.manual_seed(0)
    if not name.startswith("plain "):
        return timm.create_model(name, **arguments)
    name = name.removeprefix("plain ")
    model = timm.create_model(name, **arguments)
    if name.startswith("biformer"):
        from benchmarks.plain import biformer

        return biformer.make_plain(model)
    if name.startswith(("agent_", "inline_")):
        from benchmarks.plain import hosts

        return hosts.plain(model)
    from benchmarks.plain import neighborhood

    return neighborhood.make_plain(model)


def step_of(name: str, way: str, dry: bool, compiled: bool) -> tuple[Callable[[], object], nn.Module]:
    """One step on images that stay the same."""
    device = timing.device_of(dry)
    pixels, batch = (64, 1) if dry else (PIXELS, BATCH)
    model = create(name, num_classes=1000).to(device, memory_format=torch.channels_last)
    images = torch.randn(batch, 3, pixels, pixels, device=device).to(memory_format=torch.channels_last)
    if compiled and name.startswith("plain "):
        with torch.no_grad():
            model(images[:1])  # makes tables of places, which compilers need not see
    if way == "inference":
        low = torch.float32 if dry else torch.bfloat16
        model, images = model.eval().to(low), images.to(low)
        call = torch.compile(model, dynamic=False) if compiled else model

        def infer() -> object:
            with torch.no_grad():
                return call(images)

        return infer, model
    labels = torch.randint(0, 1000, (batch,), device=device)
    model.train()
    call = torch.compile(model, dynamic=False) if compiled else model
    weights = [p for p in model.parameters() if p.requires_grad]

    def train() -> object:
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False, enabled=not dry):
            loss = F.cross_entropy(call(images).float(), labels)
        return torch.autograd.grad(loss, weights, allow_unused=True)

    return train, model


def eager(name: str, dry: bool) -> Iterator[Row | None]:
    yield from _images_per_second(name, ("inference", "training"), "eager", dry)


def compiled(name: str, way: str, dry: bool) -> Iterator[Row | None]:
    import torch._inductor.config as inductor

    inductor.compile_threads = max(2, (os.cpu_count() or 2) // WAVE)
    yield from _images_per_second(name, (way,), "compiled", dry)


def _images_per_second(name: str, ways: tuple[str, ...], mode: str, dry: bool) -> Iterator[Row | None]:
    from hybridzoo.layers.inference import Fusible

    batch = 1 if dry else BATCH
    made = {way: step_of(name, way, dry, mode == "compiled") for way in ways}
    steps = {way: step for way, (step, _) in made.items()}
    for step in () if dry else steps.values():
        _warm(step)
    yield None
    for way, step in steps.items():
        for graph in (False,) if dry or way == "training" else (False, True):
            row: Row = dict(op=name, way=way, mode=f"{mode}, graph" if graph else mode, batch=batch)
            try:
                if not graph and not dry:
                    step()
                    torch.cuda.reset_peak_memory_stats()
                row |= timing.measure([step], dry, 0.4, graph, SLOW)
                row["images_per_s"] = batch / row["median_us"] * 1e6
                if not graph and not dry:
                    row["peak_mib"] = torch.cuda.max_memory_allocated() >> 20
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"[:2000]
                if not dry:
                    torch.cuda.synchronize()
            yield row
            timing.release()
    if name in PROFILED and not dry:
        for way, step in steps.items():
            yield dict(op=name, way=way, mode=f"{mode}, profiler", batch=batch, **shares(step))
    if mode == "eager" and isinstance(made["inference"][1], Fusible) and not name.startswith("plain "):
        yield _fused(name, *made["inference"], batch, dry)


def _fused(name: str, step: Callable[[], object], model: Any, batch: int, dry: bool) -> Row:
    row: Row = dict(op=name, way="inference", mode="fused, graph", batch=batch)
    try:
        model.fuse()
        row |= timing.measure([step], dry, 0.4, slow=SLOW)
        row["images_per_s"] = batch / row["median_us"] * 1e6
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"[:2000]
    return row


def _warm(step: Callable[[], object]) -> None:
    """Compile, beside others that do (kernels of ours, eager too); where all take memory at once, later."""
    for wait in (1, 3, 5, 5, 10, 10, 10, None):
        try:
            step()
            break
        except torch.cuda.OutOfMemoryError:
            if wait is None:
                raise
        torch.cuda.empty_cache()
        time.sleep(wait)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def shares(step: Callable[[], object]) -> Row:
    """What the profiler says: the time that kernels run, shares of it, and the five that take most.

    A compiler's kernel that computes more than a layer norm counts as one.
    """
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profiler:
        step()
        torch.cuda.synchronize()
    events = [e for e in profiler.key_averages() if e.device_type.name == "CUDA" and e.self_device_time_total > 0]
    total = sum(e.self_device_time_total for e in events)
    if not total:
        return dict(kernel_us=0.0)
    names = attention_kernels()
    attention = sum(e.self_device_time_total for e in events if names.search(e.key))
    norms = sum(e.self_device_time_total for e in events if NORMS.search(e.key))
    largest = sorted(events, key=lambda e: -e.self_device_time_total)[:5]
    return dict(
        kernel_us=total,
        kernels=sum(e.count for e in events),
        attention_share=attention / total,
        norm_share=norms / total,
        largest=[[e.key[:80], e.self_device_time_total / total] for e in largest],
    )


def attention_kernels() -> re.Pattern[str]:
    """Names of the kernels of attention: ours, by their sources, and the libraries'."""
    ours = set()
    for file in (ROOT / "kernels").rglob("triton_*.py"):
        if file.parent.name != "depthwise":
            ours |= set(re.findall(r"^@triton\.jit.*?\ndef (\w+)", file.read_text(), re.MULTILINE))
    return re.compile("^(" + "|".join(sorted(ours)) + r")\b|flash|fmha|sdpa|flex_attention|attention_kernel", re.I)
