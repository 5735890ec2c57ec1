"""What mkdocs does beside reading the files in `docs`: pages made of data, and documents that lie outside `docs`.

    mkdocs build --strict      (or `make docs`)

`pages/` makes the pages of families, recipes and notebooks. `MIRRORED` are documents of the repository that the site
shows too; links between files of the repository are made links between pages, and links to other files of the
repository become their names.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pages import families, notebooks, recipes  # beside this file, where mkdocs looks while it loads a hook
from pages.pictures import PICTURES

ROOT = Path(__file__).parents[1]
ROOMS = ("backbones", "checkpoints", "configs", "kernels", "layers", "train")
MIRRORED = {
    "ARCHITECTURE.md": "project/architecture.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    **{f"benchmarks/{file.name}": f"benchmarks/{file.name}" for file in sorted((ROOT / "benchmarks").glob("*.md"))},
    **{
        file.relative_to(ROOT).as_posix(): f"benchmarks/{file.parent.name}.md"
        for file in sorted((ROOT / "benchmarks" / "results").glob("*/report.md"))
    },
}
LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?!https?:|mailto:|#)(?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
PICTURE = re.compile(r"<!-- picture: (\w+) -->")


def _lay_out() -> None:
    """Links to the rooms as they are imported, for the API reference, which reads the source and imports nothing."""
    package = ROOT / ".links" / "hybridzoo"
    package.mkdir(parents=True, exist_ok=True)
    front = [ROOT / "hybridzoo" / name for name in ("__init__.py", "__main__.py", "py.typed")]
    for source in [*front, *(ROOT / room for room in ROOMS)]:
        target = package / source.name
        if not target.is_symlink():
            target.symlink_to(os.path.relpath(source, package))


_lay_out()  # at once: plugins look only into folders that are there when they are set up


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is generated and what is mirrored."""
    made = {**families.pages(), **recipes.pages(), **notebooks.pages()}
    made |= {page: (ROOT / source).read_text(encoding="utf-8") for source, page in MIRRORED.items()}
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    for source in sorted((ROOT / "benchmarks" / "results").glob("**/*.json*")):
        path = f"benchmarks/{source.relative_to(ROOT / 'benchmarks' / 'results').as_posix()}"
        files.append(File.generated(config, path, content=source.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Draw the pictures that a page asks for, and point links at the pages that show what they lead to."""
    here = page.file.src_uri
    markdown = PICTURE.sub(lambda found: PICTURES[found[1]](), markdown)
    return LINK.sub(lambda found: _link(found, here), markdown)


def _link(found: re.Match[str], here: str) -> str:
    """A link on the page `here`, between the site's pages; to a file that the site does not show, its name."""
    origin = next((source for source, page in MIRRORED.items() if page == here), f"docs/{here}")
    meant = posixpath.normpath(posixpath.join(posixpath.dirname(origin), found["target"]))
    if meant in MIRRORED:
        page = MIRRORED[meant]
    elif meant.startswith("benchmarks/results/") and (ROOT / meant).is_file():
        page = meant.replace("results/", "", 1)
    elif meant.startswith("docs/"):
        page = meant.removeprefix("docs/")
    elif (ROOT / meant).exists():
        return found["text"] if meant in found["text"] else f"{found['text']} (`{meant}`)"
    else:
        return found[0]  # mkdocs says that it leads nowhere
    target = posixpath.relpath(page, PurePosixPath(here).parent.as_posix())
    return f"[{found['text']}]({target}{found['anchor'] or ''})"
