"""Every defect of a file of weights is found, and nothing that is right is called one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from http_server import Server
from published_files import CARD, CONTENT, NAME, PUBLISHED_FIRST_CONV, STATE, with_card

from hybridzoo import checkpoints
from hybridzoo.checkpoints.reading import CheckpointError


def test_a_good_file_is_good(server: Server) -> None:
    path = checkpoints.download(NAME)
    found = checkpoints.verify(path)
    assert found.ok
    assert (found.name, found.known, found.size) == (CARD.name, "record", len(CONTENT))
    model = timm.create_model(NAME)
    assert found.values == sum(value.numel() for value in model.state_dict().values())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "head.l.bias"}, "1 missing"),
        (lambda s: {**s, "strange": torch.zeros(1)}, "1 unexpected: strange"),
        (lambda s: {**s, PUBLISHED_FIRST_CONV: torch.zeros(8, 3, 5, 5)}, "1 of another shape"),
        (
            lambda s: {**s, PUBLISHED_FIRST_CONV: torch.full_like(s[PUBLISHED_FIRST_CONV], torch.nan)},
            "1 not finite: stem.conv1.conv.weight",
        ),
        (
            lambda s: {**s, PUBLISHED_FIRST_CONV: s[PUBLISHED_FIRST_CONV].int()},
            "1 of another kind of numbers: stem.",
        ),
        (lambda s: {**s, PUBLISHED_FIRST_CONV: s[PUBLISHED_FIRST_CONV].to_sparse()}, "is sparse"),
        (lambda s: {**s, PUBLISHED_FIRST_CONV: s[PUBLISHED_FIRST_CONV].to("meta")}, "has no values"),
    ],
    ids=["missing", "unexpected", "shape", "nan", "kind", "sparse", "meta"],
)
def test_every_defect_is_found(tmp_path: Path, change: Any, says: str) -> None:
    torch.save({"model": change(STATE)}, tmp_path / "w.pth")
    found = checkpoints.verify(tmp_path / "w.pth", NAME)
    assert not found.ok
    assert len(found.problems) == 1
    assert says in found.problems[0]


def test_an_unreadable_record_is_reported(server: Server) -> None:
    path = checkpoints.download(NAME)
    path.with_name(f"{path.name}.json").write_text("{")
    (problem,) = checkpoints.verify(path).problems
    assert "is not a readable record of a file's hash" in problem


def test_a_changed_and_a_cut_file(server: Server) -> None:
    path = checkpoints.download(NAME)
    path.write_bytes(CONTENT[:-1000])
    problems = checkpoints.verify(path).problems
    assert len(problems) == 2
    assert "SHA-256" in problems[0]
    assert "cut short" in problems[1]


def test_a_file_without_a_known_name(tmp_path: Path, home: Path) -> None:
    torch.save({"model": STATE}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="name the expected ones"):
        checkpoints.verify(tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="no such file"):
        checkpoints.verify(tmp_path / "nowhere.pth", NAME)
    (tmp_path / "w.pth").rename(tmp_path / "efficientvit_m0.pth")
    assert checkpoints.verify(tmp_path / "efficientvit_m0.pth").name == CARD.name


def test_a_converted_file_is_verified_by_its_note(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_card(monkeypatch, sha256="0" * 64)
    torch.save({"model": STATE}, tmp_path / "w.pth")
    converted = checkpoints.convert_file(tmp_path / "w.pth", NAME)
    assert checkpoints.verify(converted).ok
    converted.write_bytes(converted.read_bytes() + b" ")
    assert not checkpoints.verify(converted).ok
