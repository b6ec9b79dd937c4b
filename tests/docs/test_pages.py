"""What README and docs name exists: files, make targets, commands, options, routes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

ROOT = Path(__file__).parents[2]
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
PAGES = [*TOP, ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    links = links_of(page)
    paths = re.findall(
        r"`((?:server|tests|adapters_store|kernels|benchmarks|docs|trainer)/[\w./*]+\.(?:py|md|c|csv|png))`", text
    )
    missing = [str(link) for link in links if not link.exists()]
    missing += [path for path in paths if not list(ROOT.glob(path))]
    assert missing == []


def links_of(page: Path) -> set[Path]:
    return {(page.parent / target).resolve() for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", page.read_text())}


def test_the_readme_leads_to_every_page_by_the_index() -> None:
    index, log = ROOT / "docs" / "README.md", ROOT / "docs" / "log.md"
    reached = links_of(TOP[0]) | links_of(index) | links_of(log) | {TOP[0]}
    assert index in links_of(TOP[0])
    assert [str(page.relative_to(ROOT)) for page in PAGES if page not in reached] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_make_target_and_module_a_page_names_exists(page: Path) -> None:
    text, makefile = page.read_text(), (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([a-z-]+)", text, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile
    for module in re.findall(r"python -m (benchmarks(?:\.\w+)+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module


def commands_of(page: Path) -> list[str]:
    """Lines and inline code that begin with `multilora`, without comments."""
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    lines = re.findall(r"^multilora (.+?)(?:\s+#.*)?$", text, flags=re.MULTILINE)
    return lines + re.findall(r"`multilora ([^`|\n]+)`", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_and_option_a_page_names_is_one(page: Path) -> None:
    from server.cli.main import app

    for line in commands_of(page):
        command, words = typer.main.get_command(app), line.split()
        while isinstance(command, TyperGroup) and words and re.fullmatch(r"[a-z][a-z-]*", words[0]):
            assert words[0] in command.commands, f"multilora {line}"
            command = command.commands[words.pop(0)]
        options = {name for param in command.params for name in (*param.opts, *param.secondary_opts)} | {"--help"}
        asked = {word.partition("=")[0].rstrip(".,") for word in words if word.startswith("-") and word != "-"}
        assert asked - options == set(), f"multilora {line}"


def test_the_readme_shows_the_commands_a_tenant_needs() -> None:
    shown = " ".join(commands_of(ROOT / "README.md"))
    assert all(command in shown for command in ("serve --base", "tenant create", "adapter push", "onboard", "doctor"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_curl_line_that_sends_json_says_so(page: Path) -> None:
    """curl calls a body a form unless it is told otherwise; the server then refuses it."""
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    for line in re.findall(r"^curl .+$", text, flags=re.MULTILINE):
        assert " -d " not in line or "Content-Type: application/json" in line, line


def test_api_page_names_the_routes_there_are() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    sources = "".join(path.read_text() for path in (ROOT / "server" / "api").rglob("*.py"))
    for route in set(re.findall(r"\"(/v1/[a-z_/]+|/admin/[a-z]+|/health|/ready|/metrics|/openapi\.json)\"", sources)):
        assert route in page, route
