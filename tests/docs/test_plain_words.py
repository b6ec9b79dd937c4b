"""Text that users read keeps to the field's words: no house words, no persons for software."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

ROOT = Path(__file__).parents[2]
PRODUCT = ("server", "adapters_store", "kernels", "trainer")
SAYING = {"say", "event", "complain", "debug", "info", "warning", "error", "exception"}  # of outputs and loggers
HELD_IN = {"message", "reason", "text", "why", "advice", "wanted", "line", "question"}
HOUSE_WORDS = re.compile(
    r"""\b(
    whoever | whom | nobody | somebody | anybody | everybody
    | stands?\ twice | put(s|ting)?\ away | puts?\ out | told | look(s|ed)?\ over | to\ and\ fro
    | com(es?|ing)\ to\ (its|their)\ end | otherwise\ than | rehears(al|e[sd]?) | small\ talk | over\ share
    | ended\ without\ a\ word | speaks\ against | left\ no\ log | of\ them,\ from | hands?\ of\ his | (he|his|him)
    | flight | intake | wish(es)? | anew | go(es|ing)?\ on\ with | chang(e|es|ing)\ hands | stands?\ in\ the\ way
    | is\ none;\ there\ are | parts\ a\ model | to\ say\ here | are\ cut\ off
    )\b""",
    re.VERBOSE | re.IGNORECASE,
)
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "SECURITY.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(path for path in (ROOT / "deploy").rglob("*") if path.suffix in (".yaml", ".yml", ".service", ".json")),
]


def house_words(texts: Iterator[tuple[str, str]]) -> list[str]:
    """Where, and which word."""
    return [f"{place}: {found[0]}" for place, text in texts for found in HOUSE_WORDS.finditer(" ".join(text.split()))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages(page: Path) -> None:
    assert house_words(iter([(page.name, page.read_text())])) == []


def test_help() -> None:
    texts = list(helps())
    assert len(texts) > 200
    assert house_words(iter(texts)) == []


def helps() -> Iterator[tuple[str, str]]:
    from server.cli.main import app

    yield from _helps("multilora", typer.main.get_command(app))


def _helps(path: str, command: object) -> Iterator[tuple[str, str]]:
    yield path, f"{getattr(command, 'help', '')} {getattr(command, 'epilog', '')}"
    for param in getattr(command, "params", ()):
        yield f"{path} {param.name}", str(getattr(param, "help", ""))
    if isinstance(command, TyperGroup):
        for name, below in command.commands.items():
            yield from _helps(f"{path} {name}", below)


def test_errors_and_log_lines() -> None:
    texts = list(said())
    assert len(texts) > 500
    assert house_words(iter(texts)) == []


def said() -> Iterator[tuple[str, str]]:
    """Every text in a `raise`, or given to a logger or an output."""
    for package in PRODUCT:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if _is_said(node):
                    for part in ast.walk(node):
                        if isinstance(part, ast.Constant) and isinstance(part.value, str):
                            yield f"{path.relative_to(ROOT)}:{part.lineno}", part.value


def _is_said(node: ast.AST) -> bool:
    """A raise, a call of a logger or an output, or words that a variable of such a name holds for one."""
    if isinstance(node, ast.Assign):
        return any(isinstance(target, ast.Name) and target.id in HELD_IN for target in node.targets)
    return isinstance(node, ast.Raise) or (isinstance(node, ast.Call) and _name_of(node.func) in SAYING)


def _name_of(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def test_the_check_sees_a_house_word() -> None:
    assert house_words(iter([("a page", "Whoever comes now is told so, and is put\nout.")])) == [
        "a page: Whoever",
        "a page: told",
        "a page: put out",
    ]
