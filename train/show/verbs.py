"""`hybridzoo show`: draws what a query in a picture attends to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hybridzoo.train import names
from hybridzoo.train.errors import UserError
from hybridzoo.train.help import examples

app = typer.Typer()


@app.command(
    epilog=examples(
        "show maxvit_tiny photo.png --weights none",
        "show biformer_tiny photo.png --weights none --stage 3 --json",
    )
)
def show(
    network: Annotated[str, typer.Argument(metavar="NAME_OR_RUN", help="A model, or a run's folder or checkpoint.")],
    picture: Annotated[Path, typer.Argument(metavar="PICTURE", help="An image.")],
    query: Annotated[
        str | None,
        typer.Option(metavar="X,Y", help="The query: a pixel (120,80) or fractions (0.5,0.25); default the middle."),
    ] = None,
    stage: Annotated[int | None, typer.Option(min=1, metavar="N", help="One stage, from 1; default all.")] = None,
    block: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="One block of a stage, from 1; default the last of each type."),
    ] = None,
    head: Annotated[str, typer.Option(metavar="N", help="One head, from 1, or mean.")] = "mean",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Picture: png, jpg, pdf, ...; default attention/NAME.png.")
    ] = None,
    json: Annotated[
        str | None, typer.Option("--json", metavar="[FILE]", help="Also write the weights as data.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="TAG_OR_FILE", help="Published weights, a file, or none (random).")
    ] = None,
    img_size: Annotated[
        int | None, typer.Option(min=32, metavar="N", help="Shorter side of the picture for the network, in pixels.")
    ] = None,
) -> None:
    """Draw which keys one query of a picture sees, and with which weight, in every stage of a network.

    All types of attention are measured in the same way: windows, grids,
    neighborhoods, routed regions, agents, sampled points, linear attention and
    dynamic kernels.
    """
    if not Path(network).expanduser().exists():
        names.check_model(network)
    if not picture.is_file():
        raise UserError(f"PICTURE {picture}: no such file")
    if head != "mean" and not head.isdecimal():
        raise UserError(f"--head {head}: give a number from 1, or mean")
    file = out or Path("attention", f"{Path(network).stem if Path(network).exists() else network}.png")
    data = None if json is None else Path(json or file.with_suffix(".json"))
    from hybridzoo.train.show import showing

    seen = showing.show(
        network,
        picture,
        file,
        query=query,
        stage=stage,
        block=block,
        head=None if head == "mean" else int(head),
        weights=weights,
        img_size=img_size,
        data=data,
    )
    from hybridzoo.train.show.picture import caption

    for layer in seen:
        place = "stage {}, block {}".format(*layer.layer.place)
        print(f"{place}: {layer.layer.sort}, {layer.layer.detail}; {caption(layer, None)}")
    print(f"drawn: {file}" + (f"; written: {data}" if data else ""))
