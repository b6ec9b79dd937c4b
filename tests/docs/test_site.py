"""docs/ as a site: links are alive, pages show what the repository shows, search works, no other host is asked."""

from __future__ import annotations

import importlib.util
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from markdown_it import MarkdownIt
from mkdocs.__main__ import cli
from playwright.sync_api import expect

from support.servers.browser import DESKTOP, browsing, visit

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "mkdocs.yml"
HOOKS = ROOT / "docs" / ".site" / "hooks.py"
BLOCKS = {"h1", "h2", "h3", "h4", "ul", "ol", "li", "table", "tr", "td", "pre", "img", "blockquote", "strong"}


def build(config: Path, site: Path) -> Result:
    return CliRunner().invoke(cli, ["build", "--strict", "--config-file", str(config), "--site-dir", str(site)])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site. A warning of the build is an error."""
    folder = tmp_path_factory.mktemp("site")
    result = build(CONFIG, folder)
    assert result.exit_code == 0, result.output
    return folder


def sources() -> dict[str, Path]:
    """Page of the site -> its Markdown in the repository."""
    found = {path.relative_to(ROOT / "docs").as_posix(): path for path in sorted((ROOT / "docs").rglob("*.md"))}
    spec = importlib.util.spec_from_file_location("hooks", HOOKS)
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    found |= {place: ROOT / path for path, place in hooks.ELSEWHERE.items()}
    return {"index.html" if name == "README.md" else name.replace(".md", ".html"): path for name, path in found.items()}


class Blocks(HTMLParser):
    """Counts the elements of the page's article, and keeps the addresses that the page loads by itself."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.loads: list[str] = []
        self._in_article = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_article |= tag == "article"
        if self._in_article and tag in BLOCKS:
            self.counts[tag] += 1
        named = dict(attrs)
        self.loads += [named.get("src") or ""] if tag in ("script", "img", "iframe") else []
        self.loads += [named.get("href") or ""] if tag == "link" else []

    def handle_endtag(self, tag: str) -> None:
        self._in_article &= tag != "article"


@cache
def blocks_of(page: Path) -> Blocks:
    return Blocks(page.read_text())


def test_every_page_has_the_blocks_that_commonmark_reads(site: Path) -> None:
    """A list or table right below a line of text is one on a repository's page, and must be one here."""
    commonmark = MarkdownIt("commonmark").enable("table")
    wrong = {}
    for name, source in sources().items():
        expected = Blocks(f"<article>{commonmark.render(source.read_text())}</article>").counts
        found = blocks_of(site / name).counts
        if found != expected:
            wrong[name] = (expected - found, found - expected)
    assert wrong == {}
    assert len(sources()) > 30


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    loads = {each for page in site.rglob("*.html") for each in blocks_of(page).loads}
    assert len(loads) > 10
    assert [each for each in loads if ":" in each or each.startswith("//")] == []


def test_a_dead_link_or_anchor_ends_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    links = "[no page](nowhere.md) [no heading](README.md#nowhere) [alive](README.md#page)"
    (tmp_path / "docs" / "README.md").write_text(f"# Page\n{links}\n")
    text = CONFIG.read_text().partition("nav:\n  - ")[0].replace("hooks: [docs/.site/hooks.py]\n", "")
    (tmp_path / "mkdocs.yml").write_text(text)
    result = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert result.exit_code == 1
    assert "Aborted with 2 warnings" in result.output


def test_search_finds_a_page_in_a_browser_that_reaches_no_other_host(site: Path) -> None:
    with served(site) as url, browsing() as browser, visit(browser, url, viewport=DESKTOP) as opened:
        page, asked = opened.page, list[str]()
        page.on("request", lambda request: asked.append(request.url))
        page.get_by_role("textbox", name="Search").click()
        page.keyboard.type("studentised bootstrap")
        page.get_by_role("link").filter(has=page.get_by_role("heading", name="The gate before activation")).click()
        expect(page.get_by_role("heading", level=1)).to_contain_text("The gate before activation")
        assert [each for each in asked if not each.startswith((url, "data:", "blob:"))] == []
        assert opened.complaints == []


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The folder's URL while it is served."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()
