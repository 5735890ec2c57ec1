"""What `hybridzoo list` and `hybridzoo info` know about models: our cards; of timm's own, the network itself."""

import contextlib
import gc
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hybridzoo.checkpoints import Card, cards
from hybridzoo.train import names
from hybridzoo.train.errors import UserError

if TYPE_CHECKING:
    from torch import nn


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


def find_models(pattern: str = "") -> list[str]:
    """Our models that match a shell pattern; a pattern without wildcards matches anywhere in the name.

    Raises:
        UserError: nothing matches; the message has the nearest names.
    """
    return names.matching(pattern, names.our_models(), "model", "type: hybridzoo list")


def summarize(name: str) -> Summary:
    """The list's line for one of our models: what its default card says."""
    card = _card(name)
    return Summary(name, card.family, card.params, card.input_size, card.top1, card.licence)


def facts(name: str) -> Facts:
    """Gather what is known about one model, `name` or `name.tag`: ours from its card, timm's own by building it.

    Raises:
        UserError: there is no such model, or the model has no such tag.
    """
    names.check_model(name)
    arch, _, tag = name.partition(".")
    if arch not in names.our_models():
        return _timms_facts(name)
    card = _card(arch, tag)
    return Facts(
        name=name,
        family=card.family,
        params=card.params,
        input_size=card.input_size,
        top1=card.top1,
        licence=card.licence,
        macs=round(card.gmacs * 1e9),
        strides=card.strides,
        channels=card.channels,
        num_classes=card.num_classes,
        mean=card.mean,
        std=card.std,
        interpolation=card.interpolation,
        crop_pct=card.crop_pct,
        top5=card.top5,
        source=card.source,
        paper=_papers(card.paper),
        tags=tuple(other.tag for other in cards(arch) if other.model == arch and other.tag),
        weights=f"{card.url} (link {card.status})" if card.url else None,
        notes=card.notes,
    )


def timms_tags(name: str) -> list[str]:
    """The tags of one of timm's own models, given with one of them or none.

    Raises:
        UserError: the model has no such tag.
    """
    with _without("wandb"), _without_collecting():  # timm imports wandb where it is there, for half a second
        import timm  # noqa: F401
    from timm.models._registry import get_arch_pretrained_cfgs

    arch, _, tag = name.partition(".")
    tags = [known.partition(".")[2] for known in get_arch_pretrained_cfgs(arch)]
    if tag and tag not in tags:
        raise UserError(f"model {arch!r} has no tag {tag!r}; it has: {', '.join(tags) or 'none'}")
    return tags


def _timms_facts(name: str) -> Facts:
    tags = timms_tags(name)
    from timm.models import model_entrypoint

    arch = name.partition(".")[0]
    model: Any = _on_meta(name)
    given = model.pretrained_cfg
    input_size = tuple(given["input_size"])
    stages = list(getattr(model, "feature_info", []))
    hub = given.get("hf_hub_id")
    return Facts(
        name=name,
        family=model_entrypoint(arch).__module__.rpartition(".")[2],
        params=sum(parameter.numel() for parameter in model.parameters()),
        input_size=input_size,
        top1=None,
        licence=given.get("license"),
        macs=_macs(name, model, input_size),
        strides=tuple(stage["reduction"] for stage in stages),
        channels=tuple(stage["num_chs"] for stage in stages),
        num_classes=model.num_classes,
        mean=tuple(given["mean"]),
        std=tuple(given["std"]),
        interpolation=given["interpolation"],
        crop_pct=given["crop_pct"],
        top5=None,
        source=given.get("origin_url"),
        paper=", ".join(filter(None, [given.get("paper_name"), _papers(given.get("paper_ids") or ())])) or None,
        tags=tuple(t for t in tags if t),
        weights=f"https://huggingface.co/{hub}" if hub else given.get("url") or None,
        notes=None,
    )


@contextlib.contextmanager
def _without(package: str) -> Iterator[None]:
    """As if a package that is not imported yet were not installed."""
    hidden = package not in sys.modules
    if hidden:
        sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden:
            del sys.modules[package]


@contextlib.contextmanager
def _without_collecting() -> Iterator[None]:
    """Without garbage collection: importing timm creates many objects and little garbage; collecting takes a fifth."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _on_meta(name: str) -> Any:
    """A timm model without memory or initial weights, which cost most of its making."""
    import timm
    import torch

    with torch.device("meta"):
        return timm.create_model(name)


def _macs(name: str, model: "nn.Module", input_size: Sequence[int]) -> int:
    """Of a model on the meta device; a few read numbers out of tensors, and are made again for it."""
    import timm

    try:
        return count_macs(model, input_size)
    except (RuntimeError, NotImplementedError):
        return count_macs(timm.create_model(name), input_size)


def count_macs(model: "nn.Module", input_size: Sequence[int]) -> int:
    """Multiply-accumulates in convolutions and matrix products of one image (C, H, W), counted where the model is."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    device = next(model.parameters()).device
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.eval()(torch.zeros(1, *input_size, device=device))
    return counter.get_total_flops() // 2


def find_recipes(pattern: str = "") -> list[names.Recipe]:
    """The recipes that match, as `find_models` matches; nothing of them is run.

    Raises:
        UserError: nothing matches; the message has the nearest names.
    """
    known = names.recipes()
    return [known[name] for name in names.matching(pattern, known, "recipe", "type: hybridzoo list --recipes")]


def _card(arch: str, tag: str = "") -> Card:
    """The card of `arch.tag`; without a tag that of timm's default tag, which is the first one."""
    return next(card for card in cards(arch) if card.model == arch and tag in ("", card.tag))


def _papers(ids: str | Sequence[str]) -> str:
    """Addresses of papers, given as "arXiv:2303.08810" or as several such."""
    return ", ".join(i.replace("arXiv:", "https://arxiv.org/abs/") for i in ((ids,) if isinstance(ids, str) else ids))
