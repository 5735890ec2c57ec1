"""Converts weights between layouts: reads the authors', timm's or ours; writes safetensors and a note of provenance."""

from __future__ import annotations

import dataclasses
import datetime
import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hybridzoo.checkpoints.catalogue import Card, cards
from hybridzoo.checkpoints.files import hash_of
from hybridzoo.checkpoints.keymaps import convert, publish
from hybridzoo.checkpoints.reading import CheckpointError, read_checkpoint, strip_prefixes, unwrap, wrong_numbers
from hybridzoo.checkpoints.writing import place_for, write

Layout = Literal["hybridzoo", "published", "timm"]
KEY_MAP_VERSION = 1  # version of our names; increased when parameters of a network are renamed
_AVERAGES = ("state_dict_ema", "model_ema", "ema")
# A dense backbone's norms of its outputs: ours; published ones: BiFormer's; DiNAT's, Agent-Swin's and InLine-Swin's
_OUT_NORM = re.compile(r"^out_norms\.(\d)\.")
_PUBLISHED_OUT_NORM = re.compile(r"^(?:out_norms\.|extra_norms\.|norm)(\d)\.")


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a state dict.

    Attributes:
        network: the tensors of the classifier or backbone under our names.
        out_norms: the output norms of a backbone of a detector or segmentor, `"<level>.weight"` and `"<level>.bias"`.
        outside: first words of the names of a detector's or segmentor's other parts, such as `neck`.
    """

    network: dict[str, Tensor]
    out_norms: dict[str, Tensor]
    outside: tuple[str, ...]


def split(state: Mapping[str, Tensor], model: str) -> Parts:
    """Split any state dict of `model` into its parts, under our names.

    It may be published, timm's or ours, with or without a wrapper, or a detector's. Names of a model that is not ours
    stay unchanged.
    """
    ours = bool(cards(model))
    state = strip_prefixes(state, dense=False)
    segmentor = any(name.startswith("head.input_ops.") for name in state)  # EfficientViT (MIT)
    dense = segmentor or (
        any(name.startswith("backbone.") for name in state) and not any(".op_list." in name for name in state)
    )
    outside = sorted({name.partition(".")[0] for name in state if not name.startswith("backbone.")}) if dense else []
    if dense and not segmentor:
        state = {name.removeprefix("backbone."): v for name, v in state.items() if name.startswith("backbone.")}
    elif dense:
        state = {name: value for name, value in state.items() if name.startswith("backbone.")}
    # PATNet's own norms are called like the others' output norms
    pattern = _PUBLISHED_OUT_NORM if ours and not model.startswith(("patnet_", "partialnet_")) else _OUT_NORM
    out_norms = {f"{m[1]}.{name[m.end() :]}": v for name, v in state.items() if (m := pattern.match(name))}
    state = {name: value for name, value in state.items() if not pattern.match(name)}
    if dense or out_norms:
        state = strip_prefixes(state, dense=False)  # `backbone.model.`, as ours are
    return Parts(convert(state, model) if ours else state, out_norms, tuple(outside))


def convert_file(
    source: str | Path,
    model: str,
    *,
    to: Layout = "hybridzoo",
    out: str | Path | None = None,
    ema: bool = False,
    force: bool = False,
) -> Path:
    """Write the weights of a checkpoint in another layout, as safetensors; `<out>.json` records their origin.

    Args:
        source: a published file, in the authors' layout or timm's; or a checkpoint of our training, of any task. From a
            detector or segmentor, the backbone is taken.
        model: registered name, with a tag if the weights need other arguments than the defaults.
        to: `"hybridzoo"`: loads strictly into `timm.create_model(model)`; `"published"`: the authors' names and shapes,
            without constants that their code computes; `"timm"`: for timm's own network of the same design.
        out: file to write; default `<source>.<to>.safetensors` beside the source. The file and its note are written
            completely or not at all.
        ema: take the exponential moving average (EMA) that the file stores beside the weights. Without it, the raw
            weights of an mmengine run are taken, even if the run evaluated its EMA; from a published file, the weights
            that its card names.
        force: replace an existing file at `out`, but never the source.

    Returns:
        The file written.

    Raises:
        CheckpointError: the file cannot be read, does not fit the model (the message lists the differences), or does
            not exist in the requested layout; or there is already a file at `out`. Nothing is written.
    """
    if to not in get_args(Layout):
        raise CheckpointError(f"to={to!r}: choose {', '.join(get_args(Layout))}")
    source, card = Path(source), _card(model)
    content = read_checkpoint(source)
    default = source.with_name(f"{_stem(source)}.{to}.safetensors")
    target = place_for(default if out is None else out, source, force=force)
    key, average = _wanted(content, source, ema)
    state, wrapper = unwrap(content, source, key or card.wrapper_key, strict=bool(key))
    if wrapper == "ema_state_dict":
        state.pop("steps", None)  # mmengine's counter
    parts = split(state, card.model)
    parts = check(parts, model, source)
    result = parts.network if to == "hybridzoo" else _in_layout(parts.network, card.model, to)
    note = {
        "model": model,
        "layout": to,
        "source": {"file": source.name, "sha256": hash_of(source), "weights": wrapper},
        "average": average or wrapper in _AVERAGES,
        "left_out": [*parts.outside, *(["output norms"] if parts.out_norms else [])],
        "key_map": KEY_MAP_VERSION,
        "hybridzoo": metadata.version("hybridzoo"),
        "licence": card.licence,
        "parity": card.parity,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    write(result, note, target)
    return target


def _card(model: str) -> Card:
    found = [card for card in cards(model, task=None) if model in (card.name, card.model)]
    if not found:
        known = ", ".join(sorted({card.model for card in cards(f"{model.partition('.')[0][:4]}*")})[:8])
        raise CheckpointError(f"model {model!r}: no such model or tag" + (f"; there are {known}" if known else ""))
    return found[0]


def _wanted(content: Mapping[str, Any], source: Path, ema: bool) -> tuple[str, bool]:
    """The key of the requested weights (empty: the card or a search finds it), and whether they are an average."""
    if "ema_state_dict" in content:  # mmengine swaps the two keys, unless the run evaluated its raw weights
        meta = content.get("meta")
        text = meta.get("cfg") if isinstance(meta, dict) else None
        raw = re.search(r"""evaluate['"]?\s*[=:]\s*['"]raw['"]""", text if isinstance(text, str) else "")
        return ("state_dict" if ema != bool(raw) else "ema_state_dict"), ema
    if not ema:
        return "", False
    for key in _AVERAGES:
        if isinstance(content.get(key), dict):
            return key, True
    raise CheckpointError(f"checkpoint {source}: holds no moving average (its keys: {_listed(map(str, content))})")


def check(parts: Parts, model: str, source: Path) -> Parts:
    """Check that the parts have exactly the network's tensors, with their shapes and dtypes, and finite numbers.

    Returns the parts without tensors that only an optional part of the network has, such as an auxiliary classifier.
    """
    import timm  # imported here because our models import the cards

    card = _card(model)
    # The tag of a detector is not a tag of timm, so its arguments are passed explicitly.
    name, args = (model, {}) if card.task == "classification" else (card.model, card.model_args)
    with torch.device("meta"):
        network: Any = timm.create_model(name, **args)
        classifier = f"{network.pretrained_cfg['classifier']}.weight"
        if classifier in parts.network and len(parts.network[classifier]) != network.num_classes:
            network = timm.create_model(name, num_classes=len(parts.network[classifier]), **args)
    own = network.state_dict()
    idle = tuple(prefix for prefix in getattr(network, "optional", ()) if not any(k.startswith(prefix) for k in own))
    used = {key: value for key, value in parts.network.items() if not (idle and key.startswith(idle))}
    parts = dataclasses.replace(parts, network=used)
    missing = [key for key in own if key not in parts.network]
    if parts.outside or parts.out_norms:  # detectors and segmentors do not use the layers after the last stage
        missing = [key for key in missing if not key.startswith(("norm.", "head."))]
    unexpected = [key for key in parts.network if key not in own]
    both = [(key, parts.network[key], own[key]) for key in own if key in parts.network]
    shapes = [f"{key} {tuple(v.shape)}, not {tuple(o.shape)}" for key, v, o in both if v.shape != o.shape]
    # Only tensors with the network's shape are read: a file may claim any size.
    same = {key: v for key, v, o in both if v.shape == o.shape}
    found = [("missing", missing), ("unexpected", unexpected), ("of another shape", shapes), *wrong_numbers(same, own)]
    if wrong := [f"{len(keys)} {kind}: {_listed(keys)}" for kind, keys in found if keys]:
        others = [o.name for o in cards(card.model) if o.model == card.model and o.model_args != card.model_args]
        hint = f" (other tags: {', '.join(others)})" if others and shapes and not missing else ""
        raise CheckpointError(f"checkpoint {source}: does not fit {model}; {'; '.join(wrong)}{hint}")
    return parts


def _listed(keys: Iterable[str], most: int = 12) -> str:
    keys = list(keys)
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _in_layout(network: dict[str, Tensor], name: str, to: Literal["published", "timm"]) -> dict[str, Tensor]:
    """Our tensors in another layout. Converting them back must give the same tensors."""
    try:
        result = publish(network, name, to)
    except ValueError as error:
        raise CheckpointError(f"to={to!r}: {error}") from error
    back = convert(result, name)
    if back.keys() != network.keys() or not all(_same_bits(back[key], network[key]) for key in network):
        raise CheckpointError(f"to={to!r}: these weights of {name} cannot be converted exactly to this layout")
    return result


def _same_bits(one: Tensor, other: Tensor) -> bool:
    same = (one.dtype, one.shape) == (other.dtype, other.shape)
    return same and torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


def _stem(path: Path) -> str:
    return re.sub(r"(\.(safetensors|pth|pt|bin|tar|ckpt))+$", "", path.name)
