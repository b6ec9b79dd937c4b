"""Every setting of `serve` can be given by option, variable and file, and counts in this order."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.api.settings import ApiSettings
from server.cli.serve import run as serving
from server.cli.serve.settings import SERVE_SETTINGS, ServeSettings
from server.engine.schedule import SchedulerSettings
from server.engine.startup.settings import EngineSettings
from server.jobs.limits import JobLimits
from server.settings import Setting
from support.reference.settings import setting_rows

Command = Callable[..., Any]
GIVEN_BY_THE_START = {"base", "data_dir", "served_name", "admin_keys", "sampling_defaults", "scheduler", "memory"}
NOT_FOR_SERVE = {"max_rank"}  # what the server's store accepts


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[ServeSettings]:
    """What the server would have been started with."""
    found: list[ServeSettings] = []
    monkeypatch.setattr(serving, "run", lambda settings, *_: found.append(settings))
    return found


@pytest.fixture
def printed(run: Command) -> Callable[..., dict[str, Any]]:
    def invoke(*arguments: str | Path, **options: Any) -> dict[str, Any]:
        result = run("serve", *arguments, "--print-config", "--json", **options)
        assert result.exit_code == 0, result.output
        settings = json.loads(result.stdout)["settings"]
        assert isinstance(settings, dict)
        return settings

    return invoke


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "multilora.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("cls", [EngineSettings, SchedulerSettings, ApiSettings, JobLimits])
def test_no_field_of_the_engine_the_scheduler_the_api_or_the_jobs_is_out_of_reach(cls: type) -> None:
    reached = {each.about.name or each.name.removeprefix("jobs_") for each in SERVE_SETTINGS.values()}
    own = {next((about.name for about in item.metadata.values()), "") or item.name for item in _settable(cls)}
    assert own - reached <= NOT_FOR_SERVE


def _settable(cls: type) -> list[Any]:
    return [item for item in fields(cls) if item.name not in GIVEN_BY_THE_START]


def another(setting: Setting) -> Any:
    """A value that is allowed and not the default."""
    if setting.about.choices:
        return setting.about.choices[-1]
    if setting.kind is bool:
        return not setting.default
    if setting.kind is str:
        own = {"--import-prefix": "s3://bucket/adapters", "--jobs-track": "tensorboard"}
        return own.get(setting.option, "https://app.example.com")
    if setting.kind is int:
        return 2 * (setting.default or 4)
    return setting.default / 2 if setting.kind is float and setting.default else 1.5


def test_each_setting_can_be_given_by_file_variable_and_option(
    printed: Callable[..., dict[str, Any]], config: Callable[[str], Path]
) -> None:
    values = {name: another(each) for name, each in SERVE_SETTINGS.items() if each.kind is not Path}
    assert len(values) == len(SERVE_SETTINGS) - 1
    path = config(yaml.safe_dump(values))
    variables, options = {}, []
    for name, value in values.items():
        setting = SERVE_SETTINGS[name]
        variables[setting.environment[0]] = str(value)
        no_option = f"--no-{setting.option[2:]}"
        options += (
            [setting.option, str(value)] if setting.kind is not bool else [setting.option if value else no_option]
        )
    by_file, by_variable, by_option = printed("--config", path), printed(env=variables), printed(*options)
    for name, value in values.items():
        setting = SERVE_SETTINGS[name]
        shown = [value] if setting.is_list else "***" if setting.about.secret else value
        assert by_file[name] == {"value": shown, "source": str(path)}
        assert by_variable[name] == {"value": shown, "source": setting.environment[0]}
        assert by_option[name] == {"value": shown, "source": setting.option}


def test_an_option_counts_before_a_variable_and_that_before_the_file(
    run: Command, base: Path, started: list[ServeSettings], config: Callable[[str], Path]
) -> None:
    path = config(f"base: {base}\nport: 0\nmax_running: 10\nmax_waiting: 11\nmax-waiting-per-tenant: 12\n")
    environment = {"MULTILORA_CONFIG": str(path), "MULTILORA_MAX_RUNNING": "20", "MULTILORA_MAX_WAITING": "21"}
    assert run("serve", "--max-running", "30", env=environment).exit_code == 0
    scheduler = started[0].engine.scheduler
    assert (scheduler.max_running, scheduler.max_waiting, scheduler.max_waiting_per_tenant) == (30, 21, 12)
    assert started[0].engine.base == base


def test_each_part_of_the_server_gets_its_settings_in_its_own_unit(
    run: Command, base: Path, started: list[ServeSettings], config: Callable[[str], Path]
) -> None:
    text = (
        "kv_cache_mib: 3\nthreads: 1\nmax_prompts: 5\ncors_origin: https://a.example\njobs_memory_mib: 2\nauth: off\n"
    )
    assert run("serve", "--base", base, "--port", "0", "--config", config(text)).exit_code == 0
    settings = started[0]
    assert settings.engine.memory.kv_cache == 3 << 20
    assert settings.engine.num_threads == 1
    assert settings.api.max_prompts == 5
    assert settings.api.cors_origins == ("https://a.example",)
    assert settings.api.auth == "off"
    assert settings.jobs.memory_bytes == 2 << 20


def test_what_is_not_given_is_as_the_class_has_it(run: Command, base: Path, started: list[ServeSettings]) -> None:
    assert run("serve", "--base", base, "--auth", "off").exit_code == 0
    settings = started[0]
    assert settings.jobs == type(settings.jobs)()
    assert settings.api.cors_origins == settings.api.import_prefixes == ()


def test_what_print_config_prints_is_a_config_file_of_the_same_settings(
    run: Command, printed: Callable[..., dict[str, Any]], config: Callable[[str], Path]
) -> None:
    options = ("--max-running", "3", "--no-prefix-cache", "--cors-origin", "*", "--auth", "off", "--base", "a/b")
    text = run("serve", *options, "--print-config").stdout
    before, after = printed(*options), printed("--config", config(text))
    assert {name: each["value"] for name, each in after.items()} == {
        name: each["value"] for name, each in before.items()
    }
    assert "max_running: 3  # --max-running" in text


def test_print_config_shows_no_secret(run: Command) -> None:
    secrets = {"MULTILORA_DATABASE_URL": "postgresql://me:sesame@host/rows", "MULTILORA_ADMIN_KEY": "sesame" * 5}
    for form in ((), ("--json",)):
        shown = run("serve", "--print-config", *form, env=secrets)
        assert shown.exit_code == 0
        assert "sesame" not in shown.output
        assert "***" in shown.output


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_runing: 3", "unknown setting 'max_runing'; did you mean max_running?"),
        ("xyzzy: 3", "unknown setting 'xyzzy'"),
        ("max_running: 3\nmax_running: 4", "duplicate key 'max_running'"),
        ("max_running: 3\nmax-running: 4", "duplicate key 'max_running'"),
        ("max_running: 0", "max_running must be at least 1, got 0"),
        ("max_running: three", "max_running must be of type integer, got 'three'"),
        ("max_running: 3.5", "max_running must be of type integer, got 3.5"),
        ("max_running: true", "max_running must be of type integer, got True"),
        ("drain_s: .nan", "drain_s must be at least 0, got nan"),
        ("reserved_running: 1", "reserved_running must be below 1, got 1"),
        ("prefix_cache: 1", "prefix_cache must be of type true or false, got 1"),
        ("auth: maybe", "auth must be one of on, off, got 'maybe'"),
        ("block_size: 12", "block_size must be a power of two, got 12"),
        ("cors_origin: [https://a.example/]", "a CORS origin must be of the form"),
        ("[1, 2]", "must hold one setting a line (name: value), got [1, 2]"),
        ("a: [", "while parsing"),
        ("database_url: {password: sesame}", "database_url must be of type text, got ***"),
    ],
)
def test_a_bad_config_is_refused_with_file_name_and_limit(
    run: Command, run_json: Command, config: Callable[[str], Path], text: str, words: str
) -> None:
    path = config(text)
    result = run("serve", "--config", path)
    assert result.exit_code == 4
    assert result.stderr.startswith(f"bad_config: {path}: ")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert run_json("serve", "--config", path)["error"]["code"] == "bad_config"
    assert "sesame" not in result.output


def test_a_config_that_is_missing_exits_3(run: Command, tmp_path: Path) -> None:
    result = run("serve", "--config", tmp_path / "none.yaml")
    assert result.exit_code == 3
    assert result.stderr == f"file_not_found: {tmp_path}/none.yaml: No such file or directory\n"


@pytest.mark.parametrize("given", SERVE_SETTINGS.values(), ids=lambda given: given.name)
def test_no_time_and_no_factor_is_endless(given: Setting) -> None:
    """An infinite Retry-After, say, was an internal error at the first refusal."""
    if given.kind is float or given.unit == "seconds":
        with pytest.raises(ValueError, match=rf"{given.name} must be (at most|below) \S+, got inf"):
            given.check(math.inf)


def test_a_variable_out_of_range_is_wrong_usage_and_named(run: Command) -> None:
    result = run("serve", env={"MULTILORA_MAX_RUNNING": "0", "COLUMNS": "300"})
    assert result.exit_code == 2
    assert "MULTILORA_MAX_RUNNING" in result.stderr


def test_a_misspelt_variable_is_pointed_out(run: Command, base: Path, started: list[ServeSettings]) -> None:
    result = run("serve", "--base", base, "--port", "0", env={"MULTILORA_MAX_RUNING": "3", "MULTILORA_FUZZ": "1"})
    assert result.exit_code == 0
    assert "MULTILORA_MAX_RUNING sets nothing; did you mean MAX_RUNNING?" in result.stdout
    assert "MULTILORA_FUZZ" not in result.stdout
    assert started[0].engine.scheduler.max_running == SchedulerSettings().max_running


def test_variables_that_kubernetes_sets_for_the_service_are_no_settings(
    run: Command, base: Path, started: list[ServeSettings]
) -> None:
    """A pod beside a service called multilora gets these unless it refuses them."""
    links = {
        "MULTILORA_PORT": "tcp://10.0.0.7:8000",
        "MULTILORA_PORT_8000_TCP": "tcp://10.0.0.7:8000",
        "MULTILORA_PORT_8000_TCP_ADDR": "10.0.0.7",
        "MULTILORA_PORT_8000_TCP_PORT": "8000",
        "MULTILORA_PORT_8000_TCP_PROTO": "tcp",
        "MULTILORA_SERVICE_HOST": "10.0.0.7",
        "MULTILORA_SERVICE_PORT": "8000",
        "MULTILORA_SERVICE_PORT_HTTP": "8000",
    }
    shown = run("serve", "--print-config", "--json", env=links)
    assert json.loads(shown.stdout)["settings"]["port"] == {"value": 8000, "source": "default"}
    result = run("serve", "--base", base, "--port", "0", env=links)
    assert (result.exit_code, started[0].host) == (0, "127.0.0.1")
    assert "sets nothing" not in result.stdout


def test_the_table_for_the_reference_has_a_row_for_every_option(run: Command) -> None:
    rows = setting_rows()
    shown = run("serve", "--help", env={"COLUMNS": "300"}).stdout
    for row in rows:
        assert row["option"] in shown
        assert row["help"].endswith(".")
        assert row["type"]
        assert row["env"].startswith("MULTILORA_")
    assert len({row["name"] for row in rows}) == len(rows) == len(SERVE_SETTINGS)
