"""docs/exports.json, of which the table in docs/export.md is made, says what `hybridzoo export` writes."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from networks import LEADERS

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

ROOT = Path(__file__).parents[2]
ROWS = json.loads((ROOT / "docs" / "exports.json").read_text())
USUAL = {("efficientvit_mit_b0", "onnx"), ("efficientvit_mit_b0", "pt2"), ("partialnet_t0", "pt2")}
CELLS = [(name, to) for name, cells in ROWS.items() for to in cells]


@pytest.fixture
def exports(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.exports")


@pytest.mark.parametrize(
    ("name", "to"),
    [cell if cell in USUAL else pytest.param(*cell, marks=pytest.mark.exhaustive) for cell in CELLS],
)
def test_a_file_accepts_the_sizes_in_the_table(exports, name, to):
    """Exported anew, and compared with PyTorch, at several sizes and batches."""
    made = exports.cell(name, to)
    assert "refused" not in made, made
    assert {**made, "why": ""} == {**ROWS[name][to], "why": ""}


def test_the_table_shows_known_networks_with_an_open_batch():
    assert set(CELLS) >= USUAL
    assert set(ROWS) <= set(LEADERS)
    assert {cell["batch"] for cells in ROWS.values() for cell in cells.values()} == {"any"}
    for name, to in CELLS:
        cell = ROWS[name][to]
        assert cell["multiple"] == 1 or cell["why"], f"{name}, {to}: why not every size?"
