"""`multilora doctor`: what it finds on this machine, and on ones that lack something."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.cli.common import listening
from server.cli.tools import checks
from server.cli.tools.checks import Level

Command = Callable[..., Any]


@pytest.fixture
def by_name(run_json: Command) -> Callable[..., dict[str, Any]]:
    return lambda *arguments: {check["name"]: check for check in run_json("doctor", *arguments)["checks"]}


def test_this_machine_passes(run: Command, run_json: Command, base: Path) -> None:
    answer = run_json("doctor", "--base", base, "--port", "0")
    assert answer["ok"] is True, answer
    names = [check["name"] for check in answer["checks"]]
    assert names == [
        *(
            "python",
            "torch",
            "transformers",
            "C kernels",
            "bf16",
            "CPUs",
            "open files",
            "bitsandbytes",
            "triton",
            "GPU",
        ),
        *("data dir", "store", "memory", "base", "port"),
    ]
    shown = run("doctor", "--port", "0")
    assert shown.exit_code == 0
    assert "transformers" in shown.stdout


def test_nothing_is_made_in_a_data_dir_that_does_not_exist(by_name: Command, data_dir: Path) -> None:
    found = by_name()
    assert found["data dir"]["found"] == f"{data_dir} (to be created)"
    assert found["store"]["found"] == "none yet"
    assert not data_dir.exists()


def test_a_store_is_opened_and_counted(by_name: Command, run: Command) -> None:
    run("tenant", "create", "acme")
    assert by_name()["store"]["found"] == "1 tenants, 0 adapters"


def test_a_damaged_store_fails_with_exit_code_1(run: Command, by_name: Command, data_dir: Path) -> None:
    data_dir.mkdir()
    (data_dir / "multilora.db").write_bytes(b"no database" * 1000)
    assert run("doctor", "--json").exit_code == 1
    store = by_name()["store"]
    assert store["level"] == "fail"
    assert store["found"].startswith("database_error: ")
    assert store["advice"]


def test_a_base_that_is_none_fails(by_name: Command, tmp_path: Path) -> None:
    found = by_name("--base", tmp_path)["base"]
    assert found["level"] == "fail"
    assert "no config.json there" in found["found"]


def test_a_busy_port_is_a_warning(by_name: Command, busy_port: int) -> None:
    found = by_name("--port", str(busy_port))["port"]
    assert found["level"] == "warn"
    assert str(busy_port) in found["found"]


def test_an_admin_key_that_others_may_read_is_a_warning(data_dir: Path) -> None:
    data_dir.mkdir()
    key = data_dir / "admin.key"
    key.write_text("k" * 40)
    key.chmod(0o644)
    assert checks.check_data_dir(data_dir).advice == f"chmod 600 {key}"
    key.chmod(0o600)
    assert checks.check_data_dir(data_dir).level is Level.OK


def test_without_c_kernels_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_kernels.native.build import native_build

    monkeypatch.setenv("MULTILORA_NATIVE", "off")
    native_build.cache_clear()
    try:
        found = checks.check_native()
    finally:
        native_build.cache_clear()
    assert (found.level, found.found) == (Level.WARN, "MULTILORA_NATIVE=off")
    assert found.advice


@pytest.mark.parametrize(
    ("cpu_info", "level"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16\n", Level.OK),
        ("flags\t\t: fpu avx2 avx512f\n", Level.WARN),
        ("Features\t: fp asimd bf16\n", Level.OK),
        ("", Level.WARN),
    ],
)
def test_bf16_is_read_from_the_cpus_flags(tmp_path: Path, cpu_info: str, level: Level) -> None:
    (tmp_path / "cpuinfo").write_text(cpu_info)
    assert checks.check_bf16(tmp_path / "cpuinfo").level is level


def test_a_package_too_old_fails_and_a_missing_one_says_what_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "version", lambda name: "0.0.1")
    old = checks.check_package("transformers")
    assert old.level is Level.FAIL
    assert "transformers>=" in old.advice
    monkeypatch.undo()
    monkeypatch.setattr(checks, "version", _missing)
    assert checks.check_package("transformers").level is Level.FAIL
    missing = checks.check_package("bitsandbytes", without="nf4 is off: ")
    assert missing.level is Level.WARN
    assert missing.advice.startswith("nf4 is off: pip install 'bitsandbytes")


def _missing(name: str) -> str:
    raise checks.PackageNotFoundError(name)


def test_a_containers_limit_counts_as_the_machines_memory(tmp_path: Path, base: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{3 << 20}\n")
    (tmp_path / "memory.current").write_text(f"{2 << 20}\n")
    found = checks.check_memory(None, cgroup=tmp_path)
    assert found.level is Level.WARN
    assert found.found == "1.0 MiB free"
    (tmp_path / "memory.current").write_text(f"{(3 << 20) - 1000}\n")
    assert checks.check_memory(str(base), cgroup=tmp_path).level is Level.FAIL
    (tmp_path / "memory.max").write_text("max\n")
    assert "free" in checks.check_memory(None, cgroup=tmp_path).found


@pytest.mark.parametrize(
    ("quota", "level", "found"),
    [
        ("50000 100000", Level.WARN, "0.5 of {cpus}: the control group's quota"),
        ("100000 100000", Level.OK, "1 of {cpus}: the control group's quota"),
        ("99999900000 100000", Level.OK, "{cpus}"),
        ("max 100000", Level.OK, "{cpus}"),
    ],
)
def test_a_containers_cpus_count_not_the_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, level: Level, found: str
) -> None:
    monkeypatch.setattr(checks, "affinity", lambda: 64)
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    check = checks.check_cpus(tmp_path, tmp_path / "own")
    assert (check.level, check.found) == (level, found.format(cpus=64))
    assert bool(check.advice) == (level is Level.WARN)


@pytest.mark.parametrize(
    ("allowed", "level", "found"),
    [
        (1 << 20, Level.OK, "1048576"),
        (1024, Level.WARN, "1024: 768 connections, not 2048"),
        (200, Level.FAIL, "too_few_files: the process may open 200 files"),
    ],
)
def test_open_files_are_compared_with_the_connections_of_a_server(allowed: int, level: Level, found: str) -> None:
    check = checks.check_open_files(allowed)
    assert check.level is level
    assert check.found.startswith(found)
    assert ("ulimit -Hn" in check.advice) == (level is not Level.OK)


def test_the_limit_compared_is_the_systems_not_the_shells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening.resource, "getrlimit", lambda _: (64, 4096))
    assert checks.check_open_files().found == "4096"
