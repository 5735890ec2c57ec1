"""`hybridzoo export`: a network or a run as a file that runs without hybridzoo."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybridzoo.train import names, tables, trained_verbs
from hybridzoo.train.errors import UserError
from hybridzoo.train.help import examples
from hybridzoo.train.options import CfgOptions
from hybridzoo.train.words import split

if TYPE_CHECKING:
    from hybridzoo.train.export.sources import Source

app = typer.Typer()


class To(str, Enum):
    onnx = "onnx"
    pt2 = "pt2"
    openvino = "openvino"
    torchscript = "torchscript"
    aoti = "aoti"


class Int8(str, Enum):
    weights = "weights"
    dynamic = "dynamic"


@app.command(
    "export",
    epilog=examples(
        "export efficientvit_msra_m0 --to onnx --weights none",
        "export dinat_mini --to pt2 --features --out maps.pt2",
        "export runs/digits --to openvino --out digits.xml",
        "export litv2_small --to onnx --int8 weights",
    ),
)
def export(
    run: Annotated[
        str, typer.Argument(metavar="NAME|RUN_OR_FILE", help="A network, a run's folder, or a checkpoint of it.")
    ],
    checkpoint: Annotated[
        str | None, typer.Argument(metavar="CHECKPOINT", help="Where the first word is a config.", show_default=False)
    ] = None,
    to: Annotated[To, typer.Option(help="ONNX, torch.export, OpenVINO, TorchScript, AOTInductor.")] = To.onnx,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Default NAME with the format's ending here, or beside the checkpoint."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="TAG_OR_FILE", help="Of a NAME: published weights, a file, or none.")
    ] = None,
    features: Annotated[bool, typer.Option("--features", help="Of a NAME: its maps of all strides.")] = False,
    img_size: Annotated[
        str | None, typer.Option(metavar="N|HxW", help="The usual image in pixels; default the network's own.")
    ] = None,
    dynamic: Annotated[
        bool, typer.Option("--dynamic/--static", help="Any height and width where the network allows, or one size.")
    ] = True,
    fuse: Annotated[bool, typer.Option("--fuse/--no-fuse", help="Fold norms into their neighbours.")] = True,
    int8: Annotated[
        Int8 | None,
        typer.Option(help="Linear layers in eight bits: their weights, or inputs too.", show_default=False),
    ] = None,
    config: trained_verbs.ConfigOption = None,
    cfg_options: CfgOptions = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Write a network, or what a run trained, as a file that runs without hybridzoo.

    The batch is open in every format, height and width where the network
    allows. The file is compared with PyTorch at several sizes and batches
    before it is kept; a difference is an error and leaves no file. What a
    reader has to know (mean, std, size, classes, licence) is in the file.
    """
    by_name = checkpoint is None and config is None and names.is_model(run) and not Path(run).exists()
    if by_name:
        names.check_model(run)
        if weights not in (None, "none"):
            names.check_weights(str(weights))
    elif weights is not None or features:
        raise UserError(f"{'--features' if features else '--weights'}: is for a network's NAME; {run} has its own")
    size = _size(img_size)
    if out is not None and out.exists() and not force:
        raise UserError(f"--out {out}: is there already; name another file, or replace it (--force)")
    from hybridzoo.train.export.formats import FORMATS

    form = FORMATS[to.value]
    form.need_packages()
    if int8 is not None:
        from hybridzoo.train.export import int8 as eight

        eight.check(int8.value, to.value)
    with tables.waiting(f"exporting {run}"):
        if by_name:
            source, file = _network(run, weights, features, cfg_options or []), Path(run)
        else:
            name, place, rest = split([run, checkpoint] if checkpoint else [run], config, "export")
            if rest:
                raise UserError(f"{rest[0]}: one run or checkpoint at a time")
            file, loaded = trained_verbs.find_trained(name, place, cfg_options)
            from hybridzoo.train.export import runs

            source = runs.from_run(loaded, file)
            file = file.with_suffix("")
        from hybridzoo.train.export import comparing, exporting, sources

        source.size = size or source.size
        source.metadata["input"]["size"] = list(source.size)
        if fuse:
            sources.fold(source.network)
        change, tolerance = 0.0, comparing.TOLERANCE
        if int8 is not None:
            change = eight.quantize(source, int8.value)
            tolerance = eight.tolerance(int8.value, change)
        target = out or file.with_name(file.name + form.suffix)
        done = exporting.export(source, to.value, target, dynamic=dynamic, force=force, tolerance=tolerance)
    megabytes = sum(part.stat().st_size for part in done.files) / 1e6
    print(f"written: {', '.join(str(part) for part in reversed(done.files))} ({form.title}, {megabytes:,.1f} MB)")
    print(f"takes: image (batch, {source.channels}, height, width) float32; {done.sizes}")
    print(f"gives: {', '.join(source.outputs)}; at most {done.error:.1g} of its deviation from PyTorch's")
    if int8 is not None:
        print(f"int8 ({int8.value}): changes the outputs by at most {change:.1%} of their deviation, at noise")
    if done.why:
        print(f"note: not for every size, because: {done.why[:300]}")


def _network(name: str, weights: str | None, features: bool, options: list[str]) -> Source:
    from hybridzoo.train import networks
    from hybridzoo.train.export import sources
    from hybridzoo.train.facts import read_network
    from hybridzoo.train.overrides import parse_value

    arguments: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or not re.fullmatch(r"model\.\w+", key):
            raise UserError(f"option {option!r}: of a network by name only its arguments change: model.KEY=VALUE")
        arguments[key.removeprefix("model.")] = parse_value(value, option)
    networks.check("model", name, arguments)
    any_size = dict(read_network(name, **arguments).any_size)  # timm's transformers of one size take any
    return sources.from_name(name, weights, features=features, arguments={**any_size, **arguments})


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    sides = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if sides is None or min(found := (int(sides[1]), int(sides[2] or sides[1]))) < 32:
        raise UserError(f"--img-size {text}: expected a side or HEIGHTxWIDTH in pixels, from 32, e.g. 480x640")
    return found
