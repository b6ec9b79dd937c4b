"""A GGUF file where a command takes a base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.peers.gguf_files import Q8_0, write_gguf
from server.cli.common.base_path import find_base
from server.cli.common.output import Output
from server.cli.serve.command import settings_from
from server.cli.serve.settings import SERVE_SETTINGS
from server.cli.tools.checks import Level, check_base
from server.demo.assets import BASE_FOLDER
from trainer.__main__ import main

Command = Callable[..., Any]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_gguf(BASE_FOLDER, tmp_path / "demo.Q8_0.gguf", Q8_0)


def test_a_server_takes_the_converted_folder_and_the_files_name(
    file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    values = {name: each.default for name, each in SERVE_SETTINGS.items()}
    settings = settings_from({**values, "base": str(file)}, Output())
    folder = Path(settings.engine.base)
    assert folder.parent == tmp_path / "cache" / "multilora" / "bases"
    assert settings.engine.served_name == "demo.Q8_0"
    assert f"{file}: Q8_0 weights, dequantised to bfloat16 in {folder}" in capsys.readouterr().out
    assert find_base(str(file)) == (folder, "demo.Q8_0")


def test_doctor_says_what_the_file_is(file: Path, tmp_path: Path) -> None:
    found = check_base(str(file))
    assert found.level is Level.OK
    assert found.found.startswith("LlamaForCausalLM, bfloat16, 29 layers that take adapters; dequantised from GGUF")
    odd = check_base(str(write_gguf(BASE_FOLDER, tmp_path / "odd.gguf", arch="gemma3")))
    assert odd.level is Level.FAIL
    assert "the architecture 'gemma3'" in odd.found


def test_a_plan_reads_the_header_alone(file: Path, run_json: Command, tmp_path: Path) -> None:
    answers = [run_json("plan", "train", "--model", model) for model in (file, BASE_FOLDER)]
    for answer in answers:
        answer.pop("model", None)
    assert json.dumps(answers[0]).replace("demo.Q8_0.gguf", "base") == json.dumps(answers[1])
    assert not (tmp_path / "cache").exists()


def test_a_training_run_refuses_another_architecture_by_its_name(file: Path, tmp_path: Path) -> None:
    odd = write_gguf(BASE_FOLDER, tmp_path / "odd.gguf", arch="gemma3")
    spec = {"base": str(odd), "data": str(tmp_path / "none.jsonl"), "method": "lora"}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    assert main([str(tmp_path / "spec.yaml"), "--run-dir", str(tmp_path / "run")]) == 2
    error = json.loads((tmp_path / "run" / "result.json").read_text())["error"]
    assert error["code"] == "unsupported_base"
    assert "the architecture 'gemma3'" in error["message"]
