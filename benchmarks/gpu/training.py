"""Part "training": one training step of every family under AMP, finite gradients, peak memory; graph against eager."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu import networks, timing
from benchmarks.gpu.rows import Row, Store, Task

# InLine on CSwin first: cuDNN's attention once failed there.
NAMES = ["inline_cswin_tiny", "agent_cswin_tiny", "agent_swin_tiny", "inline_swin_tiny", "inline_pvt_tiny"]
NAMES += ["agent_pvt_tiny", "inline_deit_tiny", "agent_deit_tiny", "dinat_tiny", "biformer_small", "maxvit_tiny"]
NAMES += ["fastervit_0", "efficientvit_msra_m5", "efficientvit_mit_b2", "patnet_t2", "ascan_tiny"]


def tasks(dry: bool, store: Store) -> list[Task]:
    names = ["biformer_tiny"] if dry else NAMES
    return [Task(f"training/{name}", "training:step", dict(name=name, dry=dry), networks.CODE) for name in names]


def step(name: str, dry: bool) -> Iterator[Row | None]:
    yield None
    row: Row = dict(op=name, way="training step, AMP", batch=1 if dry else networks.BATCH)
    if not dry:
        torch.cuda.reset_peak_memory_stats()
    train, model = networks.step_of(name, "training", dry, False)
    gradients = train()
    if not dry:
        torch.cuda.synchronize()
        row["peak_mib"] = torch.cuda.max_memory_allocated() >> 20
    parameters = [n for n, p in model.named_parameters() if p.requires_grad]
    infinite = [
        n for n, g in zip(parameters, gradients, strict=True) if g is not None and not g.isfinite().all()
    ]  # fmt: skip
    row["without_gradient"] = [n for n, g in zip(parameters, gradients, strict=True) if g is None]
    if infinite:
        row["error"] = f"gradients that are not finite: {', '.join(infinite[:5])} ({len(infinite)})"
    yield row
    del gradients
    if not dry:
        yield graph_equals_eager(name)


def graph_equals_eager(name: str) -> Row:
    """Inference, bit by bit and by the largest difference."""
    row: Row = dict(op=name, way="graph equals eager", batch=networks.BATCH)
    infer, _ = networks.step_of(name, "inference", False, False)
    expected = infer()
    kept: list[torch.Tensor] = []
    replay = timing.graphed([lambda: kept.append(infer())])
    replay()
    torch.cuda.synchronize()
    difference = (kept[-1].float() - expected.float()).abs().max().item()
    row |= dict(equal=torch.equal(kept[-1], expected), difference=difference)
    if not difference <= 1e-2 * expected.float().abs().max().item():
        row["error"] = f"a captured graph differs from eager by {difference:.2g}"
    return row
