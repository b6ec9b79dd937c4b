"""docs/reference.md is what the code says today; `make reference` writes it."""

from __future__ import annotations

import re
from pathlib import Path

from support.reference import environment, error_codes
from support.reference.page import PAGE, page
from support.reference.settings import setting_rows

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == page(), "docs/reference.md differs from the code: run `make reference`"


def test_every_metric_says_what_it_is() -> None:
    assert "| Of the engine |" not in PAGE.read_text(), "server/api/telemetry/metric_texts.py lacks a name"


def test_every_environment_variable_of_the_sources_is_listed_and_no_other() -> None:
    sources = "".join(path.read_text() for path in environment._sources())
    of_settings = {name for row in setting_rows() for name in row["env"].split(", ")}
    assert environment.names_in_sources() - set(environment.VARIABLES) - of_settings == set()
    assert [name for name in environment.VARIABLES if f'"{name}"' not in sources] == []


def test_every_code_of_the_adapters_page_is_found_in_the_sources() -> None:
    """The page is kept by hand, so it shows what the collector of codes would miss."""
    refused = (DOCS / "adapters.md").read_text().partition("## Refused")[2]
    cells = [line.split("|")[1] for line in refused.splitlines() if line.startswith("| `")]
    named = {code for cell in cells for code in re.findall(r"`([a-z_]+)`", cell)}
    assert len(named) > 50
    assert named - {one.code for one in error_codes.raised()} == set()
