"""The log's index names each entry of its pages, in their order."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_index_names_every_entry() -> None:
    sections = re.split(r"(?m)^## \[[^\]]+\]\((log/[a-z]+\.md)\)\n", (DOCS / "log.md").read_text())[1:]
    pages = dict(zip(sections[::2], sections[1::2], strict=True))
    assert set(pages) == {f"log/{path.name}" for path in (DOCS / "log").glob("*.md")}
    for page, index in pages.items():
        entries = re.findall(r"(?m)^## (.+)$", (DOCS / page).read_text())
        assert [line.removeprefix("- ") for line in index.split("\n") if line] == entries, page
