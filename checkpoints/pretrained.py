"""Published weights for timm's `pretrained=True`: the store brings them, safe reading opens them, timm adapts them."""

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
from hybridzoo.checkpoints.keymaps import convert
from hybridzoo.checkpoints.keymaps.sizes import fit
from hybridzoo.checkpoints.reading import CheckpointError, read_checkpoint, strip_prefixes, unwrap

_LOG = logging.getLogger(__name__)
_told: set[str] = set()  # cards whose licence was mentioned


@dataclasses.dataclass(frozen=True)
class Weights:
    """A file that is here, what timm should know of it, and where in it the weights are.

    Attributes:
        path: the file.
        cfg: timm's pretrained configuration.
        wrapper_key: of the state dict, empty if unknown.
        published: it is the card's own file, whose wrapper is certain.
    """

    path: Path
    cfg: dict[str, Any]
    wrapper_key: str
    published: bool

    def into(self, family: Callable[..., nn.Module]) -> Callable[..., Any]:
        """`family`, but each network it makes has these weights.

        timm adapts them to other classes and channels, position tables are resized to the network's image size;
        beyond that they fit completely, or calling it raises a CheckpointError.
        """

        def create(**arguments: Any) -> nn.Module:
            network: Any = family(**arguments)
            state, _ = unwrap(read_checkpoint(self.path), self.path, self.wrapper_key, strict=self.published)
            cfg = {**self.cfg, "state_dict": strip_prefixes(state)}
            classes, channels = network.num_classes, arguments.get("in_chans", 3)
            load_pretrained(network, cfg, num_classes=classes, in_chans=channels, filter_fn=self._converted)
            return network

        return create

    def _converted(self, state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
        """The state dict in our names. Where the classifier differs timm forgives every difference, this does not."""
        name, head = self.cfg["architecture"], f"{self.cfg['classifier']}."
        own = network.state_dict()
        found = fit(convert(state, name), own)
        missing = [key for key in own if key not in found and not key.startswith(head)]
        unexpected = [key for key in found if key not in own and not key.startswith(head)]
        if missing or unexpected:
            lists = ((missing, "missing"), (unexpected, "unexpected"))
            wrong = "; ".join(f"{len(keys)} {what}, first {keys[0]}" for keys, what in lists if keys)
            raise CheckpointError(f"checkpoint {self.path}: does not fit {name}; {wrong}")
        return found


def find_weights(model: str, cfg: Any, cache_dir: str | Path | None = None) -> Weights | None:
    """What `pretrained=True` means for a model of ours; None where timm's own ways lead to it.

    Those are a state dict, a repository of the hub, a folder, or an address that is on no card of ours: timm loads
    them, under our names or published ones.

    Args:
        model: registered name.
        cfg: timm's `PretrainedCfg`, resolved.
        cache_dir: see `store.download`.

    Raises:
        DownloadError: the card's file cannot be had, or there is none.
        CheckpointError: `file` of the configuration does not exist.
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
