"""The command line's verbs for published weights: `hybridzoo checkpoints list | download | verify | convert`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from hybridzoo.checkpoints import cards
from hybridzoo.checkpoints.catalogue import find
from hybridzoo.train import tables
from hybridzoo.train.errors import UserError
from hybridzoo.train.help import examples

WEIGHTS = (".pth", ".pt", ".bin", ".safetensors", ".tar", ".ckpt")  # suffixes of weights files

app = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.callback(
    invoke_without_command=True, epilog=examples("checkpoints list biformer", "checkpoints download biformer_tiny.in1k")
)
def checkpoints(context: typer.Context) -> None:
    """Published weights: list, download, check and convert them."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command("list", epilog=examples("checkpoints list", "checkpoints list 'dinat_*'"))
def list_(
    pattern: Annotated[str, typer.Argument(metavar="PATTERN", help="A part of the name, or with * and ?.")] = "",
) -> None:
    """List the published weights: links, licence, size, and whether they are on this machine."""
    found = cards(pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*", task=None)
    if not found:
        with _user_errors():
            find(pattern)
    from hybridzoo.checkpoints import store

    tables.show(tables.weights([(card, store.cached(card) if card.url else None) for card in found]))


@app.command(epilog=examples("checkpoints download efficientvit_msra_m0", "checkpoints download biformer_tiny.in1k"))
def download(
    names: Annotated[list[str], typer.Argument(metavar="NAME ...", help="MODEL.TAG, or MODEL for its default.")],
) -> None:
    """Download published weights into timm's cache, check them, and print where they are.

    An interrupted download continues. A file that is there is checked.
    """
    with _user_errors():
        found = [find(name) for name in names]  # a misspelt name is an error before the downloads start
        from hybridzoo.checkpoints import store

        for card in found:
            print(store.download(card.name))
            if notice := store.licence_notice(card):
                print(f"note: {notice}", file=sys.stderr)


@app.command(epilog=examples("checkpoints verify efficientvit_msra_m0"))
def verify(
    source: Annotated[str, typer.Argument(metavar="FILE_OR_NAME", help="A file, or MODEL.TAG of a downloaded file.")],
    model: Annotated[str | None, typer.Option(metavar="NAME", help="MODEL.TAG that the file should be.")] = None,
) -> None:
    """Check weights: their hash, that every tensor fits the network, that all numbers are finite."""
    import hybridzoo.backbones  # noqa: F401 - registers the models with timm
    from hybridzoo.checkpoints import store
    from hybridzoo.checkpoints import verify as run_verification

    with _user_errors():
        path: Path | None = Path(source)
        if path is not None and not path.exists() and len(path.parts) == 1 and path.suffix not in WEIGHTS:
            card = store.find(source)
            path, model = store.cached(card), model or card.name
            if path is None:
                raise UserError(f"{card.name} is not here; type: hybridzoo checkpoints download {card.name}")
        assert path is not None
        with tables.waiting(f"checking {path.name}"):
            found = run_verification(path, model)
    tables.show(tables.verification(found))
    if not found.ok:
        raise UserError(f"{found.path}: {'; '.join(found.problems)}")


class Layout(str, Enum):
    hybridzoo = "hybridzoo"
    published = "published"
    timm = "timm"


@app.command(
    epilog=examples(
        "checkpoints convert biformer_tiny_best.pth --model biformer_tiny",
        "checkpoints convert final.pth --model dinat_mini --to published",
    )
)
def convert(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A published file, or a checkpoint that `train` wrote.")],
    model: Annotated[str, typer.Option(metavar="NAME", help="The network: MODEL or MODEL.TAG.")],
    to: Annotated[
        Layout,
        typer.Option(help="Names of the tensors: ours, the authors' (without what their code computes), or timm's."),
    ] = Layout.hybridzoo,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Default FILE.LAYOUT.safetensors, beside FILE.")
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Use the moving average of the weights.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Convert weights to safetensors with other names, with a note about their origin next to it."""
    import hybridzoo.backbones  # noqa: F401 - registers the models with timm
    from hybridzoo.checkpoints import convert_file

    with _user_errors(), tables.waiting(f"converting {file.name}"):
        written = convert_file(file, model, to=to.value, out=out, ema=ema, force=force)
    print(f"{written}\n{written}.json")


@contextmanager
def _user_errors() -> Iterator[None]:
    """Turn errors of the store and the reader into the command line's one-line errors."""
    from hybridzoo.checkpoints.transfer import DownloadError

    try:
        yield
    except (DownloadError, ValueError) as error:
        raise UserError(str(error)) from error
