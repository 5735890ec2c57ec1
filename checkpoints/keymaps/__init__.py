"""From the names in published state dicts to ours: one module per family, chosen by the model's name."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from hybridzoo.checkpoints.keymaps import (
    ascan,
    biformer,
    dinat,
    efficientvit_mit,
    efficientvit_msra,
    fastervit,
    hosts,
    maxvit,
    patnet,
)

# First word or words of a model's name -> module with `convert(state_dict, model_name)`
_FAMILIES = {
    "ascan": ascan,
    "agent": hosts,
    "biformer": biformer,
    "inline": hosts,
    "efficientvit_mit": efficientvit_mit,
    "efficientvit_msra": efficientvit_msra,
    "dinat": dinat,
    "maxvit": maxvit,
    "nat": dinat,
    "partialnet": patnet,
    "patnet": patnet,
    "vitrpb": dinat,
    "fastervit": fastervit,
}


def convert(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """A published state dict under our names and shapes, ready for `load_state_dict(strict=True)`.

    Our own names pass through unchanged, so that converting twice does no harm.

    Args:
        state_dict: as published, out of its wrapper (`{"model": ...}`); or already ours.
        model_name: registered name, with or without a tag.

    Raises:
        ValueError: no key map for this model.
    """
    name = model_name.split(".")[0]
    for prefix, module in _FAMILIES.items():
        if name == prefix or name.startswith(f"{prefix}_"):
            return module.convert(state_dict, name)
    raise ValueError(f"model_name: no published weights are known for {model_name!r}; families: {', '.join(_FAMILIES)}")
