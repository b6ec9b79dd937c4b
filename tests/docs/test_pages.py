"""What README and docs name exists: files, make targets, commands, options, routes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    links = [page.parent / target for target in re.findall(r"\]\(([^)#:]+)\)", text)]
    paths = re.findall(
        r"`((?:server|tests|adapters_store|kernels|benchmarks|docs|trainer)/[\w./*]+\.(?:py|md|c|csv|png))`", text
    )
    missing = [str(link) for link in links if not link.exists()]
    missing += [path for path in paths if not list(ROOT.glob(path))]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_make_target_and_module_a_page_names_exists(page: Path) -> None:
    text, makefile = page.read_text(), (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([a-z-]+)", text, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile
    for module in re.findall(r"python -m (benchmarks\.\w+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module


def test_every_command_of_the_readme_is_one() -> None:
    from server.cli.main import app

    text = (ROOT / "README.md").read_text()
    used = re.findall(r"^multilora (.+?)(?:\s{2,}#.*)?$", text, flags=re.MULTILINE)
    assert len(used) >= 3
    for line in used:
        words = line.split()
        command = [
            word for word in words[: 2 if words[0] in ("tenant", "adapter") else 1] if re.fullmatch(r"[a-z-]+", word)
        ]
        shown = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
        assert shown.exit_code == 0, line
        for option in re.findall(r"--[a-z0-9-]+", line):
            assert option in shown.output, f"{option} in: multilora {line}"


def test_api_page_names_the_routes_there_are() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    sources = "".join(path.read_text() for path in (ROOT / "server" / "api").glob("*.py"))
    for route in set(re.findall(r"\"(/v1/[a-z_/]+|/admin/[a-z]+|/health|/ready|/metrics|/openapi\.json)\"", sources)):
        assert route in page, route
