"""The documentation site: built strictly, complete, true to the cards, usable without a network; see docs/hook.py."""

from __future__ import annotations

import ast
import functools
import html.parser
import http.server
import importlib.util
import json
import re
import shutil
import threading
from collections.abc import Iterator
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


def test_every_link_is_valid(site):
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


def test_pages_load_nothing_from_other_hosts(site):
    for file in site.rglob("*.html"):
        outside = [source for source in Page(file).sources if urlsplit(source).netloc]
        assert not outside, f"{file.name}: {outside}"
    for file in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", file.read_text(encoding="utf-8")), file.name


def test_the_search_index_has_every_page(site):
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
def test_a_familys_page_agrees_with_the_cards(name):
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


@pytest.mark.parametrize("name", families.families())
def test_a_familys_page_has_every_section(name):
    """A figure, tables of variants, weights with parity, and speed, the licence, recipes, and the citation."""
    sections = dict(part.split("\n", 1) for part in families.page(name).split("\n## ")[1:])
    assert 'class="hz-chain"' in sections["The block"]
    assert sections["Models"].count("\n| `") >= 1
    weights = sections["Published weights"]
    assert "**Licence.**" in weights
    assert "parity" in weights or weights.lstrip().startswith("No weights were published.")
    assert re.search(r"\n\| `\w+` \| inference \| ", sections["Speed"])
    assert "recipe" in sections["Published recipes"]
    assert "```bibtex\n@" in sections["Papers and citation"]


def test_a_familys_page_shows_recorded_speed():
    rows = json.loads((ROOT / "benchmarks" / "results" / "networks_cpu.json").read_text())
    wanted = dict(op="maxvit_tiny", form="fused", way="inference")
    row = next(row for row in rows if wanted.items() <= row.items())
    assert f" {row['batch'] / row['median_us'] * 1e6:.1f} |" in families.page("maxvit")
    assert "| `dinat_tiny` | inference | compiled | 64 | " in families.page("dinat").partition("NVIDIA H100")[2]


def test_every_recipe_is_listed():
    everyday, published = recipes.everyday(), recipes.published()
    for recipe in names.recipes().values():
        if recipe.published:
            assert f"| `{recipe.name}` | {recipe.task} | {recipe.score or '-'} |" in published
        else:
            assert f"`{recipe.name}`" in everyday


def test_pictures_agree_with_the_operators():
    """The neighborhood has as many keys as its kernel, at a corner too; a window's and a grid's tokens differ."""
    assert pictures.neighborhood().count("hz-key") == 4 * 25
    assert pictures.window_and_grid().count("hz-key") == 2 * 16
    assert pictures.routed().count("hz-key") == 3 * 4 * 4
    assert pictures.mix_weights().count("hz-key") == 3 * 49
    assert set(pictures.PICTURES) >= {family["picture"] for family in families.families().values()}


OTHERS = ("Unknown model (", "operator torchvision::nms", "libGL.so.1")  # messages of other libraries


def _messages() -> list[str]:
    """Every text in the rooms' source, with … for what is put in."""
    found = []
    for room in ("checkpoints", "kernels", "layers", "train"):
        for file in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(p.value if isinstance(p, ast.Constant) else "…" for p in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def test_the_troubleshooting_page_quotes_real_messages():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [block.strip() for block in re.findall(r"```text\n(.*?)```", page, re.S)]
    assert len(quoted) >= 20
    messages = _messages()
    unknown = []
    for message in quoted:
        pattern = re.compile(".*".join(map(re.escape, message.split("…"))))
        if not message.startswith(OTHERS) and not any(pattern.search(text) for text in messages):
            unknown.append(message)
    assert not unknown


CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
missing = not (CHROMIUM and DRIVER and importlib.util.find_spec("selenium"))


def in_a_browser(test):
    """Marks a test that needs a browser."""
    reason = "needs selenium, chromium and chromedriver (apt install chromium chromium-driver)"
    return pytest.mark.slow(pytest.mark.skipif(missing, reason=reason)(test))


PHONE = 375  # pixels
LOOK = """
const wide = document.documentElement.scrollWidth - window.innerWidth;
const images = [...document.images].filter(image => !(image.complete && image.naturalWidth)).map(image => image.src);
return {wide, images, title: document.title, text: document.body.innerText.length, width: window.innerWidth};
"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def address(site) -> Iterator[str]:
    """Where the built site is served."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator:
    """Chromium without a window."""
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run", "disable-sync",
                 "disable-background-networking", "disable-component-update", "window-size=1300,1000",
                 f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):  # fmt: skip
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


def _wait(browser, condition, what: str):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 30, 0.1).until(lambda _: condition(), what)


def _find(browser, selector: str) -> list:
    return browser.find_elements("css selector", selector)


def _complaints(browser) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def _pages(browser, address: str) -> list[str]:
    """Every page in the navigation."""
    browser.get(f"{address}/index.html")
    found = browser.execute_script(
        "return [...document.querySelectorAll('nav.md-nav--primary a[href]')].map(a => a.href.split('#')[0])"
    )
    return list(dict.fromkeys(found))


@in_a_browser
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_pages_fit_a_phone_and_a_desk(browser, address, every):
    """No console errors, no broken images, nothing wider than the screen. Families' pages have one template."""
    for width, height in ((PHONE, 700), (1300, 1000)):
        phone = width == PHONE
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone},
        )
        pages = _pages(browser, address)
        assert len(pages) >= 40
        families = [page for page in pages if "/families/" in page]
        others = [page for page in pages if page not in families and (phone or "/tune/" in page)]
        for page in pages if every else [families[0], *others]:
            browser.get(page)
            seen = browser.execute_script(LOOK)
            assert seen["wide"] <= 0, f"{page}: {seen['wide']} pixels wider than {width}"
            assert seen["width"] <= width, f"{page}: laid out for {seen['width']} pixels"
            assert not seen["images"], page
            assert "hybridzoo" in seen["title"], page
            assert seen["text"] > 200, page
            assert not _complaints(browser), page
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@in_a_browser
def test_search_finds_and_opens_a_page(browser, address):
    browser.get(f"{address}/index.html")
    (box,) = _find(browser, "input.md-search__input")
    _wait(browser, box.is_displayed, "the search box")
    box.click()
    box.send_keys("deformable attention")
    results = _wait(browser, lambda: _find(browser, ".md-search-result__link"), "results of the search")
    links = [result.get_attribute("href") for result in results]
    assert any("families/dat.html" in link or "operators.html" in link for link in links), links
    target = links[0].partition("?")[0]
    results[0].click()
    _wait(browser, lambda: browser.current_url.startswith(target), "the page that was found")
    assert not _complaints(browser)


@in_a_browser
def test_pictures_and_tables_are_visible(browser, address):
    browser.get(f"{address}/families/biformer.html")
    assert len([svg for svg in _find(browser, ".hz-panel svg") if svg.size["width"] > 50]) == 3
    assert _find(browser, "table")[0].text.splitlines()[1].startswith("biformer_tiny 13.1 M")


@in_a_browser
def test_the_dark_scheme_changes_colours(browser, address):
    browser.get(f"{address}/families/biformer.html")
    colour = "return getComputedStyle(document.querySelector('.hz-token')).fill"
    before = browser.execute_script(colour)
    browser.execute_script(
        "document.querySelector('label[for=__palette_1]:not([hidden]), label[for=__palette_0]').click()"
    )
    _wait(browser, lambda: browser.execute_script(colour) != before, "other colours")


@in_a_browser
def test_the_pages_open_without_a_server(browser, site):
    """The folder can be copied anywhere and opened as files."""
    browser.get((site / "index.html").as_uri())
    _find(browser, "a[href='get_started.html']")[0].click()
    _wait(browser, lambda: browser.current_url.endswith("get_started.html"), "the next page")
