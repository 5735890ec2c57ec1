"""Our networks beside what a user would run otherwise: timm's, or a plain transcription of the paper with our weights.

    python -m benchmarks.compare [NAME ...] [--compiled] [--batch 8] [--size 224] [--threads 2] [--turns 100]
        [--seconds 6] [--out benchmarks/results/networks_cpu.json or, with --compiled, compiled_cpu.json]

The smallest network of every family, on a CPU in float32: inference of a batch and of a single image, as created and
fused, and a training step (forward and backward), with peak memory. With --compiled, which takes minutes a network:
torch.compile of ours and of the other instead of the training step. A process a network, the calls of all forms
interleaved, after a check that forms of the same weights agree. Rows of a network that are there already are replaced.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from torch import Tensor, nn

import hybridzoo  # noqa: F401  (registers the models)
from benchmarks.plain import biformer, fastervit, hosts, neighborhood, overlock, patnet
from hybridzoo.layers import DeformableAttention, DeformableMerging, RankAugmentedAttention
from hybridzoo.train.bench import measuring, rows
from hybridzoo.train.bench.plain_layers import (
    PlainDeformableAttention,
    PlainRankAugmentedAttention,
    TorchvisionMerging,
)
from hybridzoo.train.bench.processes import Failed, Worker
from hybridzoo.train.bench.rows import Row

RESULTS = Path(__file__).parent / "results"
Others = dict[str, nn.Module]  # by form; "timm: ..." is another network, or one with other weights


def timms(name: str) -> Callable[[nn.Module, str], Others]:
    """timm's network in both memory layouts."""

    def others(ours: nn.Module, _: str) -> Others:
        other = timm.create_model(name)
        last = copy.deepcopy(other).to(memory_format=torch.channels_last)
        return {f"timm: {name}": other, f"timm: {name}, channels last": last}

    return others


def plain(make: Callable[[nn.Module], nn.Module], form: str = "plain") -> Callable[[nn.Module, str], Others]:
    """A copy of ours with plain layers."""
    return lambda ours, _: {form: make(copy.deepcopy(ours))}


def swapped(kind: type[nn.Module], make: Callable[[Any], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """Puts another module in the place of every layer of a kind."""

    def swap(model: nn.Module) -> nn.Module:
        for name, module in list(model.named_modules()):
            if type(module) is kind:
                model.set_submodule(name, make(module))
        return model

    return swap


def both(*ways: Callable[[nn.Module, str], Others]) -> Callable[[nn.Module, str], Others]:
    return lambda ours, name: {form: model for way in ways for form, model in way(ours, name).items()}


def plain_patnet(ours: nn.Module, name: str) -> Others:
    return {"plain": patnet.beside(ours, name).to(memory_format=torch.channels_last)}


deformable = plain(swapped(DeformableAttention, PlainDeformableAttention))
COMPARISONS: dict[str, Callable[[nn.Module, str], Others]] = {
    "maxvit_tiny": timms("maxvit_tiny_tf_224"),
    "fastervit_0": plain(fastervit.PlainFasterViT),
    "efficientvit_msra_m0": timms("efficientvit_m0"),
    "efficientvit_mit_b0": timms("efficientvit_b0"),
    "patnet_t0": plain_patnet,
    "biformer_tiny": plain(biformer.make_plain),
    "dinat_mini": plain(neighborhood.make_plain),
    "overlock_xtiny": both(plain(overlock.make_plain), timms("convnext_tiny")),
    "dat_tiny": deformable,
    "dat_plus_tiny": deformable,
    "ravlt_tiny": plain(swapped(RankAugmentedAttention, PlainRankAugmentedAttention)),
    "litv2_small": plain(swapped(DeformableMerging, TorchvisionMerging), "torchvision's deform_conv2d"),
    "ascan_tiny": lambda ours, _: {},
    **{
        f"{f}_{host}_tiny": plain(hosts.plain) for f in ("agent", "inline") for host in ("deit", "pvt", "swin", "cswin")
    },
}


class Comparison:
    """One network of ours and what it is compared with.

    Args:
        name: of `COMPARISONS`.
        batch, size: images, and their side in pixels.
        turns, seconds: of measuring, for a batch; a third of the seconds for a single image; three turns at least.
        compiled: also infer by `torch.compile` of ours and of the others, and do not train.
        arguments: of ours, which tests make shallow.
    """

    def __init__(
        self,
        name: str,
        batch: int,
        size: int,
        turns: int,
        seconds: float,
        compiled: bool = False,
        **arguments: Any,
    ) -> None:
        torch.manual_seed(0)
        self.name, self.batch, self.turns, self.seconds, self.compiled = name, batch, turns, seconds, compiled
        ours = timm.create_model(name, **arguments)
        self.models = {"ours": ours} | COMPARISONS[name](ours, name)
        self.images = torch.randn(batch, 3, size, size)

    def measure(self) -> list[Row]:
        for model in self.models.values():
            model.eval()
        fused = copy.deepcopy(self.models["ours"]).fuse()  # type: ignore[operator]
        models = self.models | {"fused": fused}
        if self.compiled:
            models |= {f"{form}, compiled": _compiled(model) for form, model in self._in_one_layout().items()}
        self.check(models)
        found = self._way("inference", models, self.images, self.seconds)
        found += self._way("latency", models, self.images[:1], self.seconds / 3)
        if self.compiled:
            return found
        del models, fused
        for model in self.models.values():
            model.train()
        return found + self._way("training", self.models, self.images, self.seconds)

    def _in_one_layout(self) -> Others:
        """All forms, but only the last of two memory layouts."""
        return {form: model for form, model in self.models.items() if f"{form}, channels last" not in self.models}

    def check(self, models: Others) -> None:
        """Raise a ValueError where forms of the same weights differ."""
        with torch.no_grad():
            expected = models["ours"](self.images)
            for form, model in models.items():
                if not form.startswith("timm"):
                    error = ((model(self.images) - expected).abs().max() / expected.std()).item()
                    if not error < 1e-3:
                        raise ValueError(f"{form} differs from ours by {error:.1e} of the logits' deviation")

    def _way(self, way: str, models: Others, images: Tensor, seconds: float) -> list[Row]:
        cpu = torch.device("cpu")
        steps = {form: self._step(model, images, way) for form, model in models.items()}
        memory = {}
        for form, step in steps.items():
            step()
            memory[form] = measuring.peak_of(step, cpu)
        times = measuring.interleaved(steps, cpu, self.turns, seconds)
        what: Row = dict(part="networks", op=self.name, way=way, batch=len(images), dtype="float32")
        what["shape"] = dict(height=images.shape[2], width=images.shape[3])
        return [what | dict(form=form, peak_mib=memory[form]) | times[form] for form in models]

    def _step(self, model: nn.Module, images: Tensor, way: str) -> measuring.Step:
        last = next((p for p in model.parameters() if p.ndim == 4), images).is_contiguous(
            memory_format=torch.channels_last
        )
        given = images.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

        def infer() -> None:
            with torch.no_grad():
                model(given)

        def train() -> None:
            out = model(given)
            out.square().mean().backward()
            model.zero_grad()

        return train if way == "training" else infer


def _compiled(model: nn.Module) -> nn.Module:
    return torch.compile(copy.deepcopy(model), dynamic=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(COMPARISONS)}; default all")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=100, help="most turns of measuring a way")
    parser.add_argument("--seconds", type=float, default=6.0, help="of measuring a way, at most (three turns at least)")
    parser.add_argument("--compiled", action="store_true", help="measure torch.compile instead of the training step")
    parser.add_argument("--out", type=Path, help="JSON file; rows of other networks in it are kept")
    args = parser.parse_args()
    args.out = args.out or RESULTS / ("compiled_cpu.json" if args.compiled else "networks_cpu.json")
    if unknown := [name for name in args.names if name not in COMPARISONS]:
        parser.error(f"{unknown[0]} is none of {', '.join(COMPARISONS)}")
    console = Console(markup=False, highlight=False)
    found = rows.read(args.out) if args.out.exists() else []
    machine = rows.machine("cpu", args.threads)
    for name in args.names or COMPARISONS:
        given: dict[str, Any] = dict(
            name=name, batch=args.batch, size=args.size, turns=args.turns, seconds=args.seconds
        )
        given["compiled"] = args.compiled
        worker = None
        try:
            worker = Worker("benchmarks.compare:Comparison", args.threads, **given)
            measured = [row | machine for row in worker.call("measure")]
        except Failed as error:
            raise SystemExit(f"{name}: {error}") from error
        finally:
            if worker is not None:
                worker.close()
        found = [row for row in found if row["op"] != name] + measured
        order = list(COMPARISONS)
        found.sort(key=lambda row: order.index(row["op"]))
        rows.write(args.out, found)
        for row in measured:
            console.print(f"{name:22} {row['way']:10} {row['form']:42} {row['median_us'] / 1e3:9.1f} ms")


if __name__ == "__main__":
    main()
