"""`multilora adapter export`: the folder is PEFT's, byte for byte in its weights, and its card says what is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from adapters_store.base.files import base_digest

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
