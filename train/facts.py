"""What recipes need to know of a network: read from the network itself, built without weights."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import timm
import torch
from timm.models import group_parameters

from hybridzoo.train.errors import UserError
from hybridzoo.train.networks import check_name

# The stem learns at this fraction of the heads' rate, for every depth of the network.
STEM_RATE = 0.1
# Arguments that let a timm network with a fixed size take any size; tried in this order.
_ANY_SIZE: tuple[dict[str, Any], ...] = (
    {},
    {"dynamic_img_size": True},
    {"strict_img_size": False, "dynamic_mask": True},
    {"strict_img_size": False},
)
_PROBE = (160, 224)  # a size that no network has


@dataclass(frozen=True)
class Network:
    """The properties of a network that recipes use.

    Attributes:
        levels: (width, stride) of each feature level of timm.
        depth: number of layers, as its layer decay counts them; 0 if unknown.
        size: side of its published input in pixels.
        mean, std: of the input, for values in [0, 1].
        interpolation, crop_pct: of its published evaluation.
        any_size: arguments for images of other sizes than the published one: those that the network defines, or those
            that it needs to take such images.
    """

    name: str
    levels: tuple[tuple[int, int], ...]
    depth: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    any_size: tuple[tuple[str, Any], ...]

    @property
    def layer_decay(self) -> float | None:
        """Factor from layer to layer with which the stem learns at `STEM_RATE`."""
        return round(STEM_RATE ** (1 / self.depth), 4) if self.depth else None


def read_network(name: str, **arguments: Any) -> Network:
    """The properties of a timm model, without its weights (on the meta device).

    Args:
        name: of the model, with or without a tag.
        **arguments: for `timm.create_model`.

    Raises:
        UserError: unknown model, or an argument that it does not take.
    """
    check_name(name)
    return _read(name, _frozen({key: value for key, value in arguments.items() if not key.startswith("pretrained")}))


@lru_cache(maxsize=256)
def _read(name: str, frozen: Any) -> Network:
    arguments = _thawed(frozen)
    model = _make(name, arguments)
    info = [(level["num_chs"], level["reduction"]) for level in model.feature_info]
    cfg = model.pretrained_cfg
    depth = 0
    if hasattr(model, "group_matcher"):
        depth = max(group_parameters(model, model.group_matcher(coarse=False), reverse=True).values())
    mean, std = cfg["mean"], cfg["std"]
    said = {key: value for key, value in getattr(model, "for_other_sizes", {}).items() if key not in arguments}
    return Network(
        name=name,
        levels=tuple(info),
        depth=depth,
        size=int(cfg["input_size"][-1]),
        mean=tuple(mean),
        std=tuple(std),
        interpolation=cfg.get("interpolation") or "bicubic",
        crop_pct=float(cfg.get("crop_pct") or 0.875),
        any_size=tuple((said or _any_size(name, arguments, bool(cfg.get("fixed_input_size")))).items()),
    )


def _make(name: str, arguments: dict[str, Any]) -> Any:
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            return timm.create_model(name, **arguments)
    except TypeError as error:  # an argument of another family
        raise UserError(f"model {name}: {error}") from error


@lru_cache(maxsize=256)
def takes(name: str, argument: str, value: float = 0.0) -> bool:
    """Whether a model has an argument and can be built with that value."""
    try:
        _make(name, {argument: value})
    except UserError:
        return False
    return True


def _any_size(name: str, arguments: dict[str, Any], fixed: bool) -> dict[str, Any]:
    """The arguments that let a network with a fixed size take any size; empty if it takes any, or never does."""
    if not fixed:
        return {}
    for extra in _ANY_SIZE:
        if extra.keys() & arguments.keys():
            continue
        try:
            model = _make(name, {**arguments, **extra}).eval()
            with torch.no_grad():
                model.forward_features(torch.empty(1, 3, *_PROBE, device="meta"))
        except Exception:
            continue
        return extra
    return {}


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return ("dict", tuple(sorted((key, _frozen(item)) for key, item in value.items())))
    if isinstance(value, list | tuple):
        return (type(value).__name__, tuple(_frozen(item) for item in value))
    return ("value", value)


def _thawed(frozen: Any) -> Any:
    kind, value = frozen
    if kind == "dict":
        return {key: _thawed(item) for key, item in value}
    if kind in ("list", "tuple"):
        return (list if kind == "list" else tuple)(_thawed(item) for item in value)
    return value
