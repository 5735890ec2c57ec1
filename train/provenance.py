"""The origin of a run's weights and its training settings, as plain data in its checkpoints' `meta`.

The licence of published weights applies to every run that starts from them, and to every run that starts from its
result. The list `start` has all these weights, the nearest first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.dist import get_world_size
from mmengine.runner import EpochBasedTrainLoop

from hybridzoo.checkpoints import cards, store
from hybridzoo.train.compose import network_of
from hybridzoo.train.errors import UserError
from hybridzoo.train.weights import peek

KEY = "training"  # key in a checkpoint's `meta`
UNKNOWN = "unknown"
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")  # a repository's folder in the hub's cache
_MOST, _LONGEST = 16, 300
_NUMBERS = ("epochs", "iterations", "batch_size", "lr", "weight_decay", "images", "processes", "seed")
_WORDS = ("recipe", "optimizer", "precision", "data")

Start = dict[str, str]  # name, licence, url


def describe(runner: Any) -> dict[str, Any]:
    """Training settings of a run, for its checkpoints."""
    config = runner.cfg
    if not config.get("train_cfg"):
        return {}
    loop = runner.train_loop
    settings = config.get("optim_wrapper") or {}
    optimizer = settings.get("optimizer") or {}
    loader = config.get("train_dataloader") or {}
    dataset = loader.get("dataset") or {}
    processes = get_world_size()
    steps = settings.get("accumulative_counts") or 1
    epochs = isinstance(loop, EpochBasedTrainLoop)
    place = dataset.get("root") or dataset.get("data_root") or dataset.get("name") or ""
    found = {
        "recipe": Path(config.filename).stem if config.filename else "",
        "epochs": loop.max_epochs if epochs else None,
        "iterations": None if epochs else loop.max_iters,
        "batch_size": (loader.get("batch_size") or 0) * processes * steps or None,
        "optimizer": str(optimizer.get("type", "")),
        "lr": optimizer.get("lr"),
        "weight_decay": optimizer.get("weight_decay"),
        "precision": _precision(runner.optim_wrapper),
        "images": _count(loop.dataloader.dataset),
        "data": "handwritten digits of scikit-learn" if config.get("digits") else Path(str(place)).name,
        "processes": processes,
        "seed": runner.seed,
        "start": list(getattr(runner, "lineage", ())),
    }
    return clean(found)


def clean(found: Any) -> dict[str, Any]:
    """The values in a file's training settings that `describe` writes: numbers and short lines."""
    if not isinstance(found, Mapping):
        return {"start": []}
    kept: dict[str, Any] = {}
    for key in _NUMBERS:
        value: Any = found.get(key)
        if type(value) in (int, float) and abs(value) < 1 << 53:
            kept[key] = value
    for key in _WORDS:
        if _is_line(found.get(key)):
            kept[key] = found[key]
    starts = found.get("start")
    kept["start"] = [
        {key: start[key] if _is_line(start.get(key)) else "" for key in ("name", "licence", "url")}
        for start in (starts if isinstance(starts, list | tuple) else ())[:_MOST]
        if isinstance(start, Mapping)
    ]
    return kept


def start_of(weights: str | Path | None, config: Any) -> list[Start]:
    """The weights that a run starts from, and their own start weights, the nearest first.

    Args:
        weights: the file; None for a run from scratch.
        config: of the run.
    """
    if weights is None:
        return []
    path = Path(weights)
    network = str(network_of(config).get("name", ""))
    if published := _published(path, network):
        return [published]
    try:
        meta = _meta(path)
    except UserError:
        meta = None
    own = {"name": path.name, "licence": UNKNOWN, "url": ""}
    repository = next((found for part in path.parts if (found := _CACHED.fullmatch(part))), None)
    if repository is not None:  # somebody's model on the hub, whose licence is on its card
        own |= {"name": "/".join(repository.groups()), "url": f"https://huggingface.co/{'/'.join(repository.groups())}"}
    if isinstance(meta, dict) and isinstance(meta.get(KEY), dict):
        if repository is None:
            own["licence"] = ""
        return [own, *clean(meta[KEY])["start"]][:_MOST]
    return [own]


def _meta(path: Path) -> Any:
    from hybridzoo.train.hub import folder

    found = folder.meta(path)
    return found if found is not None else peek(path).get("meta")


def _published(path: Path, network: str) -> Start | None:
    model = network.partition(".")[0]
    for card in cards(model, task=None):
        if card.model == model and card.url and store.cached(card) == path:
            return {"name": card.name, "licence": card.licence, "url": card.url}
    if found := re.fullmatch(r"timm-(.+)\.safetensors", path.name):
        from timm.models import get_pretrained_cfg

        name = found[1].removesuffix(".default")
        cfg = get_pretrained_cfg(name)
        place = getattr(cfg, "hf_hub_id", None)
        url = f"https://huggingface.co/{place}" if place else str(getattr(cfg, "url", None) or "")
        return {"name": f"{name} (timm)", "licence": str(getattr(cfg, "license", None) or UNKNOWN), "url": url}
    note = path.with_name(f"{path.name}.json")  # written by `checkpoints convert`
    if note.is_file() and note.stat().st_size < 1 << 20:
        try:
            content = json.loads(note.read_text(encoding="utf-8"))
        except ValueError:
            return None
        if isinstance(content, dict) and _is_line(content.get("model")) and _is_line(content.get("licence")):
            return {"name": content["model"], "licence": content["licence"] or UNKNOWN, "url": ""}
    return None


def _count(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except TypeError:  # a stream of shards
        return None


def _precision(wrapper: Any) -> str:
    dtype = getattr(wrapper, "cast_dtype", None)
    return str(dtype).removeprefix("torch.") if dtype is not None else "float32"


def _is_line(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and len(value) <= _LONGEST
