"""Names of models and configs on the command line, and suggestions for misspelt ones.

Nothing here imports torch, timm or mmengine, which take seconds, so that a wrong name is an immediate error.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.util
import json
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import hybridzoo.configs
from hybridzoo.checkpoints import cards
from hybridzoo.train.errors import UserError
from hybridzoo.train.hub.folder import is_hub_name, split_name, weights_in

TASKS = ("classification", "detection", "segmentation")

EVERYDAY = {
    "finetune": "classification",
    **dict.fromkeys(("mask-rcnn", "cascade-mask-rcnn", "retinanet", "dino"), "detection"),
    **dict.fromkeys(("upernet", "fpn", "segformer", "mask2former"), "segmentation"),
}

_TIMM_ENTRYPOINT = re.compile(r"^@register_model\s*\ndef (\w+)\(", re.MULTILINE)


def our_models() -> list[str]:
    """The models that hybridzoo registers with timm, in natural order; each has a card."""
    return sorted({card.model for card in cards()}, key=_natural)


@functools.cache
def timm_models() -> frozenset[str]:
    """timm's models, read from its source because importing timm takes seconds."""
    spec = importlib.util.find_spec("timm")
    folders = spec.submodule_search_locations or () if spec is not None else ()
    files = (file for folder in folders for file in Path(folder, "models").glob("*.py"))
    return frozenset(name for file in files for name in _TIMM_ENTRYPOINT.findall(file.read_text(encoding="utf-8")))


def check_model(name: str) -> None:
    """Check that hybridzoo or timm has the model `name` (`MODEL` or `MODEL.TAG`).

    Models that other packages register with timm are not known here.

    Raises:
        UserError: the message has the nearest names.
    """
    arch = name.partition(".")[0]
    ours = our_models()
    if arch in ours:
        tags = [card.tag for card in cards(arch) if card.model == arch and card.tag]
        tag = name.partition(".")[2]
        if tag and tag not in tags:
            raise UserError(f"model {arch!r} has no tag {tag!r}; it has: {', '.join(tags) or 'none'}")
    elif arch not in timm_models():
        near = suggest(arch, ours, "") or suggest(arch, timm_models(), "type: hybridzoo list")
        raise UserError(f"unknown model {name!r}; {near}")


def is_model(word: str) -> bool:
    """Whether a word names a model, with or without a tag, and neither a recipe nor a file."""
    if word.removesuffix(".py") in list_configs() or Path(word).expanduser().is_file():
        return False
    arch = word.partition(".")[0]
    return arch in our_models() or arch in timm_models()


def check_weights(name: str) -> None:
    """Check that `name` can be weights to start from.

    These are a file, a run's folder, a folder for the hub or `hf-hub:USER/NAME`, or published weights (`MODEL.TAG`, or
    `MODEL` for its default).

    Raises:
        UserError: the message has the nearest names.
    """
    if not name:
        raise UserError("weights: is empty; name a file, or published weights (hybridzoo checkpoints list)")
    path = Path(name)
    if is_hub_name(name):
        split_name(name)
        return
    if path.is_dir():
        if weights_in(path) is None and not any(path.glob("*.pth")):
            raise UserError(f"weights {name}: is a folder without a checkpoint; name a file, or a run's folder")
        return
    published = [card.name for card in cards(task=None) if card.url]
    if not path.exists() and name.partition(".")[0] in timm_models() - set(our_models()):
        return  # timm's weights, which timm downloads later
    if not path.exists() and name not in published and name not in {known.partition(".")[0] for known in published}:
        near = suggest(name, published, "type: hybridzoo checkpoints list")
        raise UserError(f"weights {name}: no such file, and no published weights of that name; {near}")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe that can be trained by name, as `hybridzoo list --recipes` shows it.

    Attributes:
        name: for `hybridzoo train`.
        path: the config file, or the file that a published run is based on.
        task: one of `TASKS`.
        network: the published run's, or the recipe's default.
        arguments: of the published run's network.
        changes: further changes of the config for this run.
        score: as published, and `source` where; empty if unknown.
        weights: published weights to start from; empty if the run starts from scratch.
        time: how long it takes, measured or estimated.
        note: differences from the authors' training, and unknown settings.
        published: a run of the authors, not a recipe for the user's data or a demo.
    """

    name: str
    path: Path
    task: str
    network: str = ""
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    score: str = ""
    source: str = ""
    weights: str = ""
    time: str = ""
    note: str = ""
    published: bool = False


@functools.cache
def recipes() -> dict[str, Recipe]:
    """All recipes by name: for the user's data, demos on the embedded digits, then published runs by family."""
    root = Path(hybridzoo.configs.__path__[0])
    found = []
    for path in sorted(root.glob("*.py")):
        if path.stem != "__init__":
            found.append(Recipe(path.stem, path, EVERYDAY[path.stem]))
    for task in TASKS:
        found += [Recipe(path.stem, path, task) for path in sorted((root / task).glob("*.py"))]
    for file in sorted((root / "published").glob("*.json")):
        for name, row in json.loads(file.read_text(encoding="utf-8")).items():
            base = root / "_base_" / f"{row.pop('recipe')}.py"
            changes, task = row.pop("config", {}), base.stem.partition("_")[0]
            found.append(Recipe(name, base, task, changes=changes, published=True, **row))
    return {recipe.name: recipe for recipe in found}


def list_configs() -> dict[str, Path]:
    """Name -> file of every recipe in the package; for a published run, the file that it is based on."""
    return {name: recipe.path for name, recipe in recipes().items()}


def find_config(name_or_path: str | Path) -> Path:
    """The file of a config, given by short name (``biformer_tiny_digits``) or path.

    Raises:
        UserError: neither; the message suggests the nearest names.
    """
    known = list_configs()
    text = str(name_or_path)
    if text.removesuffix(".py") in known:
        return known[text.removesuffix(".py")]
    path = Path(text).expanduser()
    if path.is_file():
        return path
    near = difflib.get_close_matches(path.stem, [*known, *our_models()], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "`hybridzoo list --recipes` shows the known ones"
    raise UserError(f"unknown config {text!r}: {hint}")


def matching(pattern: str, names: Iterable[str], what: str, otherwise: str) -> list[str]:
    """The names that match a shell pattern; a pattern without wildcards matches anywhere in a name.

    Args:
        pattern: a part of a name, or a shell pattern.
        names: names to search.
        what: the names mean, for the message.
        otherwise: what to do if no name is near.

    Raises:
        UserError: nothing matches; the message has the nearest names.
    """
    known = list(names)
    wanted = pattern if any(character in pattern for character in "*?[") else f"*{pattern}*"
    found = [name for name in known if fnmatchcase(name, wanted)]
    if not found:
        raise UserError(f"no {what} matches {pattern!r}; {suggest(pattern, known, otherwise)}")
    return found


def suggest(word: str, names: Iterable[str], otherwise: str) -> str:
    """A question that offers the nearest of `names`, or `otherwise` when none is near."""
    near = difflib.get_close_matches(word.strip("*"), list(names), n=3, cutoff=0.6)
    return f"did you mean {', '.join(near)}?" if near else otherwise


def _natural(name: str) -> list[str | int]:
    """A natural sorting key: "m2" before "m10"."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
