"""`multilora bench` runs what the benchmarks' page lists, as the page's own commands do."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.all import NAMES
from server.cli.tools import bench

Command = Callable[..., Any]


def test_everything_that_is_listed_is_there_with_its_claim(run_json: Command) -> None:
    listed = run_json("bench", "list")["data"]
    assert {"op_lora", "versus_peft", "server_load", "all"} <= {each["name"] for each in listed}
    assert len(listed) == (bench.ROOT / "benchmarks" / "README.md").read_text().count("| `python -m benchmarks.")
    for each in listed:
        assert (bench.ROOT / "benchmarks" / f"{each['name']}.py").is_file()
        assert each["claim"]
    minutes = {each["name"]: float(each["minutes"].split()[0]) for each in listed}
    assert minutes["all"] == math.ceil(sum(minutes[name] for name in NAMES))


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source checkout whose one benchmark writes down what it was told, and ends as it was told."""
    folder = tmp_path / "checkout" / "benchmarks"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "README.md").write_text("| `python -m benchmarks.tiny` | runs | none | 0.1 |\n")
    program = "import json, pathlib, sys; print('row'); pathlib.Path('told').write_text(json.dumps(sys.argv[1:]))"
    (folder / "tiny.py").write_text(f"{program}\nsys.exit(3 if '--fail' in sys.argv else 0)\n")
    monkeypatch.setattr(bench, "ROOT", folder.parent)
    return folder.parent


def test_a_run_is_told_its_options_from_any_folder_and_the_answer_is_json_alone(
    checkout: Path,
    run_json: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    told = run_json("bench", "run", "tiny", "--quick", "--out", "results", "--only", "op_lora")
    assert told == {"benchmark": "tiny", "quick": True, "exit_code": 0}
    arguments = json.loads((checkout / "told").read_text())
    assert arguments == ["--quick", "--out", str(tmp_path / "results"), "--only", "op_lora"]


def test_a_benchmark_that_fails_or_is_none_is_said_to(checkout: Path, run: Command) -> None:
    failed = run("bench", "run", "tiny", "--fail")
    assert failed.exit_code == 1
    assert failed.stderr == "benchmark_failed: tiny ended with exit code 3\n"
    unknown = run("bench", "run", "nothing")
    assert unknown.exit_code == 3
    assert unknown.stderr == "benchmark_not_found: unknown benchmark 'nothing'; choose from: tiny\n"


@pytest.mark.parametrize("arguments", [("list",), ("run", "layer")])
def test_an_installed_package_without_them_says_so(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    (tmp_path / "benchmarks").mkdir()  # somebody else's, as such folders are found in site-packages
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    result = run("bench", *arguments)
    assert result.exit_code == 3
    assert result.stderr.startswith("no_benchmarks: ")
    assert "not with the installed package" in result.stderr
