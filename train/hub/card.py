"""The model card of a trained model, `README.md`, for readers and for the hub."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from hybridzoo.checkpoints import cards, papers
from hybridzoo.train.hub.licences import Licence
from hybridzoo.train.names import our_models
from hybridzoo.train.plain import printable

PLACE = "USER/NAME"  # placeholder of the repository until the folder is pushed
_MOST_CLASSES = 50  # class names that a card lists
_PIPELINES = {
    "classification": "image-classification",
    "detection": "object-detection",
    "segmentation": "image-segmentation",
}
# Metric of a validation -> the hub's type of metric, and its name in the card.
_METRICS: dict[str, tuple[str, str]] = {
    "accuracy/top1": ("accuracy", "top-1 accuracy, %"),
    "accuracy/top5": ("accuracy", "top-5 accuracy, %"),
    "coco/bbox_mAP": ("mean_average_precision", "box AP (0 to 1)"),
    "coco/bbox_mAP_50": ("mean_average_precision", "box AP50 (0 to 1)"),
    "coco/bbox_mAP_75": ("mean_average_precision", "box AP75 (0 to 1)"),
    "coco/segm_mAP": ("mean_average_precision", "mask AP (0 to 1)"),
    "coco/segm_mAP_50": ("mean_average_precision", "mask AP50 (0 to 1)"),
    "coco/segm_mAP_75": ("mean_average_precision", "mask AP75 (0 to 1)"),
    "mIoU": ("mean_iou", "mIoU, %"),
    "mAcc": ("accuracy", "mean class accuracy, %"),
    "aAcc": ("accuracy", "pixel accuracy, %"),
}


@dataclasses.dataclass(frozen=True)
class Facts:
    """The content of a card.

    Attributes:
        title: title of the card.
        task: "classification", "detection" or "segmentation".
        setup: the checkpoint's setup.
        names: class names.
        training: see `hybridzoo.train.provenance`.
        licence: licence of the weights.
        results: `results.json` of the checkpoint, empty if nothing was measured.
        parameters: number of parameters.
        kind: class of the model, e.g. "MaskRCNN".
    """

    title: str
    task: str
    setup: Mapping[str, Any]
    names: Sequence[str]
    training: Mapping[str, Any]
    licence: Licence
    results: Mapping[str, Any]
    parameters: int
    kind: str

    @property
    def network(self) -> str:
        model = self.setup["model"]
        return str(model.get("backbone", model).get("name", ""))


def library(network: str) -> str:
    """The library that the hub's page names for a classifier: only timm's own networks load with timm alone."""
    return "hybridzoo" if network.partition(".")[0] in our_models() else "timm"


def text(facts: Facts) -> str:
    """The card: YAML front matter, then Markdown."""
    parts = [
        f"# {facts.title}",
        _what(facts),
        "## How to load it",
        _loading(facts),
        "## Results",
        *_results(facts),
        "## Data",
        *_data(facts),
        "## Training",
        *_training(facts),
        "## Licence",
        facts.licence.text,
        "## Citation",
        *_citation(facts),
    ]
    return f"---\n{_front_matter(facts)}\n---\n\n" + "\n\n".join(parts) + "\n"


def _front_matter(facts: Facts) -> str:
    dense = facts.task != "classification"
    name = "hybridzoo" if dense else library(facts.network)
    tags = [_PIPELINES[facts.task], "hybridzoo", "timm", facts.network.partition(".")[0]]
    measured = list(_measured(facts))
    results = [
        EvalResult(
            task_type=_PIPELINES[facts.task],
            dataset_type=_slug(_dataset(facts)),
            dataset_name=_dataset(facts),
            dataset_split=str(facts.results.get("split", "val")),
            metric_type=kind,
            metric_name=label,
            metric_value=value,
        )
        for kind, label, value in measured
    ]
    data = ModelCardData(
        license=facts.licence.word,
        license_name=facts.licence.name or None,
        license_link=facts.licence.link or None,
        library_name=name,
        pipeline_tag=_PIPELINES[facts.task],
        tags=list(dict.fromkeys(tags)),
        base_model=_base_model(facts),
        metrics=sorted({kind for kind, _, _ in measured}) or None,
        model_name=facts.title if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def _base_model(facts: Facts) -> str | None:
    """The hub repository that the training started from, if any."""
    for start in facts.training["start"]:
        address = start["url"].partition("https://huggingface.co/")[2].split("/")
        if len(address) >= 2:
            return "/".join(address[:2])
    return None


def _what(facts: Facts) -> str:
    classes = f"{len(facts.names)} class{'es' if len(facts.names) != 1 else ''}"
    size = f"{facts.parameters / 1e6:.1f} M parameters"
    made = "trained with hybridzoo"
    if facts.task == "classification":
        return f"An image classifier of {classes}: `{facts.network}`, {size}, {made}."
    thing = "A detector" if facts.task == "detection" else "A segmentor"
    return f"{thing} of {classes}: {facts.kind} on the backbone `{facts.network}`, {size}, {made}."


def _loading(facts: Facts) -> str:
    if facts.task != "classification":
        return f"""```sh
pip install "hybridzoo[{facts.task}]"
hybridzoo predict hf-hub:{PLACE} photo.jpg     # or the folder of this file
hybridzoo test hf-hub:{PLACE} --data DIR
```

```python
from hybridzoo.train.engine import build_for_inference

model = build_for_inference(None, "hf-hub:{PLACE}")  # a torch module; model.dataset_meta["classes"] has the names
```"""
    ours = library(facts.network) == "hybridzoo"
    register = "import hybridzoo  # registers the network; without it timm says: Unknown model\n" if ours else ""
    return f"""```sh
pip install {"hybridzoo" if ours else "timm"}
```

```python
import timm
import torch
{register}from PIL import Image

model = timm.create_model("hf-hub:{PLACE}", pretrained=True).eval()  # or "local-dir:FOLDER"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = Image.open("photo.jpg").convert("RGB")
with torch.no_grad():
    scores = model(transform(image)[None]).softmax(-1)[0]
print(model.pretrained_cfg["label_names"][int(scores.argmax())], float(scores.max()))
```

`hybridzoo predict hf-hub:{PLACE} photo.jpg` does the same on the command line; `hybridzoo test` measures the model."""


def _measured(facts: Facts) -> Iterator[tuple[str, str, float]]:
    """Type, name and value of each known metric."""
    found = facts.results.get("metrics") or {}
    for name, (kind, label) in _METRICS.items():
        value = found.get(name)
        if isinstance(value, int | float) and not (name == "accuracy/top5" and len(facts.names) <= 5):
            yield kind, label, round(float(value), 4)


def _results(facts: Facts) -> Iterator[str]:
    measured = list(_measured(facts))
    if not measured:
        yield "No scores are recorded with these weights."
        return
    count = facts.results.get("images")
    images = f", {count:,} images" if isinstance(count, int) else ""
    yield f"On `{_dataset(facts)}` ({facts.results.get('split', 'val')}{images}):"
    rows = "\n".join(f"| {label} | {value:g} |" for _, label, value in measured)
    yield f"| metric | value |\n| --- | --- |\n{rows}"


def _data(facts: Facts) -> Iterator[str]:
    count = facts.training.get("images")
    name = facts.training.get("data")
    if name:
        yield f"Trained on `{_cell(name)}`" + (f", {count:,} images." if isinstance(count, int) else ".")
    listed = ", ".join(f"`{_cell(name)}`" for name in facts.names[:_MOST_CLASSES])
    more = len(facts.names) - _MOST_CLASSES
    yield f"Classes: {listed}" + (f" and {more} more, see `config.json`." if more > 0 else ".")
    if facts.task == "classification":
        how = facts.setup["input"]
        size = how.get("input_size")
        side = size if isinstance(size, int) else "x".join(map(str, size[-2:])) if size else "?"
        yield f"Input: RGB, {side} px, {how.get('interpolation', 'bilinear')}; any other size from 32 px works too."


def _training(facts: Facts) -> Iterator[str]:
    found = facts.training
    if "recipe" not in found:
        yield f"With hybridzoo, as `{facts.setup['name']}`; the checkpoint has no further information."
        return
    count = found.get("epochs")
    length = f"{count} epoch{'s' * (count != 1)}" if count is not None else f"{found.get('iterations', '?')} iterations"
    rows = [
        ("recipe", found["recipe"]),
        ("start", ", ".join(f"`{_cell(start['name'])}`" for start in found["start"][:1]) or "from scratch"),
        ("length", length),
        ("images in a batch", found.get("batch_size")),
        ("optimizer", found.get("optimizer")),
        ("learning rate", found.get("lr")),
        ("weight decay", found.get("weight_decay")),
        ("precision", found.get("precision")),
        ("processes", found.get("processes")),
        ("seed", found.get("seed")),
    ]
    lines = "\n".join(f"| {key} | {value} |" for key, value in rows if value not in (None, ""))
    yield f"| | |\n| --- | --- |\n{lines}"


def _citation(facts: Facts) -> Iterator[str]:
    model = facts.network.partition(".")[0]
    card = next((card for card in cards(model, task=None) if card.model == model), None)
    paper = papers.find(card.paper) if card is not None else None
    if paper is None:
        yield f"The network `{facts.network}` is timm's; timm's documentation names the paper."
        return
    yield f"The network is from this paper:\n\n```bibtex\n{paper.bibtex()}\n```"


def _dataset(facts: Facts) -> str:
    """Name of the data: the last part of its path, because the whole path may be private."""
    place = facts.results.get("data")
    if facts.setup.get("digits"):
        return str(facts.training.get("data") or "handwritten digits of scikit-learn")
    name = str(place).replace("\\", "/").rstrip("/").rpartition("/")[2] if place else ""
    return _cell(name) if name not in ("", "None") else str(facts.training.get("data") or "validation data")


def _slug(name: str) -> str:
    return "".join(sign if sign.isalnum() or sign in "-_." else "-" for sign in name.lower()).strip("-") or "data"


def _cell(text: str) -> str:
    """Foreign text in backticks, for a table."""
    return printable(text).replace("`", "'").replace("|", "/")
