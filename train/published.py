"""The published weights of a network's name: ours from their cards, timm's from the hub, kept in a cache."""

from __future__ import annotations

import os
import socket
import urllib.request
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import timm
import torch
from timm.models import get_pretrained_cfg

from hybridzoo import checkpoints
from hybridzoo.checkpoints import store
from hybridzoo.train.errors import UserError
from hybridzoo.train.weights import find_weights

PATIENCE = 5  # seconds for a first answer: without a network, nobody should wait for all retries
_FILES = ("model.safetensors", "pytorch_model.bin")


class Unavailable(Exception):
    """A network has no published weights, or they cannot be downloaded here; the text says which."""


def weights_of(name: str) -> Path:
    """The file with a network's published classification weights.

    Args:
        name: `model` or `model.tag`.

    Raises:
        Unavailable: no weights are published, or they cannot be downloaded.
    """
    model, _, tag = name.partition(".")
    own = [card for card in checkpoints.cards(model, task=None) if card.model == model]
    if not own:
        return _timms(name)
    wanted = [card for card in own if card.url and (card.tag == tag if tag else card.task == "classification")]
    if not wanted:
        raise Unavailable("none are published")
    if store.cached(wanted[0]) is None:
        knock(wanted[0].url)
    try:
        return find_weights(wanted[0].name, model)
    except UserError as error:
        raise Unavailable(_short(error)) from error


def _timms(name: str) -> Path:
    """timm's weights as one of our files: timm downloads them and converts their names."""
    cfg = get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        raise Unavailable("none are published")
    folder = Path(torch.hub.get_dir(), "checkpoints")
    target = folder / f"timm-{cfg.architecture}.{cfg.tag or 'default'}.safetensors"
    if target.is_file():
        return target
    from safetensors.torch import save_file

    try:
        file = _hub_file(cfg) if cfg.hf_hub_id else None
        if file is None and cfg.url:
            knock(str(cfg.url))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            overlay = {"file": str(file)} if file else {}
            model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    except Unavailable:
        raise
    except Exception as error:  # the hub's client, PyTorch and timm raise many types
        raise Unavailable(_short(error)) from error
    folder.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, temporary)
    temporary.replace(target)
    return target


def _hub_file(cfg: Any) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    names = (cfg.hf_hub_filename,) if cfg.hf_hub_filename else _FILES
    for name in names:
        if isinstance(found := try_to_load_from_cache(cfg.hf_hub_id, name), str):
            return Path(found)
    knock(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    for name in names:
        try:
            return Path(hf_hub_download(cfg.hf_hub_id, name))
        except EntryNotFoundError:
            continue
    raise Unavailable(f"{cfg.hf_hub_id} holds none of {', '.join(names)}")


def knock(url: str) -> None:
    """Raise `Unavailable` unless the host of an address answers. With a proxy or mirror, nothing is checked."""
    if store.offline():
        raise Unavailable("HF_HUB_OFFLINE is set")
    if os.environ.get("HYBRIDZOO_MIRROR") or urllib.request.getproxies():
        return
    parts = urlsplit(url)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=PATIENCE).close()
    except OSError as error:
        raise Unavailable(f"no connection to {parts.hostname}") from error


def _short(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 160 else f"{line[:157]}..."
