"""Cards of published weights: typed data, one JSON file per family under `published/`."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import functools
import json
from importlib import resources
from typing import Any, Literal

Status = Literal["ok", "doubtful", "dead", "none"]
Task = Literal["classification", "detection", "segmentation"]


@dataclasses.dataclass(frozen=True)
class Card:
    """One published file, or a model without a published file (`status="none"`).

    Attributes:
        model: registered name.
        tag: timm tag; `model.tag` names the file.
        family: the backbone's module.
        status: of the link: `ok`; `doubtful` (not testable or reported broken); `dead`; `none` (never published).
        url: the authors' link to the file.
        wrapper_key: key of the state dict inside the file.
        licence: of the weights, if the authors state one.
        input_size: `(channels, height, width)` of the published evaluation.
        mean, std, interpolation, crop_pct, crop_mode: of the published evaluation, as timm names them.
        num_classes: of the published classifier.
        model_args: arguments that the network needs for these weights and that differ from the variant's defaults.
        params: number of parameters; for detectors and segmentors that of the classifier with the same backbone.
        gmacs: billions of multiply-accumulates at `input_size`; for detectors and segmentors that of the model's first
            classifier.
        strides, channels: of the model's feature maps with default arguments, finest map first (timm's
            `feature_info`): image pixels per map pixel, and number of channels.
        top1, top5: ImageNet-1k accuracy in percent, as reported by `source`: the authors, or timm for its conversion.
        task: `classification`, `detection` or `segmentation`. Only classifiers are tags of timm; the other files are
            for `download`, `convert` and `--weights`.
        sha256, size: of the file, if known; size in bytes.
        parity: largest difference between our logits and those of the published network with the same weights, in
            float64 and relative to their standard deviation. None if only names and shapes were compared.
        paper: arXiv number.
        notes: remarks to read before using the weights.
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
    strides: tuple[int, ...] = ()
    channels: tuple[int, ...] = ()
    top1: float | None = None
    top5: float | None = None
    source: str = ""
    notes: str = ""
    task: Task = "classification"
    sha256: str = ""
    size: int | None = None
    parity: float | None = None

    @property
    def name(self) -> str:
        return f"{self.model}.{self.tag}" if self.tag else self.model


@functools.cache
def _all_cards() -> tuple[Card, ...]:
    folder = resources.files("hybridzoo.checkpoints") / "published"
    found = []
    for file in sorted((f for f in folder.iterdir() if f.name.endswith(".json")), key=lambda f: f.name):
        family = json.loads(file.read_text(encoding="utf-8"))
        common = {**family["common"], "family": file.name.removesuffix(".json")}
        parity = family.get("parity", {})  # model -> error; the networks of other tags were not measured
        for entry in family["cards"]:
            measured = None if entry.get("model_args") else parity.get(entry["model"])
            found.append(_card({**common, **entry, **family["maps"][entry["model"]], "parity": measured}))
        costs = {card.model: dict(params=card.params, gmacs=card.gmacs) for card in reversed(found)}
        dense = family.get("dense", {"common": {}, "cards": []})  # files of detectors and segmentors
        found += [_card({**common, **costs[e["model"]], **dense["common"], **e}) for e in dense["cards"]]
    return tuple(found)


def _card(entry: dict[str, Any]) -> Card:
    return Card(**{key: _tuples(value) for key, value in entry.items()})


def _tuples(value: Any) -> Any:
    """Replace JSON's lists, at any depth, by tuples."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def cards(pattern: str = "*", task: Task | None = "classification") -> list[Card]:
    """Cards whose model name or `model.tag` matches a shell pattern, in family order; `task=None`: of all tasks."""
    found = [card for card in _all_cards() if task in (None, card.task)]
    if pattern == "*":
        return found
    return [card for card in found if fnmatch.fnmatch(card.model, pattern) or fnmatch.fnmatch(card.name, pattern)]


def find(name: str) -> Card:
    """The card of `model.tag`, or of the default weights of a model.

    Raises:
        ValueError: there is no such card; the message suggests similar names.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"name: {name!r} is not a name of weights; hybridzoo checkpoints list shows all names")
    for card in cards(task=None):
        if name in (card.name, card.model):
            return card
    names = {other for card in cards(task=None) for other in (card.model, card.name)}
    near = difflib.get_close_matches(name, sorted(names), n=3)
    known = f"did you mean {', '.join(near)}?" if near else "hybridzoo checkpoints list shows all names"
    raise ValueError(f"name: no weights are known as {name!r}; {known}")


def model_args(model: str, tag: str | None) -> dict[str, Any]:
    """Arguments that the network needs for the weights `model.tag`; empty for a tag without a card."""
    found = [card.model_args for card in _all_cards() if card.model == model and card.tag == (tag or "")]
    return dict(found[0]) if found else {}


def timm_cfgs(family: str, *, first_conv: str, classifier: str, reduction: int = 32) -> dict[str, Any]:
    """The family's cards as timm default configurations, name -> dict.

    Args:
        family: module name of the backbone.
        first_conv: our name of the convolution whose input is the image.
        classifier: our name of the classifier's linear layer.
        reduction: input pixels per pixel of the last map; its size is rounded up.
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
        if card.family == family and card.task == "classification"
    }
