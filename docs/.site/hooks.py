"""What the site needs beyond docs/: pages that lie elsewhere in the repository, and Markdown as repositories show it.

MkDocs calls `on_files` once and `on_page_markdown` for each page.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
ELSEWHERE = {  # in the repository -> in the site
    "README.md": "project/overview.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "SECURITY.md": "project/security.md",
    "benchmarks/README.md": "project/benchmarks.md",
}
PLACES = {site: repository for repository, site in ELSEWHERE.items()}
PICTURES = ("*.png", "*.svg")
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)#\s]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"\s*(```|~~~)")
ITEM = re.compile(r"\s*([-*+]|\d+[.)])\s")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages of ELSEWHERE, and the pictures of benchmarks/."""
    for repository, site in ELSEWHERE.items():
        files.append(File.generated(config, site, abs_src_path=str(ROOT / repository)))
    for pattern in PICTURES:
        for path in sorted((ROOT / "benchmarks" / "results").glob(pattern)):
            files.append(File.generated(config, f"project/results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The page with links as the site has them, and with a blank line wherever its own parser needs one."""
    place = page.file.src_uri
    here = PLACES.get(place, f"docs/{place}")
    return "\n".join(_lines(markdown, here, place))


def _lines(markdown: str, here: str, place: str) -> Iterator[str]:
    before, in_fence = "", False
    for line in markdown.splitlines():
        if not in_fence and _begins_a_block(before, line):
            yield ""
        in_fence ^= FENCE.match(line) is not None
        yield line if in_fence else LINK.sub(lambda match: _linked(match, here, place), line)
        before = line


def _begins_a_block(before: str, line: str) -> bool:
    """Whether a list or table follows text at once, or text the end of a code block: Python-Markdown sees one block."""
    if not before.strip() or before[0].isspace() or not line.strip():
        return False
    if FENCE.match(before):
        return True
    if line.startswith("|"):
        return not before.startswith("|")
    return ITEM.match(line) is not None and ITEM.match(before) is None


def _linked(match: re.Match[str], here: str, place: str) -> str:
    """A link of the file `here` of the repository, as the page `place` of the site writes it."""
    text, target, anchor = match.groups()
    if ":" in target:
        return match.group()
    path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
    found = path.removeprefix("docs/") if path.startswith("docs/") else ELSEWHERE.get(path)
    if found is None:
        found = path.replace("benchmarks/results/", "project/results/")
    return f"{text}{posixpath.relpath(found, posixpath.dirname(place) or '.')}{anchor or ''})"
