"""Help answers at once, and every error of a user's making is one line and an exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from adapters_store.base.families import UnsupportedBase
from adapters_store.errors import AdapterRejected, BlobDamaged, Conflict, NotFound
from server.cli.common.failures import EPILOG, CommandError, ExitCode, failure_of
from server.cli.main import app
from server.engine.request import InvalidRequest

Command = Callable[..., Any]
WITHOUT_DATA_DIR = ("bench", "data", "plan", "train")  # they touch no tenant's state


def _leaves(command: Any, words: tuple[str, ...] = ()) -> Iterator[str]:
    """Every command there is, as it is typed."""
    for name, child in getattr(command, "commands", {}).items():
        yield from _leaves(child, (*words, name))
    if not hasattr(command, "commands"):
        yield " ".join(words)


COMMANDS = tuple(_leaves(typer.main.get_command(app)))


@pytest.mark.parametrize(
    "arguments", ["", "--help", "serve --help", "serve --print-config", "adapter push --help", "plan train --help"]
)
def test_help_imports_nothing_heavy(arguments: str) -> None:
    """That is what lets it answer at once: importing torch alone takes seconds."""
    heavy = "torch transformers fastapi uvicorn sqlalchemy numpy huggingface_hub"
    heavy += " server.cli.serve.run server.cli.tools.checks"
    code = f"""
import sys
from server.cli.main import main
sys.argv = ["multilora", *{arguments.split()!r}]
try:
    main()
except SystemExit as end:
    print("exit", end.code)
print([name for name in {heavy.split()!r} if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = "exit 2" if not arguments else "exit 0"
    assert result.stdout.splitlines()[-2:] == [expected, "[]"]


def test_a_command_and_what_it_starts_import_no_compiler(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor what bitsandbytes would have imported: `tests/packaging/test_layout.py`."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "to be restored")
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    assert run("tenant", "list").exit_code == 0
    assert os.environ["TORCHDYNAMO_DISABLE"] == "1"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_json_and_has_help(run: Command, command: str) -> None:
    result = run(*command.split(), "--help", env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "--json" in result.stdout
    assert ("--data-dir" in result.stdout) == (not command.startswith(WITHOUT_DATA_DIR))


@pytest.mark.parametrize("command", ["", "serve", "tenant", "adapter", "doctor", "demo"])
def test_help_documents_the_exit_codes(run: Command, command: str) -> None:
    shown = " ".join(run(*command.split(), "--help", env={"COLUMNS": "400"}).stdout.split())
    assert EPILOG in shown
    for code in ExitCode:
        assert f"{code.value} {_words(code)}" in EPILOG


def _words(code: ExitCode) -> str:
    return {"FAILED": "failed", "USAGE": "wrong usage", "REFUSED": "refused input"}.get(
        code.name, code.name.lower().replace("_", " ")
    )


def test_the_version_is_the_distributions(run: Command) -> None:
    assert run("--version").stdout.startswith("multilora 0.")


@pytest.mark.parametrize("arguments", [("nonsense",), ("serve",), ("tenant", "create"), ("serve", "--port", "70000")])
def test_wrong_usage_exits_2(run: Command, arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("error", "code", "exit_code"),
    [
        (NotFound("model_not_found", "no adapter"), "model_not_found", ExitCode.NOT_FOUND),
        (AdapterRejected("bad_name", "a name"), "bad_name", ExitCode.REFUSED),
        (Conflict("tenant_exists", "it exists"), "tenant_exists", ExitCode.CONFLICT),
        (BlobDamaged("blob_damaged", "bytes"), "blob_damaged", ExitCode.FAILED),
        (UnsupportedBase("no such family"), "unsupported_base", ExitCode.UNSUPPORTED),
        (InvalidRequest("prompt", "too long", code="prompt_too_long"), "prompt_too_long", ExitCode.REFUSED),
        (FileNotFoundError(2, "No such file", "/x"), "file_not_found", ExitCode.NOT_FOUND),
        (PermissionError(13, "Permission denied", "/x"), "permission_denied", ExitCode.FAILED),
        (OSError(5, "Input/output error"), "system_error", ExitCode.FAILED),
        (CommandError("port_in_use", "in use", ExitCode.CONFLICT), "port_in_use", ExitCode.CONFLICT),
    ],
)
def test_each_error_has_its_code_and_exit_code(error: Exception, code: str, exit_code: ExitCode) -> None:
    failure = failure_of(error)
    assert (failure.code, failure.exit_code) == (code, exit_code)


def test_a_message_of_many_lines_is_told_in_one() -> None:
    assert failure_of(UnsupportedBase("one\n  two\n\nthree")).line == "unsupported_base: one two three"


def test_an_error_is_one_line_on_stderr(run: Command) -> None:
    result = run("tenant", "rotate-key", "nobody")
    assert result.exit_code == ExitCode.NOT_FOUND
    assert result.stdout == ""
    assert result.stderr == "tenant_not_found: no tenant 'nobody'\n"


def test_an_error_with_json_is_an_object_on_stdout(run: Command) -> None:
    result = run("tenant", "create", "not a name", "--json")
    assert result.exit_code == ExitCode.REFUSED
    error = json.loads(result.stdout)["error"]
    assert error["code"] == "bad_name"
    assert error["param"] == "tenant"
    assert "not a name" in error["message"]
    assert result.stderr == ""


def test_a_data_dir_that_cannot_be_made_is_one_line(run: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("tenant", "list", "--data-dir", tmp_path / "file" / "below")
    assert result.exit_code == ExitCode.FAILED
    assert result.stderr == f"system_error: {tmp_path}/file/below: Not a directory\n"


def test_a_database_that_is_none_is_one_line(run: Command, data_dir: Path) -> None:
    data_dir.mkdir()
    (data_dir / "multilora.db").write_bytes(b"not a database, whatever its name says" * 100)
    result = run("tenant", "list")
    assert result.exit_code == ExitCode.FAILED
    assert result.stderr == f"database_error: {data_dir}: file is not a database\n"
