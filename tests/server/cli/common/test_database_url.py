"""Which database a command works on, that its password is told to nobody, and what `serve` is told of jobs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.cli.common.database_url import ENVIRONMENT
from server.cli.serve import run as serving
from server.cli.serve.settings import ServeSettings
from support.servers import postgres

Command = Callable[..., Any]
NOWHERE = "postgresql://owner:geheim@127.0.0.1:1/rows?sslpassword=heimlich"


def test_the_option_goes_before_the_environment_and_that_before_the_data_directory(
    run: Command, run_json: Command, data_dir: Path, tmp_path: Path
) -> None:
    by_environment, by_option = (f"sqlite:///{tmp_path / name}.db" for name in ("environment", "option"))
    environment = {ENVIRONMENT: by_environment}
    run_json("tenant", "create", "acme", env=environment)
    assert (tmp_path / "environment.db").exists()
    assert not (data_dir / "multilora.db").exists()
    own = ("--data-dir", tmp_path / "own")  # a directory belongs to one database
    assert run("jobs", "list", "--database-url", by_option, *own, env=environment).exit_code == 0
    assert (tmp_path / "option.db").exists()
    assert [each["tenant"] for each in run_json("tenant", "list", env=environment)["data"]] == ["acme"]
    other = tmp_path / "other"
    assert run_json("tenant", "list", "--data-dir", other)["data"] == []
    assert (other / "multilora.db").exists()
    assert not (data_dir / "multilora.db").exists()


@pytest.mark.parametrize("as_json", [(), ("--json",)])
@pytest.mark.parametrize(
    ("command", "environment"),
    [
        (("tenant", "list"), {ENVIRONMENT: NOWHERE}),
        (("jobs", "list", "--database-url", NOWHERE), {}),
        (("doctor",), {ENVIRONMENT: NOWHERE}),
    ],
)
def test_a_server_that_is_away_is_told_without_its_password(
    run: Command, command: tuple[str, ...], environment: dict[str, str], as_json: tuple[str, ...]
) -> None:
    pytest.importorskip("psycopg")
    result = run(*command, *as_json, env={**environment, "COLUMNS": "1000"})
    assert result.exit_code == 1
    assert "database_error" in result.output
    assert "owner:***@127.0.0.1:1" in result.output
    assert "geheim" not in result.output
    assert "heimlich" not in result.output


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("geheim", "is not a URL"),
        ("postgresql://owner:geheim@host:port/rows", "is not a URL"),
        ("mysql://owner:geheim@host/rows", "'mysql' is not supported"),
        ("postgresql+psycopg2://owner:geheim@host/rows", "'postgresql+psycopg2' is not supported"),
        ("sqlite://", "a database in memory"),
    ],
)
def test_a_url_that_is_none_is_refused_and_not_repeated(run: Command, base: Path, url: str, words: str) -> None:
    result = run("serve", "--base", base, "--port", "0", "--database-url", url)
    assert result.exit_code == 4
    assert result.stderr.startswith("bad_database_url: --database-url: ")
    assert words in result.stderr
    assert "geheim" not in result.output


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[ServeSettings]:
    """What the server would have been started with."""
    options: list[ServeSettings] = []
    monkeypatch.setattr(serving, "run", lambda asked, *_: options.append(asked))
    return options


def test_the_job_runners_limits_come_by_option_or_environment(
    run: Command, base: Path, asked: list[ServeSettings]
) -> None:
    environment = {"MULTILORA_JOBS_MAX_RUNNING": "3", "MULTILORA_JOBS_MEMORY_MIB": "2048"}
    for options, env in (((), {}), ((), environment), (("--jobs-max-running", "2"), environment)):
        assert run("serve", "--base", base, "--port", "0", *options, env=env).exit_code == 0
    limits = [(each.jobs.max_running, each.jobs.memory_bytes) for each in asked]
    assert limits == [(1, None), (3, 2 << 30), (2, 2 << 30)]


def test_what_the_server_was_told_of_its_database_is_not_in_its_options_text(
    run: Command, base: Path, asked: list[ServeSettings]
) -> None:
    run("serve", "--base", base, "--port", "0", "--database-url", NOWHERE)
    assert asked[0].database_url == NOWHERE
    assert "geheim" not in repr(asked)


def test_commands_on_postgresql_share_its_rows_and_leave_no_sqlite(
    run_json: Command, data_dir: Path, tmp_path: Path
) -> None:
    with postgres.running() as full_url:
        url = full_url.replace("postgresql+psycopg://", "postgresql://")
        run_json("tenant", "create", "acme", env={ENVIRONMENT: url})
        assert [each["tenant"] for each in run_json("tenant", "list", env={ENVIRONMENT: url})["data"]] == ["acme"]
        assert run_json("jobs", "list", "--database-url", url)["data"] == []
        assert not (data_dir / "multilora.db").exists()
