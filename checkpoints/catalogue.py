"""Cards of published weights: typed data, one JSON file per family under `published/`."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import json
from importlib import resources
from typing import Any, Literal

Status = Literal["ok", "doubtful", "dead", "none"]


@dataclasses.dataclass(frozen=True)
class Card:
    """One published file, or a model that has none (`status="none"`).

    Attributes:
        model: registered name.
        tag: timm tag; `model.tag` names the file.
        family: the backbone's module.
        status: of the link: `ok`; `doubtful` (not testable or reported broken); `dead`; `none` (never published).
        url: where the authors put the file.
        wrapper_key: key of the state dict inside the file.
        licence: of the weights, as far as stated.
        input_size: `(channels, height, width)` of the published evaluation.
        mean, std, interpolation, crop_pct: of the published evaluation.
        num_classes: of the published classifier.
        params: number of parameters.
        gmacs: billions of multiply-accumulates at `input_size`.
        top1, top5: published ImageNet-1k accuracy in percent, with `source`.
        paper: reference.
        notes: what a user should know before loading.
    """

    model: str
    family: str
    params: int
    gmacs: float
    paper: str
    tag: str = ""
    status: Status = "none"
    url: str = ""
    wrapper_key: str = ""
    licence: str = ""
    input_size: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    num_classes: int = 1000
    top1: float | None = None
    top5: float | None = None
    source: str = ""
    notes: str = ""

    @property
    def name(self) -> str:
        return f"{self.model}.{self.tag}" if self.tag else self.model


@functools.cache
def _all_cards() -> tuple[Card, ...]:
    folder = resources.files("hybridzoo.checkpoints") / "published"
    found = []
    for file in sorted((f for f in folder.iterdir() if f.name.endswith(".json")), key=lambda f: f.name):
        family = json.loads(file.read_text(encoding="utf-8"))
        for entry in family["cards"]:
            merged = {**family["common"], **entry, "family": file.name.removesuffix(".json")}
            fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in merged.items()}
            found.append(Card(**fields))
    return tuple(found)


def cards(pattern: str = "*") -> list[Card]:
    """Cards whose model name or `model.tag` matches a shell pattern, in family order."""
    return [c for c in _all_cards() if fnmatch.fnmatch(c.model, pattern) or fnmatch.fnmatch(c.name, pattern)]


def timm_cfgs(family: str, *, first_conv: str, classifier: str) -> dict[str, Any]:
    """The family's cards as timm default configurations, name -> dict.

    Args:
        family: module name of the backbone.
        first_conv: our name of the convolution that reads the image.
        classifier: our name of the classifier's linear layer.
    """
    return {
        card.name: dict(
            url=card.url,
            num_classes=card.num_classes,
            input_size=card.input_size,
            pool_size=(card.input_size[1] // 32, card.input_size[2] // 32),
            crop_pct=card.crop_pct,
            interpolation=card.interpolation,
            mean=card.mean,
            std=card.std,
            first_conv=first_conv,
            classifier=classifier,
            license=card.licence,
            paper_ids=card.paper,
        )
        for card in _all_cards()
        if card.family == family
    }
