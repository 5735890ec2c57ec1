"""Published weights: cards that list them, and maps from the published names of tensors to ours."""

import importlib
from typing import TYPE_CHECKING, Any

from hybridzoo.checkpoints.catalogue import Card, cards, model_args, timm_cfgs

if TYPE_CHECKING:
    from hybridzoo.checkpoints.conversion import convert_file
    from hybridzoo.checkpoints.keymaps import convert
    from hybridzoo.checkpoints.markdown import markdown_table
    from hybridzoo.checkpoints.store import download
    from hybridzoo.checkpoints.verification import verify

__all__ = [
    "Card",
    "cards",
    "convert",
    "convert_file",
    "download",
    "markdown_table",
    "model_args",
    "timm_cfgs",
    "verify",
]

# Functions that read files need torch, whose import takes seconds. The command line reads the cards without it.
_FIRST_USE = {
    "convert": "keymaps",
    "convert_file": "conversion",
    "download": "store",
    "markdown_table": "markdown",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    if name not in _FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FIRST_USE[name]}"), name)
