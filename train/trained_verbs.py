"""`hybridzoo test` and `hybridzoo predict`: evaluate a run or checkpoint, and predict with it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybridzoo.train import tables
from hybridzoo.train.errors import UserError
from hybridzoo.train.help import examples
from hybridzoo.train.options import CfgOptions, Data, Device, Launcher, Processes, first_process, load, print_results
from hybridzoo.train.words import split

if TYPE_CHECKING:
    import mmengine

    from hybridzoo.train import views

MOST_SHOWN = 200  # images that `predict` lists; files have all

app = typer.Typer()


class Part(str, Enum):
    val = "val"
    test = "test"


RunOrFile = Annotated[
    str, typer.Argument(metavar="RUN_OR_FILE", help="A run, a checkpoint, a folder for the hub, or hf-hub:USER/NAME.")
]
ConfigOption = Annotated[str | None, typer.Option("--config", metavar="NAME", help="Config, for weights without one.")]
Tta = Annotated[bool, typer.Option("--tta", help="Also use mirrored images, and (except for classes) resized ones.")]
SlideOption = Annotated[
    int | None, typer.Option("--slide", metavar="PX", help="Segmentation: evaluate in windows of this side.")
]
StrideOption = Annotated[
    int | None, typer.Option("--stride", metavar="PX", help="Step of the windows; default two thirds of the side.")
]


@app.command(
    "test",
    epilog=examples(
        "test runs/digits",
        "test runs/digits/final.pth --data other_photographs --tta",
        "test biformer_tiny_digits runs/digits/final.pth",
    ),
)
def evaluate(
    run: RunOrFile,
    checkpoint: Annotated[
        str | None, typer.Argument(metavar="CHECKPOINT", help="Where the first word is a config.", show_default=False)
    ] = None,
    config: ConfigOption = None,
    cfg_options: CfgOptions = None,
    data: Data = None,
    work_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Results and log; default the run's folder, or work_dirs/NAME.")
    ] = None,
    part: Annotated[
        Part, typer.Option("--split", help="The part of the data: val, or test if there is one.")
    ] = Part.val,
    device: Device = None,
    tta: Tta = False,
    slide: SlideOption = None,
    stride: StrideOption = None,
    launcher: Processes = Launcher.none,
) -> None:
    """Evaluate a run on its validation data, or on --data: scores of each class as tables, results.json and pictures.

    A run's folder or checkpoint contains its config, classes and input size.
    Weights without a config, such as published ones, need one before them, or
    --config. A config that contradicts the checkpoint is an error.
    """
    name, place, rest = split([run, checkpoint] if checkpoint else [run], config, "test")
    if rest:
        raise UserError(f"{rest[0]}: one run or checkpoint at a time; data of your own are --data {rest[0]}")
    windows = _windows(slide, stride)
    from hybridzoo.train import engine, trained

    path, loaded = find_trained(name, place, cfg_options)
    folder = work_dir or (trained.folder_of(path) if name is None else None) or engine.folder_of(loaded, None)
    scores = engine.test(
        loaded,
        path,
        work_dir=folder,
        launcher=launcher.value,
        data=data,
        device=device,
        tta=tta,
        slide=windows,
        pictures=True,
        split=part.value,
    )
    print_results(scores, folder)


@app.command(
    epilog=examples(
        "predict runs/digits photo.png",
        "predict runs/digits/final.pth photo.png --json --csv --out seen",
        "predict biformer_tiny_digits runs/digits/final.pth photo.png",
    )
)
def predict(
    run: RunOrFile,
    pictures: Annotated[list[str], typer.Argument(metavar="PICTURES", help="Images, or folders with subfolders.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the drawn pictures.")] = Path("predictions"),
    json: Annotated[
        str | None, typer.Option("--json", metavar="[FILE]", help="Write predictions.json (objects: COCO's format).")
    ] = None,
    csv: Annotated[str | None, typer.Option("--csv", metavar="[FILE]", help="Write predictions.csv.")] = None,
    draw: Annotated[bool, typer.Option("--draw/--no-draw", help="Draw the predictions.")] = True,
    score: Annotated[
        float, typer.Option(min=0, max=1, metavar="X", help="Detection: leave out boxes below this score.")
    ] = 0.3,
    tta: Tta = False,
    slide: SlideOption = None,
    stride: StrideOption = None,
    config: ConfigOption = None,
    cfg_options: CfgOptions = None,
    device: Device = None,
) -> None:
    """Print, draw and write the predictions of a run's folder or checkpoint for images.

    A run's folder or checkpoint contains its config, classes and input size.
    Weights without a config, such as published ones, need one before them, or
    --config. Images that cannot be read are named and left out; the exit code
    is then 1.
    """
    name, place, sources = split([run, *pictures], config, "predict")
    if not sources:
        raise UserError("PICTURES are missing: name images or folders of images (see: hybridzoo predict --help)")
    for source in sources:
        if not source.exists():
            raise UserError(f"PICTURES {source}: no such file or folder")
    windows = _windows(slide, stride)
    path, loaded = find_trained(name, place, cfg_options)
    from hybridzoo.train import written
    from hybridzoo.train.predict import Predictions

    asked = {"json": json, "csv": csv}
    wanted = {kind: Path(file or out / f"predictions.{kind}") for kind, file in asked.items() if file is not None}
    how: dict[str, Any] = {"device": device, "tta": tta, "slide": windows, "pictures": draw}
    seen = Predictions(loaded, path, sources, out, score=score, masks=json is not None, **how)
    shown, count = [], 0
    with contextlib.ExitStack() as files:
        open_files = [files.enter_context(written.Written(file, kind, seen.task)) for kind, file in wanted.items()]
        for found in seen:
            count += 1
            for table in open_files:
                table.add(found)
            if count <= MOST_SHOWN:
                shown.append(found)
    seen.tell()
    tables.show(tables.predictions(shown))
    if count > MOST_SHOWN:
        print(f"and {_counted(count - MOST_SHOWN, 'image')} more: --csv and --json write them all")
    skipped = f", {_counted(len(seen.failed), 'image')} skipped" if seen.failed else ""
    print((f"{_counted(count, 'picture')} drawn in {out}" if draw else _counted(count, "image")) + skipped)
    for file in wanted.values():
        print(f"written: {file}")
    if seen.failed:
        raise typer.Exit(1)


def find_trained(name: str | None, place: Path, options: Sequence[str] | None) -> tuple[Path, mmengine.Config]:
    """The requested checkpoint and its config: the given config, or the checkpoint's."""
    loaded = load(name, options) if name is not None else None
    from hybridzoo.train import trained

    path = trained.find(place)
    if loaded is None:
        loaded = trained.load(path, options or ())
    if path != place and first_process():
        print(f"checkpoint: {path}")
    return path, loaded


def _windows(slide: int | None, stride: int | None) -> views.Slide | None:
    if slide is None:
        if stride is not None:
            raise UserError(f"--stride {stride}: is the step of --slide; give --slide too")
        return None
    from hybridzoo.train.views import Slide

    return Slide(slide, stride if stride is not None else max(1, slide * 2 // 3))


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
