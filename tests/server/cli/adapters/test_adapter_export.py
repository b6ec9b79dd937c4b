"""`multilora adapter export`: the folder is PEFT's, byte for byte in its weights, and its card says what is known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from adapters_store.base.files import base_digest
from server.cli.adapters.gguf import convert, lora_config
from server.cli.common.failures import CommandError

Command = Callable[..., Any]


@pytest.fixture
def pushed(run: Command, run_json: Command, base: Path, adapter: Path) -> dict[str, Any]:
    """acme/law@1 for the base."""
    run("tenant", "create", "acme")
    return dict(run_json("adapter", "push", adapter, "--tenant", "acme", "--name", "law", "--base", base))


def test_an_exported_folder_can_be_pushed_again_and_is_the_same_adapter(
    run_json: Command, pushed: Any, base: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "hub" / "law"
    told = run_json("adapter", "export", "law", "-t", "acme", "--out", out, "--base-model", "org/base")
    assert (told["adapter"], told["has_report"]) == (pushed["digest"], False)
    assert {path.name for path in out.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    weights = "adapter_model.safetensors"
    assert (out / weights).read_bytes() == (adapter / weights).read_bytes()
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    _, head, text = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["base_model"] == "org/base"
    assert base_digest(base) in text
    assert "not known here" in text
    assert not [path for path in out.parent.iterdir() if path != out]
    again = run_json("adapter", "push", out, "-t", "acme", "-n", "again", "--base", base)
    assert again["rank"] == pushed["rank"]


def test_a_folder_that_exists_is_not_written_to(run_json: Command, pushed: Any, tmp_path: Path) -> None:
    error = run_json("adapter", "export", "law", "-t", "acme", "--out", tmp_path)["error"]
    assert error["code"] == "out_exists"


def gguf(run_json: Command, base: Path, out: Path, *more: object) -> dict[str, Any]:
    return dict(run_json("adapter", "export", "law", "-t", "acme", "--out", out, "--base", base, *more))


@pytest.mark.parametrize(
    ("form", "script"), [("gguf", "convert_hf_to_gguf.py"), ("gguf-lora", "convert_lora_to_gguf.py")]
)
def test_without_llama_cpp_the_message_names_its_script_and_where_to_get_it(
    run_json: Command, pushed: Any, base: Path, tmp_path: Path, form: str, script: str
) -> None:
    error = gguf(run_json, base, tmp_path / "law.gguf", "--format", form, "--llama-cpp", tmp_path)["error"]
    assert error["code"] == "no_converter"
    assert script in error["message"]
    assert "github.com/ggml-org/llama.cpp" in error["message"]
    assert list(tmp_path.glob("*.gguf")) == []


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("import sys\nsys.exit('Model Odd is not supported')", "convert_lora_to_gguf.py: Model Odd is not supported"),
        ("print('done')", "convert_lora_to_gguf.py: done"),
    ],
)
def test_a_converter_that_fails_or_writes_no_gguf_leaves_no_file(
    run_json: Command, pushed: Any, base: Path, tmp_path: Path, script: str, said: str
) -> None:
    (tmp_path / "convert_lora_to_gguf.py").write_text(script)
    out = tmp_path / "out" / "law.gguf"
    error = gguf(run_json, base, out, "--format", "gguf-lora", "--llama-cpp", tmp_path)["error"]
    assert (error["code"], error["message"]) == ("converter_failed", said)
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [(("--format", "onnx"), "peft, gguf, gguf-lora"), (("--format", "gguf"), "--base")],
)
def test_wrong_options_are_refused_by_name(
    run_json: Command, pushed: Any, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    error = run_json("adapter", "export", "law", "-t", "acme", "--out", tmp_path / "law.gguf", *options)["error"]
    assert error["code"] == "bad_field"
    assert said in error["message"]


def test_the_one_scale_of_a_gguf_adapter_is_pefts_or_refused() -> None:
    """llama.cpp divides alpha by the rank of each layer."""
    plain = {"r": 16, "lora_alpha": 32}
    assert lora_config(plain)["lora_alpha"] / 16 == 2
    assert lora_config({**plain, "use_rslora": True})["lora_alpha"] / 16 == 32 / math.sqrt(16)
    assert lora_config({**plain, "rank_pattern": {"q_proj": 4}})["lora_alpha"] == 32
    for pattern in ({"alpha_pattern": {"q_proj": 4}}, {"use_rslora": True, "rank_pattern": {"q_proj": 4}}):
        with pytest.raises(CommandError, match="one scale for all layers"):
            lora_config({**plain, **pattern})


def test_a_converter_that_fails_in_no_known_encoding_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "convert.py"
    script.write_text("import os, sys; os.write(2, b'it broke at \\xff\\n'); sys.exit(1)")
    with pytest.raises(CommandError, match="it broke at") as failed:
        convert(script, tmp_path, tmp_path / "out.gguf")
    assert failed.value.code == "converter_failed"
