"""Published weights: cards that say what exists, and the maps from published names to ours."""

from hybridzoo.checkpoints.catalogue import Card, cards, markdown_table, model_args, timm_cfgs
from hybridzoo.checkpoints.keymaps import convert

__all__ = ["Card", "cards", "convert", "markdown_table", "model_args", "timm_cfgs"]
