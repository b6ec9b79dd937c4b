"""docs/troubleshooting.md: what it tells readers to look at exists, and every refusal of an adapter has its cure."""

from __future__ import annotations

import re
from pathlib import Path

from support.reference import error_codes

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "troubleshooting.md").read_text()
REFERENCE = (DOCS / "reference.md").read_text()
KEYS_OF_FILES = {  # no metrics
    "multilora_adapter_dtype",
    "multilora_base_digest",
    "multilora_chat_template",
    "multilora_tool_dialect",
}


def test_every_metric_that_a_page_names_is_in_the_reference() -> None:
    listed = set(re.findall(r"^\| `((?:multilora_|vllm:|process_)\w+)` \|", REFERENCE, flags=re.MULTILINE))
    assert len(listed) > 40
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]:
        if page.name in ("log.md", "reference.md"):
            continue
        named = set(re.findall(r"`((?:multilora_|vllm:|process_)\w+)(?:\{[^`]*\})?`", page.read_text()))
        assert named - listed - KEYS_OF_FILES == set(), page.name


def test_every_code_of_the_adapters_page_has_a_cure() -> None:
    refused = (DOCS / "adapters.md").read_text().partition("## Refused")[2]
    cells = [line.split("|")[1] for line in refused.splitlines() if line.startswith("| `")]
    named = {code for cell in cells for code in re.findall(r"`([a-z_]+)`", cell)}
    cures = PAGE.partition("## Adapters refused, by code")[2].partition("\n## ")[0]
    lacking = {code for code in named if f"`{code}`" not in cures and not code.startswith("unsupported_")}
    assert len(named) > 50
    assert lacking == set()


def test_every_429_has_its_limit() -> None:
    section = PAGE.partition("## Refused with 429 or 503")[2].partition("\n## ")[0]
    codes = {one.code for one in error_codes.raised() if one.http_status == 429} | set(error_codes.BY_FORM)
    assert len(codes) >= 8
    assert {code for code in codes if f"`{code}`" not in section} == set()


def test_every_table_is_whole() -> None:
    """A blank line or a missing cell breaks a table where readers see it, not where it is written."""
    for page in DOCS.rglob("*.md"):
        width = 0
        for number, line in enumerate(page.read_text().splitlines(), 1):
            if not line.startswith("|"):
                width = 0
                continue
            cells = len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", line))) - 1
            assert width in (0, cells), f"{page.name}:{number}"
            width = cells
