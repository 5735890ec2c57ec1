"""The network to export (by name, as a pyramid, or from a run), and the metadata that a reader needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_data_config
from torch import Tensor, nn

from hybridzoo import __version__, checkpoints
from hybridzoo.layers.inference import Fusible, fuse
from hybridzoo.train import networks, published
from hybridzoo.train.errors import UserError
from hybridzoo.train.weights import find_weights, load_matching, read_parts


@dataclass
class Source:
    """A network that is ready to be exported.

    Attributes:
        network: in evaluation mode, normalized image (B, channels, H, W) -> a tensor or a tuple of tensors.
        outputs: names of the outputs.
        size: (height, width) of the usual image in pixels.
        channels: number of channels of the image.
        metadata: stored in the file, only types of JSON; see `docs/export.md`.
        graphs: graphs recorded by `capture`, with dynamic or fixed sizes, to be reused by the next format.
    """

    network: nn.Module
    outputs: tuple[str, ...]
    size: tuple[int, int]
    channels: int = 3
    metadata: dict[str, Any] = field(default_factory=dict)
    graphs: dict[bool, Any] = field(default_factory=dict, repr=False)

    def image(self, height: int, width: int, batch: int) -> Tensor:
        """Reproducible noise with the statistics of a normalized image."""
        generator = torch.Generator().manual_seed(height * width + batch)
        return torch.randn(batch, self.channels, height, width, generator=generator)

    def run(self, image: Tensor) -> tuple[Tensor, ...]:
        """The network's outputs, always as a tuple."""
        with torch.no_grad():
            out = self.network(image)
        return (out,) if isinstance(out, Tensor) else tuple(out)


class Pyramid(nn.Module):
    """Maps of all levels of a timm model: image (B, C, H, W) -> tuple of maps (B, channels[i], H / s_i, W / s_i)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.levels = len(model.feature_info)
        model.prune_intermediate_layers(list(range(self.levels)), prune_norm=True, prune_head=True)
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            self.model.forward_intermediates(
                image, indices=list(range(self.levels)), output_fmt="NCHW", intermediates_only=True
            )
        )


def from_name(
    name: str, weights: str | None = None, *, features: bool = False, arguments: dict[str, Any] | None = None
) -> Source:
    """A network by its name, ours or timm's, with weights.

    Args:
        name: `model` or `model.tag`.
        weights: a file or published weights; "none": random weights; None: the weights of the name.
        features: return the maps of all levels instead of logits.
        arguments: of the network, for `timm.create_model`.

    Raises:
        UserError: an unknown name, argument or level, or weights that do not fit or cannot be downloaded.
    """
    model = networks.create("model", name, dict(arguments or {}))
    origin = _load(model, name, weights)
    return _of_timm(model.eval(), name, origin, features)


def _load(model: Any, name: str, weights: str | None) -> str:
    """Load weights into a model; returns their description for the metadata."""
    if weights == "none":
        return "none: random numbers"
    if weights is not None:
        file = find_weights(weights, name.partition(".")[0])
    else:
        try:
            file = published.weights_of(name)
        except published.Unavailable as error:
            raise UserError(
                f"weights of {name}: {error}; name a file (--weights FILE), or export random numbers (--weights none)"
            ) from error
    load_matching(model, read_parts(file, model).network, allow_head_mismatch=False, source=file)
    return str(weights or file.name) if weights is None or not Path(weights).exists() else file.name


def _of_timm(model: Any, name: str, origin: str, features: bool, classes: Sequence[str] = ()) -> Source:
    data = resolve_data_config({}, model=model)
    channels, *size = data["input_size"]
    outputs: tuple[str, ...] = ("logits",)
    network: nn.Module = model
    if features:
        if not hasattr(model, "forward_intermediates"):
            raise UserError(f"--features: {name} cannot return maps, which timm gives it no way to")
        strides = [level["reduction"] for level in model.feature_info]
        distinct = len(set(strides)) == len(strides)
        outputs = tuple(f"stride{s}" if distinct else f"level{i}" for i, s in enumerate(strides))
        network = Pyramid(model).eval()
    metadata = describe(
        "features" if features else "classification",
        name,
        mean=data["mean"],
        std=data["std"],
        size=size,
        resize={"interpolation": data["interpolation"], "crop_pct": data["crop_pct"], "crop_mode": data["crop_mode"]},
        classes=() if features else classes or _imagenet(model),
        weights=origin,
    )
    return Source(network, outputs, (size[0], size[1]), channels, metadata)


def describe(
    task: str,
    model: str,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    size: Sequence[int],
    resize: dict[str, Any],
    classes: Sequence[str],
    weights: str,
    **more: Any,
) -> dict[str, Any]:
    """The metadata of a file; `docs/export.md` describes the keys."""
    return {
        "hybridzoo": __version__,
        "task": task,
        "model": model,
        "weights": weights,
        "licence": _licence(model) if not weights.startswith("none") else "none: random numbers",
        "input": {
            "channels": "RGB",
            "mean": [float(value) for value in mean],
            "std": [float(value) for value in std],
            "size": [int(side) for side in size],
            **resize,
        },
        "classes": list(classes),
        **more,
    }


def _licence(name: str) -> str:
    """The licence of the published weights, from their card or timm."""
    arch = name.partition(".")[0]
    cards = checkpoints.cards(arch, task=None)
    own = next((card for card in cards if card.name == name), next((c for c in cards if c.model == arch), None))
    if own is not None:
        return own.licence or "none stated"
    cfg = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    return (getattr(cfg, "license", None) or "none stated") if cfg is not None else "none stated"


def _imagenet(model: Any) -> list[str]:
    """The class names of ImageNet, if the network has these classes."""
    subset = infer_imagenet_subset(model)
    if subset is None:
        return []
    info = ImageNetInfo(subset)
    return [info.index_to_description(index) for index in range(info.num_classes())]


def fold(network: nn.Module) -> None:
    """Fold the norms of our networks into neighboring layers, in place; the result uses only standard operators."""
    if any(isinstance(module, Fusible) for module in network.modules()):
        fuse(network, portable=True)


Reader = Callable[[Tensor], tuple[Tensor, ...]]
