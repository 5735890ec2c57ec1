"""The documentation site: built strictly, complete, true to the cards, usable without a network; see docs/hook.py."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("mkdocs")
pytest.importorskip("material")
pytest.importorskip("mkdocstrings")
pytest.importorskip("nbformat")

from mkdocs.commands.build import build
from mkdocs.config import load_config
from pages import families, pictures, recipes

from hybridzoo.checkpoints import cards
from hybridzoo.train import names

ROOT = Path(__file__).parent.parent


class Page(html.parser.HTMLParser):
    """Links, sources and anchors of a page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.sources: list[str] = []
        self.anchors: set[str] = set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag in ("script", "img", "source", "iframe") and found.get("src"):
            self.sources.append(found["src"])
        if tag == "link" and found.get("rel") in ("stylesheet", "icon", "preconnect", "preload", "modulepreload"):
            self.sources.append(found["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site; warnings are errors, as in `make docs`."""
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder))
        assert config.strict
        build(config)
    return folder


def test_every_link_leads_somewhere(site):
    pages = {file: Page(file) for file in site.rglob("*.html") if file.name != "404.html"}
    assert len(pages) >= 40
    for file, page in pages.items():
        for link in [*page.links, *page.sources]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{file.relative_to(site)}: {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].anchors, f"{file.relative_to(site)}: {link}"


def test_nothing_is_fetched_from_another_host(site):
    for file in site.rglob("*.html"):
        outside = [source for source in Page(file).sources if urlsplit(source).netloc]
        assert not outside, f"{file.name}: {outside}"
    for file in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", file.read_text(encoding="utf-8")), file.name


def test_the_search_knows_every_page(site):
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    known = {entry["location"].partition("#")[0] for entry in index["docs"]}
    assert {f"families/{name}.html" for name in families.families()} <= known
    assert {"get_started.html", "troubleshooting.html", "api/kernels.html"} <= known


def test_each_family_of_the_cards_has_one_page():
    listed = [module for family in families.families().values() for module in family["modules"]]
    assert sorted(listed) == sorted({card.family for card in cards()})
    assert f"{len(families.families())} families" in (ROOT / "docs" / "index.md").read_text()
    nav = (ROOT / "mkdocs.yml").read_text()
    for name, family in families.families().items():
        assert f"      - {family['title']}: families/{name}.md\n" in nav


@pytest.mark.parametrize("name", families.families())
def test_a_familys_page_says_what_the_cards_say(name):
    family, text = families.families()[name], families.page(name)
    lines = text.splitlines()
    mine = [card for card in cards(task=None) if card.family in family["modules"]]
    for card in mine:
        if card.task == "classification":
            (row,) = [line for line in lines if line.startswith(f"| `{card.model}` | ") and " M | " in line]
            first = next(c for c in mine if c.model == card.model)
            assert f"| {first.params / 1e6:.1f} M | {first.gmacs:.2f} | " in row
        if not card.url:
            continue
        (row,) = [line for line in lines if line.startswith(f"| `{card.name}` | ") and f"({card.url})" in line]
        if card.task == "classification":
            assert f" | {'-' if card.top1 is None else f'{card.top1:.1f}'} | " in row
            assert row.endswith(f" | {'-' if card.parity is None else f'{card.parity:.0e}'} |")
        assert card.licence in text
        assert card.notes in text
    runs = [run for run in names.recipes().values() if run.published and run.network in {card.model for card in mine}]
    for run in runs:
        assert f"| `{run.name}` | {run.task} | {run.score or '-'} | " in text
    for paper in family["papers"]:
        assert f"https://arxiv.org/abs/{paper['arxiv']}" in text
        assert {f"arXiv:{paper['arxiv']}" for paper in family["papers"]} >= {card.paper for card in mine}
    assert "<svg" in text or text.count('class="hz-chain"') == 2


def test_a_familys_page_shows_recorded_speed():
    rows = json.loads((ROOT / "benchmarks" / "results" / "inference_cpu.json").read_text())
    row = next(row for row in rows if row["model"] == "maxvit_tiny" and row["form"] == "fused" and row["batch"] == 8)
    assert f" {8000 / row['ms']:.1f} |" in families.page("maxvit")
    assert "NVIDIA H100" in families.page("dinat")


def test_recipes_are_all_there():
    everyday, published = recipes.everyday(), recipes.published()
    for recipe in names.recipes().values():
        if recipe.published:
            assert f"| `{recipe.name}` | {recipe.task} | {recipe.score or '-'} |" in published
        else:
            assert f"`{recipe.name}`" in everyday


def test_pictures_are_what_the_operators_do():
    """The neighborhood has as many keys as its kernel, at a corner too; a window's and a grid's tokens differ."""
    assert pictures.neighborhood().count("hz-key") == 4 * 25
    assert pictures.window_and_grid().count("hz-key") == 2 * 16
    assert pictures.routed().count("hz-key") == 3 * 4 * 4
    assert pictures.mix_weights().count("hz-key") == 3 * 49
    assert set(pictures.PICTURES) >= {family["picture"] for family in families.families().values()}
