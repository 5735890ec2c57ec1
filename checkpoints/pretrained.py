"""Published weights for timm's `pretrained=True`: downloaded by the store, read safely, and adapted by timm."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from timm.models import load_pretrained
from torch import Tensor, nn

from hybridzoo.checkpoints import store
from hybridzoo.checkpoints.catalogue import Card, cards
from hybridzoo.checkpoints.conversion import split
from hybridzoo.checkpoints.keymaps import sizes
from hybridzoo.checkpoints.reading import CheckpointError, read_checkpoint, unwrap, wrong_numbers

_LOG = logging.getLogger(__name__)
_told: set[str] = set()  # cards whose licence has been reported


@dataclasses.dataclass(frozen=True)
class Weights:
    """A local file, its timm configuration, and the position of the weights in it.

    Attributes:
        path: the file.
        cfg: timm's pretrained configuration.
        wrapper_key: key of the state dict; empty if unknown.
        published: whether it is the card's own file, whose wrapper key is known.
    """

    path: Path
    cfg: dict[str, Any]
    wrapper_key: str
    published: bool

    def into(self, family: Callable[..., nn.Module], *, features_only: bool = False) -> Callable[..., Any]:
        """Wrap `family` so that each network that it creates has these weights.

        timm adapts the first convolution to other input channels, position tables are resized to the network's image
        size, and a classifier with another number of classes gets new weights. All other tensors must fit; otherwise
        the call raises a CheckpointError.

        Args:
            family: creates a network.
            features_only: no layer after the stages will be used.
        """

        def create(**arguments: Any) -> nn.Module:
            network: Any = family(**arguments)
            state, _ = unwrap(read_checkpoint(self.path), self.path, self.wrapper_key, strict=self.published)
            found = self._fitting(split(state, self.cfg["architecture"]).network, network, features_only)
            cfg = {**self.cfg, "state_dict": found}
            channels, complete = arguments.get("in_chans", 3), len(found) == len(network.state_dict())
            load_pretrained(network, cfg, num_classes=cfg["num_classes"], in_chans=channels, strict=complete)
            return network

        return create

    def _fitting(self, state: Mapping[str, Tensor], network: Any, features_only: bool) -> dict[str, Tensor]:
        """The tensors of a state dict under our names that the network loads: all, with the exceptions of `into`."""
        own = network.state_dict()
        found = dict(network.fit_state(sizes.fit(state, own)))
        forgiven = self._forgiven(found, network, features_only)
        missing = [key for key in own if key not in found and not key.startswith(forgiven)]
        unexpected = [key for key in found if key not in own and not key.startswith(forgiven)]
        differing = [key for key in found if key in own and found[key].shape != own[key].shape]
        resized = [
            key
            for key in differing
            if self._is_adapted(found[key], own[key], key) or sizes.takes(network, key, found[key])
        ]
        reshaped = [
            f"{key} {tuple(found[key].shape)}, not {tuple(own[key].shape)}"
            for key in differing
            if key not in resized and not key.startswith(forgiven if features_only else network.optional)
        ]
        used = {key: found[key] for key in found if key in own and (key not in differing or key in resized)}
        lists = [(missing, "missing"), (unexpected, "unexpected"), (reshaped, "of another shape")]
        lists += [(keys, what) for what, keys in wrong_numbers(used, own)]
        if wrong := "; ".join(f"{len(keys)} {what}, first {keys[0]}" for keys, what in lists if keys):
            raise CheckpointError(f"checkpoint {self.path}: does not fit {self.cfg['architecture']}; {wrong}")
        return used

    def _forgiven(self, found: dict[str, Tensor], network: Any, features_only: bool) -> tuple[str, ...]:
        """First words of the names that may exist only in the file or only in the network."""
        classifier, optional = f"{self.cfg['classifier']}.", network.optional
        if features_only or network.num_classes == 0:
            headless = not any(key.startswith(("norm.", "head.")) for key in found)  # of a detector
            return ("norm.", "head.", *optional) if headless else ("head.", *optional)
        weight = found.get(f"{classifier}weight")
        classes = self.cfg["num_classes"] if weight is None else len(weight)
        if classes == network.num_classes:
            return optional
        if network.num_classes == self.cfg["num_classes"]:  # no other classifier was requested
            message = f"its classifier has {classes} classes, not {network.num_classes}: set num_classes={classes}"
            raise CheckpointError(f"checkpoint {self.path}: {message}, or another number for a fresh classifier")
        for part in ("weight", "bias"):
            found.pop(f"{classifier}{part}", None)
        return (classifier, *optional)

    def _is_adapted(self, value: Tensor, own: Tensor, key: str) -> bool:
        """Whether timm adapts the weight of the first convolution to another number of channels."""
        same = value.ndim == own.ndim and value.shape[:1] + value.shape[2:] == own.shape[:1] + own.shape[2:]
        return key == f"{self.cfg['first_conv']}.weight" and same and value.shape[1] == self.cfg["input_size"][0]


def in_our_names(state: Mapping[str, Any], model: str) -> dict[str, Tensor]:
    """Our, a published or timm's state dict, with or without a wrapper, under our names; for timm's own loaders."""
    known = next((card.wrapper_key for card in cards(model) if card.wrapper_key), None)
    return split(unwrap(state, "given", known, strict=False)[0], model).network


def find_weights(model: str, cfg: Any, cache_dir: str | Path | None = None) -> Weights | None:
    """The weights that `pretrained=True` loads for one of our models; None if timm loads them itself.

    timm itself loads a state dict, a repository of the hub, a folder, or an address that is not on our cards. The names
    may be ours or published ones.

    Args:
        model: registered name.
        cfg: timm's `PretrainedCfg`, resolved.
        cache_dir: see `store.download`.

    Raises:
        DownloadError: the card's file cannot be downloaded, or there is none.
        CheckpointError: `file` in the configuration does not exist.
    """
    if cfg.state_dict or cfg.hf_hub_id or cfg.source in ("hf-hub", "local-dir"):
        return None
    own = [card for card in cards(model) if card.model == model and card.task == "classification"]
    card = next((card for card in own if card.tag == (cfg.tag or "")), None)
    if cfg.file:
        return Weights(Path(cfg.file), cfg.to_dict(), card.wrapper_key if card else "", published=False)
    if cfg.url and (card is None or card.url != cfg.url):
        card = next((card for card in own if card.url == cfg.url), None)
    if card is None:
        return None
    path = store.download(card.name, cache_dir=cache_dir)
    _mention_licence(card)
    return Weights(path, cfg.to_dict(), card.wrapper_key, published=True)


def _mention_licence(card: Card) -> None:
    notice = store.licence_notice(card)
    if notice and card.name not in _told:
        _told.add(card.name)
        _LOG.info(notice)
