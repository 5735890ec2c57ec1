"""Names in published state dicts and ours: one module per family, chosen by the model's name.

A module has `convert` and, if the reverse is possible, `publish` (the authors' layout) and `like_timm` (timm's layout).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Literal

from torch import Tensor

from hybridzoo.checkpoints.keymaps import (
    ascan,
    biformer,
    dat,
    dinat,
    efficientvit_mit,
    efficientvit_msra,
    fastervit,
    hosts,
    litv2,
    maxvit,
    overlock,
    patnet,
    ravlt,
)

# Beginning of a model's name -> module with `convert(state_dict, model_name)`
_FAMILIES = {
    "ascan": ascan,
    "agent": hosts,
    "biformer": biformer,
    "inline": hosts,
    "efficientvit_mit": efficientvit_mit,
    "efficientvit_msra": efficientvit_msra,
    "dat": dat,
    "dinat": dinat,
    "litv2": litv2,
    "maxvit": maxvit,
    "nat": dinat,
    "overlock": overlock,
    "partialnet": patnet,
    "patnet": patnet,
    "ravlt": ravlt,
    "vitrpb": dinat,
    "fastervit": fastervit,
}


def convert(state_dict: Mapping[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """A published state dict under our names and shapes, ready for `load_state_dict(strict=True)`.

    Our own names stay unchanged, so converting twice is harmless.

    Args:
        state_dict: published, without its wrapper (`{"model": ...}`); or already ours.
        model_name: registered name, with or without a tag.

    Raises:
        ValueError: no key map for this model.
    """
    return _family(model_name).convert(state_dict, model_name.split(".")[0])


def publish(
    state_dict: Mapping[str, Tensor], model_name: str, layout: Literal["published", "timm"] = "published"
) -> dict[str, Tensor]:
    """A classifier's weights under the names and shapes of the authors' code or of timm: the inverse of `convert`.

    Constants that the published code computes (index buffers, masks, caches) are left out.

    Args:
        state_dict: of our network.
        model_name: registered name, with or without a tag.
        layout: the layout to return.

    Raises:
        ValueError: this model has no such layout.
    """
    family, name = _family(model_name), model_name.split(".")[0]
    way = getattr(family, "publish" if layout == "published" else "like_timm", None)
    if way is None:
        reasons = {
            "published": "no weights in a layout of the authors' own exist",
            "timm": "timm has no network of its own",
        }
        raise ValueError(f"model {name}: {reasons[layout]}")
    return way(state_dict, name)


def _family(model_name: str) -> ModuleType:
    name = model_name.split(".")[0]
    for prefix, module in _FAMILIES.items():
        if name == prefix or name.startswith(f"{prefix}_"):
            return module
    raise ValueError(f"model_name: no published weights are known for {model_name!r}; families: {', '.join(_FAMILIES)}")
