"""Published weights: cards that say what exists, and the maps from published names to ours."""

from hybridzoo.checkpoints.catalogue import Card, cards, model_args, timm_cfgs
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
