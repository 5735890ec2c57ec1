"""A small published file of one card, and helpers for tests of the store."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import goldens
import pytest
import torch
from torch import Tensor, nn

import hybridzoo  # noqa: F401  registers the models
from hybridzoo import checkpoints
from hybridzoo.checkpoints import catalogue, store
from hybridzoo.checkpoints.catalogue import Card

NAME = "efficientvit_msra_m0.r224_in1k_authors"
CARD = store.find(NAME)  # its address ends with a unique file name, which timm's cache keeps


def saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


# State dicts with the authors' names and shapes.
STATE = {
    key: value.float() if value.is_floating_point() else value
    for key, value in goldens.published_state("efficientvit_msra", "efficientvit_m0").items()
}
OTHER = {key: 1.5 * value if value.is_floating_point() else value for key, value in STATE.items()}
CONTENT = saved({"model": STATE})
FIRST_CONV = "stem.conv1.conv.weight"
PUBLISHED_FIRST_CONV = "patch_embed.0.c.weight"


def with_card(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Card:
    """Replace the published card by a changed one."""
    card = dataclasses.replace(CARD, **changes)
    every = tuple(card if other.name == CARD.name else other for other in catalogue._all_cards())
    monkeypatch.setattr(catalogue, "_all_cards", lambda: every)
    return card


def left(home: Path) -> list[str]:
    return sorted(p.name for p in home.iterdir() if p.name != ".locks")


def is_loaded(model: nn.Module, state: dict[str, Tensor] = STATE) -> bool:
    own = model.state_dict()
    return all(torch.equal(own[key], value) for key, value in checkpoints.convert(state, NAME).items())
