"""The command line's verbs for the Hugging Face hub: `hybridzoo hub export | push`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from hybridzoo.train import tables
from hybridzoo.train.errors import UserError
from hybridzoo.train.help import examples

app = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False)

License = Annotated[
    str | None,
    typer.Option("--license", metavar="WORD", help="Identifier, e.g. mit. Default: the start weights'."),
]
Title = Annotated[str | None, typer.Option(metavar="TEXT", help="Of the model card; default the run's name.")]


@app.callback(invoke_without_command=True, epilog=examples("hub export runs/digits --out digits_model"))
def hub(context: typer.Context) -> None:
    """Share a trained model as a folder with a model card, or on the Hugging Face hub."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command(epilog=examples("hub export runs/digits --out digits_model"))
def export(
    run: Annotated[str, typer.Argument(metavar="RUN_OR_FILE", help="A run's folder, or a checkpoint of it.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="The folder to write; default: hub, in the run's folder.")
    ] = None,
    title: Title = None,
    license_: License = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the files in an existing folder.")] = False,
) -> None:
    """Write a trained model as a folder for the hub: safetensors, config and model card.

    A classifier's folder has timm's layout: timm.create_model loads it as
    local-dir:FOLDER. `test` and `predict` take every folder like a run:
    hybridzoo predict FOLDER photo.jpg
    """
    from hybridzoo.train.hub import export as exporting

    with tables.waiting(f"exporting {run}"):
        written = exporting.export(run, out, title=title, licence=license_, force=force)
    print(written.folder)
    if written.warning:
        print(f"note: {written.warning}", file=sys.stderr)


@app.command(epilog=examples("hub push runs/digits --repo-id me/digits --private"))
def push(
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER_OR_RUN", help="A folder from `hub export`, or a run or checkpoint.")
    ],
    repo_id: Annotated[str, typer.Option(metavar="USER/NAME", help="The repository; it is created if needed.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    token: Annotated[str | None, typer.Option(metavar="TOKEN", help="Default: HF_TOKEN, or your login.")] = None,
    title: Title = None,
    license_: License = None,
) -> None:
    """Upload a trained model to the Hugging Face hub, as one commit.

    USER/NAME in the model card becomes the repository's name.
    """
    from hybridzoo.train.hub import folder as folders

    path = Path(folder).expanduser()
    if not path.exists():
        raise UserError(f"{folder}: no such folder or run")
    ready = path.is_dir() and folders.weights_in(path) is not None
    if ready and (title or license_):
        raise UserError(
            f"--{'title' if title else 'license'}: is for `hub export`; {folder} has a model card, edit that"
        )
    from hybridzoo.train.hub import remote

    with tempfile.TemporaryDirectory() as temporary, tables.waiting(f"uploading {folder}"):
        if not ready:
            from hybridzoo.train.hub import export as exporting

            written = exporting.export(path, Path(temporary, "model"), title=title or repo_id, licence=license_)
            path, warning = written.folder, written.warning
        else:
            warning = ""
        address = remote.push(path, repo_id, private=private, token=token)
    print(address)
    if warning:
        print(f"note: {warning}", file=sys.stderr)
