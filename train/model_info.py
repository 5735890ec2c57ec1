"""What `hybridzoo list` and `hybridzoo info` know about models: timm's registry, our cards, a count of the network."""

import ast
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import model_entrypoint, split_model_name_tag
from timm.models._registry import get_arch_pretrained_cfgs
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import hybridzoo.backbones  # noqa: F401  registers our models with timm
from hybridzoo import checkpoints
from hybridzoo.checkpoints import Card
from hybridzoo.train.errors import UserError


@dataclass(frozen=True)
class Summary:
    """A model's line in the list; None where nothing is published."""

    name: str
    family: str
    params: int
    input_size: tuple[int, ...]
    top1: float | None
    licence: str | None


@dataclass(frozen=True)
class Facts(Summary):
    """All that `info` prints about one model; sizes are (channels, height, width), accuracies are per cent."""

    macs: int
    strides: tuple[int, ...]
    channels: tuple[int, ...]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    top5: float | None
    source: str | None
    paper: str | None
    tags: tuple[str, ...]
    weights: str | None
    notes: str | None


def our_models() -> list[str]:
    """Names that hybridzoo's backbones registered with timm, in timm's natural order."""
    return [name for name in timm.list_models() if model_entrypoint(name).__module__.startswith("hybridzoo.")]


def find_models(pattern: str = "") -> list[str]:
    """Our models that match a shell pattern; a pattern without wildcards matches anywhere in the name.

    Raises:
        UserError: nothing matches; the message has the nearest names.
    """
    ours = our_models()
    found = _matching(pattern, ours)
    if not found:
        raise UserError(f"no model matches {pattern!r}; {suggest(pattern, ours, 'type: hybridzoo list')}")
    return found


def summarize(name: str) -> Summary:
    """The list's line for one of our models: its default card, or the network itself where there is no card."""
    card = _card(name)
    if card is not None:
        return Summary(name, _family(name), card.params, tuple(card.input_size), card.top1, card.licence)
    with torch.device("meta"):  # counting needs shapes, not memory
        model: Any = timm.create_model(name)
    return Summary(name, _family(name), _count(model), tuple(model.pretrained_cfg["input_size"]), None, None)


def facts(name: str) -> Facts:
    """Build one model (`name` or `name.tag`, ours or timm's own) and gather what is known about it.

    MACs of ours are the card's, because an operator may do more arithmetic where that is faster; others are counted.

    Raises:
        UserError: timm knows no such model, or the model has no such tag.
    """
    arch, tag = split_model_name_tag(name)
    if not timm.is_model(arch):
        near = suggest(arch, our_models(), "") or suggest(arch, timm.list_models(), "type: hybridzoo list")
        raise UserError(f"unknown model {name!r}; {near}")
    tags = [known.partition(".")[2] for known in get_arch_pretrained_cfgs(arch)]
    if tag and tag not in tags:
        raise UserError(f"model {arch!r} has no tag {tag!r}; it has: {', '.join(tags) or 'none'}")
    card = _card(arch, tag)
    model: Any = timm.create_model(name)
    given = model.pretrained_cfg
    input_size = tuple(given["input_size"])
    stages = list(getattr(model, "feature_info", []))
    return Facts(
        name=name,
        family=_family(arch),
        params=_count(model),
        input_size=input_size,
        top1=card.top1 if card else None,
        licence=card.licence if card else given.get("license"),
        macs=round(card.gmacs * 1e9) if card else count_macs(model, input_size),
        strides=tuple(stage["reduction"] for stage in stages),
        channels=tuple(stage["num_chs"] for stage in stages),
        num_classes=model.num_classes,
        mean=tuple(given["mean"]),
        std=tuple(given["std"]),
        interpolation=given["interpolation"],
        crop_pct=given["crop_pct"],
        top5=card.top5 if card else None,
        source=card.source if card else given.get("origin_url"),
        paper=_paper(given),
        tags=tuple(t for t in tags if t),
        weights=_weights(card, given),
        notes=card.notes if card else None,
    )


def count_macs(model: nn.Module, input_size: Sequence[int]) -> int:
    """Multiply-accumulates in the convolutions and matrix products of one image (C, H, W), counted on the CPU."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.eval()(torch.zeros(1, *input_size))
    return counter.get_total_flops() // 2


def suggest(word: str, names: Iterable[str], otherwise: str) -> str:
    """A question that offers the nearest of `names`, or `otherwise` when none is near."""
    near = difflib.get_close_matches(word.strip("*"), list(names), n=3, cutoff=0.6)
    return f"did you mean {', '.join(near)}?" if near else otherwise


def find_configs(pattern: str = "") -> list[tuple[str, str, str]]:
    """(name, task, first line of the docstring) of the training configs that match, as `find_models` matches.

    The docstrings are read without running the configs, which would import mmdet and mmseg.

    Raises:
        UserError: nothing matches; the message has the nearest names.
    """
    from hybridzoo.train.config import list_configs  # imports mmengine, which the list of models does without

    known = list_configs()
    found = _matching(pattern, known)
    if not found:
        near = suggest(pattern, known, "type: hybridzoo list --configs")
        raise UserError(f"no config matches {pattern!r}; {near}")
    return [(name, known[name].parent.name, _title(known[name])) for name in found]


def _matching(pattern: str, names: Iterable[str]) -> list[str]:
    wanted = pattern if any(character in pattern for character in "*?[") else f"*{pattern}*"
    return [name for name in names if fnmatchcase(name, wanted)]


def _title(config: Path) -> str:
    docstring = ast.get_docstring(ast.parse(config.read_text(encoding="utf-8")))
    return docstring.splitlines()[0] if docstring else ""


def _card(arch: str, tag: str = "") -> Card | None:
    """The card of `arch.tag`; without a tag the card of timm's default tag, which is the first one."""
    found = {card.tag: card for card in checkpoints.cards(arch) if card.model == arch}
    return found.get(tag) if tag else next(iter(found.values()), None)


def _family(arch: str) -> str:
    """The file that defines the model: `biformer` for backbones/biformer.py."""
    return model_entrypoint(arch).__module__.rpartition(".")[2]


def _weights(card: Card | None, given: dict[str, Any]) -> str | None:
    """Where published weights are, with the state of our card's link; a hub's repository or an address for timm's."""
    if card is not None:
        return f"{card.url} (link {card.status})" if card.url else None
    hub = given.get("hf_hub_id")
    return f"https://huggingface.co/{hub}" if hub else given.get("url") or None


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _paper(given: dict[str, Any]) -> str | None:
    """Title and address of the paper that a timm config names; `paper_ids` is one "arXiv:2303.08810" or several."""
    ids = given.get("paper_ids") or ()
    links = [i.replace("arXiv:", "https://arxiv.org/abs/") for i in ((ids,) if isinstance(ids, str) else ids)]
    return ", ".join(filter(None, [given.get("paper_name"), *links])) or None
