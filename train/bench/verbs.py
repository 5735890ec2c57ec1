"""`hybridzoo bench models` and `hybridzoo bench ops`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from hybridzoo.train import tables as shown
from hybridzoo.train.bench import models as networks
from hybridzoo.train.bench import ops as operators
from hybridzoo.train.bench import plot as picture
from hybridzoo.train.bench import rows as results
from hybridzoo.train.bench import tables
from hybridzoo.train.errors import UserError
from hybridzoo.train.help import examples
from hybridzoo.train.options import Device
from hybridzoo.train.plain import printable

if TYPE_CHECKING:
    from hybridzoo.train.bench.models import Tell

QUIET = 20.0  # seconds between progress lines in a log, if no step takes longer

app = typer.Typer()


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Impl(str, Enum):
    auto = "auto"
    torch = "torch"
    triton = "triton"


class PlotY(str, Enum):
    top1 = "top1"
    params = "params"
    macs = "macs"
    memory = "memory"
    latency = "latency"


BatchSize = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Images; default 8 on a CPU, 64 on a GPU.", show_default=False)
]
Threads = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="PyTorch's threads on a CPU; default: its own choice.")
]
Repeats = Annotated[int, typer.Option(min=1, metavar="N", help="Turns for each; medians and quartiles are over these.")]
Json = Annotated[
    str | None, typer.Option("--json", metavar="[FILE]", help="Write bench.json: one row for each measurement.")
]
Csv = Annotated[str | None, typer.Option("--csv", metavar="[FILE]", help="Write bench.csv: the table's lines.")]


@app.callback(invoke_without_command=True, epilog=examples("bench models dinat_mini convnext_tiny --plot speed.png"))
def bench(context: typer.Context) -> None:
    """Measure speed, memory and cost on this machine: networks, or operators."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command(
    epilog=examples(
        "bench models dinat_mini convnext_tiny",
        "bench models 'efficientvit_*' --batch-size 1 --fuse --plot fast.png",
        "bench models overlock_xtiny --train --device cuda --dtype bfloat16 --json",
    )
)
def models(
    names: Annotated[
        list[str],
        typer.Argument(metavar="NAME ...", help="Our names (also with * and ?), or timm's.", show_default=False),
    ],
    device: Device = None,
    dtype: Annotated[Dtype, typer.Option(help="Of weights and images; in training, of autocast.")] = Dtype.float32,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Images; default 8 on a CPU, 64 on a GPU.", show_default=False),
    ] = None,
    img_size: Annotated[
        str | None, typer.Option(metavar="N", help="Side in pixels, or 480x640; default each network's own.")
    ] = None,
    threads: Threads = None,
    compile_: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False,
    fuse: Annotated[bool, typer.Option("--fuse", help="Use model.fuse(); timm's are reparametrized.")] = False,
    train: Annotated[bool, typer.Option("--train", help="Also measure a training step.")] = False,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Memory layout; our networks choose it.")
    ] = False,
    repeats: Repeats = 9,
    json: Json = None,
    csv: Csv = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw accuracy against images/s: .png, .svg or .pdf.")
    ] = None,
    plot_y: Annotated[PlotY, typer.Option(help="The column that is drawn against images/s.")] = PlotY.top1,
) -> None:
    """Measure networks side by side: images/s, a single image, memory, cost.

    Each network runs in its own process; the calls of all are interleaved.
    The table shows medians, with quartiles in brackets. If a network fails,
    its row shows the reason, and the exit code is 1.
    """
    wanted = networks.find(names)
    size = _size(img_size)
    if fuse and train:
        raise UserError("--fuse and --train exclude each other: a fused network has nothing left to train")
    files = _files(json=json, csv=csv, plot=plot)
    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--plot {plot}: name a .png, .svg or .pdf file")
    place, kind = _device(device)
    settings = networks.Settings(
        device=place,
        dtype=dtype.value,
        batch=batch_size or _batch(kind),
        size=size,
        compiled=compile_,
        fused=fuse,
        channels_last=channels_last,
        train=train,
        threads=threads,
        turns=repeats,
    )
    found: list[results.Row] = []
    with _progress() as tell:
        for rows in networks.measure(wanted, settings, results.machine(place, threads), tell):
            found += rows
            if "json" in files:
                results.write(files["json"], found)
    lines = tables.lines(found)
    if "csv" in files:
        results.replace(files["csv"], tables.as_csv(lines))
    if "plot" in files:
        if any(line["images_per_s"] for line in lines):
            picture.draw(lines, files["plot"], plot_y.value)
        else:
            del files["plot"]  # nothing was measured
    shown.show(tables.models(found))
    for file in files.values():
        print(f"written: {file}")
    if any(line["error"] for line in lines):
        raise typer.Exit(1)


@app.command(
    epilog=examples(
        "bench ops na2d",
        "bench ops na2d dat --img-size 800x1344 --batch-size 1 --csv",
        "bench ops --device cuda --dtype bfloat16 --impl triton --json ops.json",
    )
)
def ops(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME ...]", help=f"Of {', '.join(operators.OPS)}; default all.", show_default=False),
    ] = None,
    device: Device = None,
    dtype: Annotated[Dtype, typer.Option(help="Type of the tensors.")] = Dtype.float32,
    impl: Annotated[Impl, typer.Option(help="Of our operators; layers have only one.")] = Impl.auto,
    batch_size: BatchSize = None,
    img_size: Annotated[str, typer.Option(metavar="N", help="Image size: a side in pixels, or 800x1344.")] = "224",
    threads: Threads = None,
    flex: Annotated[
        bool | None,
        typer.Option("--flex/--no-flex", help="Also compiled FlexAttention; default on a GPU.", show_default=False),
    ] = None,
    repeats: Repeats = 9,
    json: Json = None,
    csv: Csv = None,
) -> None:
    """Compare our operators with other ways to compute the same.

    Shapes are those of the papers' networks. Measured are forward, forward
    and backward, and peak memory. All forms must first give the same result.
    Their calls are interleaved. "x ours" is a form's time divided by ours.
    """
    wanted = operators.find(names or [], impl.value)
    size = _size(img_size) or (224, 224)
    files = _files(json=json, csv=csv)
    place, kind = _device(device)
    from hybridzoo.train.bench import cases

    given: dict[str, Any] = dict(device=place, dtype=dtype.value, impl=impl.value, turns=repeats, size=size)
    given |= dict(batch=batch_size or _batch(kind), flex=kind == "cuda" if flex is None else flex)
    shapes = {op: len(cases.shapes(op, size)) for op in wanted}
    if not any(shapes.values()):
        raise UserError(f"--img-size {img_size}: no window of these operators fits into maps of such images")
    found: list[results.Row] = []
    with _progress() as tell:
        for rows in operators.measure(shapes, results.machine(place, threads), tell, threads=threads, **given):
            found += rows
            if "json" in files:
                results.write(files["json"], found)
    if "csv" in files:
        results.replace(files["csv"], tables.as_csv(tables.operator_lines(found)))
    shown.show(tables.operators(found))
    for file in files.values():
        print(f"written: {file}")
    if any("error" in row for row in found if row["form"] == "ours"):
        raise typer.Exit(1)


def _batch(kind: str) -> int:
    return 64 if kind == "cuda" else 8


def _size(img_size: str | None) -> tuple[int, int] | None:
    """ "224" -> (224, 224), "480x640" -> (480, 640)."""
    if img_size is None:
        return None
    sides = img_size.split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() and int(side) for side in sides):
        raise UserError(
            f"--img-size {img_size}: give a side in pixels, such as 224, or height x width, such as 480x640"
        )
    return int(sides[0]), int(sides[-1])


def _files(**asked: str | Path | None) -> dict[str, Path]:
    """Option -> file for the results; a folder that cannot be written to is an error before the measurement."""
    found = {kind: Path(file or f"bench.{kind}") for kind, file in asked.items() if file is not None}
    for kind, path in found.items():
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise UserError(f"--{kind} {path}: {'is a folder' if path.is_dir() else 'there is no such folder'}")
    return found


def _device(device: str | None) -> tuple[str, str]:
    """The device's name and type; default a GPU if there is one."""
    import torch

    from hybridzoo.train.devices import check_device

    place = check_device(device) if device else "cuda" if torch.cuda.is_available() else "cpu"
    return place, torch.device(place).type


@contextmanager
def _progress() -> Iterator[Tell]:
    """A progress bar on stderr, or lines now and then if stderr is not a terminal."""
    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        said = time.monotonic()

        def tell(what: str, share: float) -> None:
            nonlocal said
            if time.monotonic() - said >= QUIET:
                console.print(f"{share:4.0%}  {printable(what)}")
                said = time.monotonic()

        yield tell
        return
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[what]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0, what="starting")
        yield lambda what, share: bar.update(task, completed=share, what=printable(what))
