"""The notebooks of the documentation run from the first cell to the last, in a temporary folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")
pytest.importorskip("skimage")

FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SAYS = {"fine_tune": r"'accuracy/top1': (?:[5-9]\d|100)", "pyramid": r"IoU 0\.[5-9]"}  # four classes; 0.35 are coins


def _read(file: Path):
    return nbformat.read(file, as_version=4)


def test_notebooks_are_committed_without_outputs():
    assert {file.stem for file in NOTEBOOKS} == set(SAYS)
    for file in NOTEBOOKS:
        book = _read(file)
        nbformat.validate(book)
        assert file.stat().st_size < 30_000
        assert not [cell for cell in book.cells if cell.cell_type == "code" and (cell.outputs or cell.execution_count)]


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs(file, tmp_path):
    book = _read(file)
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    texts = [output.get("text", "") for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert re.search(SAYS[file.stem], "".join(texts)), texts[-3:]
