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
        mean, std, interpolation, crop_pct, crop_mode: of the published evaluation, as timm names them.
        num_classes: of the published classifier.
        model_args: arguments of the network that these weights need and that the variant does not have by itself.
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
    crop_mode: str = "center"
    num_classes: int = 1000
    model_args: dict[str, Any] = dataclasses.field(default_factory=dict)
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
            found.append(Card(**{key: _tuples(value) for key, value in merged.items()}))
    return tuple(found)


def _tuples(value: Any) -> Any:
    """JSON's lists, at any depth, as the tuples that they stand for."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def cards(pattern: str = "*") -> list[Card]:
    """Cards whose model name or `model.tag` matches a shell pattern, in family order."""
    return [c for c in _all_cards() if fnmatch.fnmatch(c.model, pattern) or fnmatch.fnmatch(c.name, pattern)]


def model_args(model: str, tag: str | None) -> dict[str, Any]:
    """Arguments of the network that the weights `model.tag` need; none for a tag without a card."""
    found = [card.model_args for card in _all_cards() if card.model == model and card.tag == (tag or "")]
    return dict(found[0]) if found else {}


def timm_cfgs(family: str, *, first_conv: str, classifier: str, reduction: int = 32) -> dict[str, Any]:
    """The family's cards as timm default configurations, name -> dict.

    Args:
        family: module name of the backbone.
        first_conv: our name of the convolution that reads the image.
        classifier: our name of the classifier's linear layer.
        reduction: input pixels per pixel of the last map, whose size rounds up.
    """
    return {
        card.name: dict(
            url=card.url,
            num_classes=card.num_classes,
            input_size=card.input_size,
            pool_size=(-(-card.input_size[1] // reduction), -(-card.input_size[2] // reduction)),
            crop_pct=card.crop_pct,
            crop_mode=card.crop_mode,
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


def markdown_table() -> str:
    """All cards as a Markdown table, a line each; `docs/models.md` holds it."""
    head = ("model and tag", "parameters", "GMACs", "input", "top-1", "weights", "licence of the weights")
    lines = [head, ("---",) * len(head)]
    for card in sorted(_all_cards(), key=lambda card: card.family):
        lines.append(
            (
                f"`{card.name}`",
                f"{card.params / 1e6:.1f} M",
                f"{card.gmacs:.2f}",
                f"{card.input_size[1]} x {card.input_size[2]}",
                "-" if card.top1 is None else f"{card.top1:.1f}",
                {"ok": "yes", "doubtful": "doubtful link", "dead": "dead link", "none": "none public"}[card.status],
                card.licence.partition(" (")[0] or "-",
            )
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
