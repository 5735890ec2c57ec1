"""The command line: `hybridzoo list | info | check | train | test | predict | show | export | bench ... | hub ...`.

Imports at the top of this file slow down every `--help`: torch, timm and mmengine take seconds. So verbs import what
they need when they run, after they have checked the names and paths they were given.
"""

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from hybridzoo.train import checkpoint_verbs, model_info, names, tables, trained_verbs
from hybridzoo.train.bench import verbs as bench_verbs
from hybridzoo.train.errors import Terminated, explain
from hybridzoo.train.export import verbs as export_verbs
from hybridzoo.train.help import examples
from hybridzoo.train.hub import verbs as hub_verbs
from hybridzoo.train.options import CfgOptions, Data, Device, Launcher, Processes, load, print_results
from hybridzoo.train.plain import printable
from hybridzoo.train.show import verbs as show_verbs

# Missing package -> the extra that installs it.
EXTRAS = {
    "matplotlib": "train",
    "mmengine": "train",
    "PIL": "train",
    "sklearn": "train",
    "wandb": "train",
    "globox": "detection",
    "mmcv": "detection,segmentation",
    "mmdet": "detection",
    "pycocotools": "detection",
    "mmseg": "segmentation",
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript", "openvino", "torchao"), "export"),
}

app = typer.Typer(rich_markup_mode="rich", add_completion=False, pretty_exceptions_enable=False)
app.add_typer(trained_verbs.app)
app.add_typer(export_verbs.app)
app.add_typer(show_verbs.app)
app.add_typer(checkpoint_verbs.app, name="checkpoints")
app.add_typer(bench_verbs.app, name="bench")
app.add_typer(hub_verbs.app, name="hub")


class Task(str, Enum):
    classification = "classification"
    detection = "detection"
    segmentation = "segmentation"


class OnBadImage(str, Enum):
    stop = "stop"
    skip = "skip"


Recipe = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A name from `list --recipes`, a file, or a model to fine-tune.")
]
WorkDir = Annotated[Path | None, typer.Option(metavar="DIR", help="Logs and checkpoints; default work_dirs/CONFIG.")]
ValFraction = Annotated[
    float | None,
    typer.Option(metavar="X", help="Fraction of the training images to hold out, if there is no validation set."),
]


@app.callback(invoke_without_command=True, epilog=examples("list", "info biformer_tiny"))
def top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Hybrid convolution/attention vision backbones: find one, train it, look at what it predicts."""
    if version:
        from hybridzoo import __version__

        print(f"hybridzoo {__version__}")


@app.command("list", epilog=examples("list", "list 'biformer_s*'", "list --recipes upernet"))
def list_(
    pattern: Annotated[str, typer.Argument(metavar="PATTERN", help="A part of the name, or with * and ?.")] = "",
    recipes: Annotated[
        bool, typer.Option("--recipes", "--configs", help="List the recipes instead of the models.")
    ] = False,
) -> None:
    """List the models, or the recipes."""
    if recipes:
        tables.show(tables.recipes(model_info.find_recipes(pattern)))
    else:
        tables.show(tables.models([model_info.summarize(name) for name in model_info.find_models(pattern)]))


@app.command(epilog=examples("info biformer_tiny"))
def info(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A model, with or without .tag; timm's too.")],
) -> None:
    """Show a model's size and cost, feature maps, input, published accuracy and licence."""
    with tables.waiting(f"counting {name}"):
        found = model_info.facts(name)
    tables.show(tables.model(found))


@app.command(
    epilog=examples(
        "train maxvit_tiny --data photographs",
        "train mask-rcnn --model dinat_mini --data scenes --epochs 12",
        "train biformer_tiny_digits --work-dir runs/digits",
    )
)
def train(
    recipe: Recipe,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="The network: ours, or any of timm's.")] = None,
    data: Data = None,
    epochs: Annotated[
        int | None, typer.Option(metavar="N", help="Length of the run; the schedule is adjusted.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(metavar="N", help="Training images per step and process.")] = None,
    lr: Annotated[float | None, typer.Option(metavar="X", help="Highest learning rate.")] = None,
    img_size: Annotated[int | None, typer.Option(metavar="N", help="Side of the training images in pixels.")] = None,
    freeze: Annotated[
        int | None, typer.Option(metavar="N", help="Do not train the stem (0), or stem and N stages.")
    ] = None,
    workers: Annotated[int | None, typer.Option(metavar="N", help="Processes that load images.")] = None,
    device: Device = None,
    val_fraction: ValFraction = None,
    early_stop: Annotated[
        int | None, typer.Option(metavar="N", help="End after N epochs without a better validation.")
    ] = None,
    cfg_options: CfgOptions = None,
    weights: Annotated[
        str | None,
        typer.Option(metavar="WEIGHTS", help="Start from published weights, a file, a run, hf-hub:USER/NAME; or none."),
    ] = None,
    work_dir: WorkDir = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint in the folder.")] = False,
    amp: Annotated[bool | None, typer.Option("--amp/--no-amp", help="Mixed precision.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, metavar="N", help="Seed of all randomness.")] = None,
    on_bad_image: Annotated[OnBadImage | None, typer.Option(help="What to do if an image cannot be read.")] = None,
    no_wandb: Annotated[bool, typer.Option("--no-wandb", help="Do not log to Weights & Biases.")] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write TensorBoard's files beside the logs.")
    ] = False,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Divide the weights among the processes.")] = False,
    launcher: Processes = Launcher.none,
) -> None:
    """Train a classifier, detector or segmentor: a recipe, a network, your data."""
    if weights is not None and weights != "none":
        names.check_weights(weights)
    loaded = load(
        recipe,
        cfg_options,
        model=model,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        img_size=img_size,
        freeze=freeze,
        workers=workers,
        val_fraction=val_fraction,
        early_stop=early_stop,
    )
    from hybridzoo.train import engine

    if on_bad_image is not None:
        loaded.on_bad = on_bad_image.value
    scores = engine.train(
        loaded,
        work_dir=work_dir,
        resume=resume,
        amp=amp,
        launcher=launcher.value,
        weights=weights,
        data=data,
        wandb=not no_wandb,
        tensorboard=tensorboard,
        fsdp=fsdp,
        seed=seed,
        device=device,
        pictures=True,
    )
    print_results(scores, engine.folder_of(loaded, work_dir))


@app.command(epilog=examples("check my_photos", "check my_scenes --task detection --out looked_at"))
def check(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A data folder, as `train --data` takes it.")],
    task: Annotated[
        Task | None, typer.Option(help="Default: every task that the folder's layout fits.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the sheets of samples.")] = Path("check"),
    on_bad_image: Annotated[OnBadImage, typer.Option(help="What to do if an image cannot be read.")] = OnBadImage.stop,
    white_value: Annotated[
        float | None, typer.Option(min=0, metavar="X", help="White value of grey pictures with more than 8 bits.")
    ] = None,
    val_fraction: ValFraction = None,
) -> None:
    """Check a data folder as training does: what it holds, what is repaired or left out, and its errors."""
    from hybridzoo.train import check as checks
    from hybridzoo.train.data.holdout import Holdout
    from hybridzoo.train.layouts import How

    holdout = Holdout(val_fraction) if val_fraction is not None else None
    how = How(on_bad=on_bad_image.value, white_value=white_value, holdout=holdout)
    for name in [task.value] if task is not None else checks.find_tasks(data):
        report = checks.inspect(data, name, how)
        print(f"{name}: {data}")
        print(f"layout: {report.layout.name or 'one folder for each class'}")
        for table in tables.data(report):
            tables.show(table)
        for line in report.notes.lines():
            print(line)
        picture = checks.save_sheet(report, out, white_value)
        print(f"samples: {picture}\n")


def run(argv: Sequence[str]) -> int:
    """Run one command line; bad input becomes one line on stderr.

    Args:
        argv: words after the program's name; an empty list shows the help.

    Returns:
        0 on success, 2 on bad input or a missing package, 130 when interrupted, 143 when terminated.
    """
    # mmengine imports transformers if it is installed, and transformers imports torchao: PyTorch then prints warnings.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    command = typer.main.get_command(app)
    try:
        code = command.main(spread_options(argv) or ["--help"], prog_name="hybridzoo", standalone_mode=False)
        if code == 130:  # newer versions of typer catch it
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except BrokenPipeError:  # a reader such as `head` closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        return _fail(f'this needs {package}; type: pip install "hybridzoo[{EXTRAS[package]}]"')
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except Terminated as end:
        if int(os.environ.get("RANK", 0)) == 0:
            print(end, file=sys.stderr)
        return 143
    except Exception as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # mmengine's bare `except` replaced it
            return _interrupted()
        if (said := explain(error)) is not None:
            if os.environ.get("HYBRIDZOO_TRACEBACK"):
                traceback.print_exc()
            return _fail(said)
        # A wrong option, argument or verb. The class differs between versions of typer; this method does not.
        if not hasattr(error, "format_message"):
            raise
        where = getattr(getattr(error, "ctx", None), "command_path", f"hybridzoo {argv[0]}")
        return _fail(f"{error.format_message().rstrip('.')} (see: {where} --help)")


def spread_options(argv: Sequence[str]) -> list[str]:
    """Give each option its own words, as typer needs them.

    `--json` and `--csv` take the next word only if it ends in .json or .csv. `--cfg-options` is repeated before each
    of its k=v words: `-o a b` becomes `-o a -o b`; words with an equals sign belong to the last `--cfg-options` before
    them until another option begins.
    """
    spread: list[str] = []
    collecting = False
    for position, word in enumerate(argv):
        if word == "--":
            return [*spread, *argv[position:]]
        if word in ("--json", "--csv") and not "".join(argv[position + 1 : position + 2]).endswith(word[2:]):
            word += "="
        if word.startswith("-"):
            collecting = word.partition("=")[0] == "--cfg-options"
        elif collecting and "=" in word and spread[-1] != "--cfg-options":
            spread.append("--cfg-options")
        spread.append(word)
    return spread


def _interrupted() -> int:
    print("interrupted", file=sys.stderr)
    return 130


def _fail(message: str) -> int:
    print(f"error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return 2
