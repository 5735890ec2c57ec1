"""Arguments and output that several verbs share; torch and mmengine are imported only when needed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybridzoo.train import names, tables

if TYPE_CHECKING:
    import mmengine


class Launcher(str, Enum):
    none = "none"
    pytorch = "pytorch"
    slurm = "slurm"


CfgOptions = Annotated[
    list[str] | None,
    typer.Option("--cfg-options", metavar="K=V ...", help="Change the config: train_cfg.max_epochs=5 ..."),
]
Data = Annotated[Path | None, typer.Option(metavar="DIR", help="Your own data; its classes are detected.")]
Device = Annotated[str | None, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1; default: a GPU if any.")]
Processes = Annotated[Launcher, typer.Option("--launcher", help="Who started the process: torchrun (pytorch) or srun.")]


def load(name: str, options: Sequence[str] | None, **settings: Any) -> mmengine.Config:
    """A config by name or file; a misspelt name is an error before mmengine is imported.

    Raises:
        UserError: see `hybridzoo.train.config.load_config`.
    """
    if model := settings.get("model"):
        names.check_model(model)
    if not names.is_model(name):
        names.find_config(name)
    from hybridzoo.train.config import load_config

    return load_config(name, options or (), **settings)


def first_process() -> bool:
    """Whether this is the one of torchrun's processes that prints."""
    return int(os.environ.get("RANK", 0)) == 0


def print_results(scores: dict[str, float], folder: Path) -> None:
    """Print the metrics, the table of classes, and the folder with the rest."""
    if not first_process():
        return
    tables.show(tables.scores(scores))
    from hybridzoo.train import results

    if not (folder / results.NAME).is_file():
        return
    content = results.read(folder)
    if content.get("per_class"):
        tables.show(tables.classes(content["per_class"]))
    pictures = [name for name in results.PICTURES if (folder / name).is_file()]
    print(f"results: {folder / results.NAME}{', ' if pictures else ''}{', '.join(pictures)}")
