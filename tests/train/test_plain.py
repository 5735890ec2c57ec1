"""Names from files and folders are printed safely on a terminal."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridzoo.train import cli, tables
from hybridzoo.train.errors import UserError
from hybridzoo.train.plain import printable, shown
from hybridzoo.train.predict import Prediction


def test_printable() -> None:
    for text in ("dog", "Größe 3", "猫 [/mk2]", ""):
        assert printable(text) is text
    assert printable("a\nb\x1b[31m\u202e\u200b") == r"a\nb\x1b[31m\u202e\u200b"


def test_shown() -> None:
    values = (None, 3, 1.5, "a\nb", "x" * 99, 10**99, [1], {}, torch.zeros(2, 2))
    assert [shown(value, 10) for value in values] == [
        *("None", "3", "1.5", r"'a\nb'", "'xxxxxxxxx...", "1000000000...", "a list", "a dict", "a Tensor")
    ]


def test_tables_show_what_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    """Markup would be an error after all the work; control characters would move the cursor."""
    image = Path("[red]\x1b[2J.png")
    found = Prediction(image, image, "classification", ["tank [/mk2]", "[bold]b", "c\nd"], [0.5, 0.3, 0.2])
    tables.show(tables.predictions([found], image))
    out = capsys.readouterr().out
    for text in (r"[red]\x1b[2J.png", "tank [/mk2]", "[bold]b", r"c\nd"):
        assert text in out
    assert "\x1b" not in out


@given(st.text())
def test_every_message_of_ours_is_visible(text: str) -> None:
    """Also that of an error which went from one process to another, in a pickle."""
    error = UserError(f"{text}: no such file")
    assert str(error).isprintable()
    assert str(error) == printable(f"{text}: no such file") == str(pickle.loads(pickle.dumps(error)))


def test_errors_show_what_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["predict", "biformer_tiny_digits", "\x1b[2J[/x].pth", "x.png"]) == 2
    err = capsys.readouterr().err
    assert r"\x1b[2J[/x].pth" in err
    assert "\x1b" not in err
    assert err.count("\n") == 1
