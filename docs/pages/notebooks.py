"""Notebooks as pages: their Markdown as it is, their code as blocks, small text outputs below it."""

from __future__ import annotations

from pathlib import Path

import nbformat

FOLDER = Path(__file__).parents[1] / "notebooks"


def pages() -> dict[str, str]:
    """Path below `docs` -> Markdown of every notebook."""
    return {f"notebooks/{file.stem}.md": page(file) for file in sorted(FOLDER.glob("*.ipynb"))}


def page(file: Path) -> str:
    """One notebook."""
    parts = []
    for cell in nbformat.read(file, as_version=4).cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
        elif cell.cell_type == "code":
            parts.append(f"```python\n{cell.source}\n```")
            texts = [output.get("text", "") for output in cell.outputs]
            parts += [f"```text\n{text.rstrip()}\n```" for text in texts if text.strip()]
    where = f"*This page is a notebook: [{file.name}]({file.name}) to download.*"
    return "\n\n".join([parts[0], where, *parts[1:]]) + "\n"
