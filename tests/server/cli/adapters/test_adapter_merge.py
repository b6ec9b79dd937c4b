"""`multilora adapter merge` on a real store: what it writes, and that the old base's adapters do not fit it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters_store.base.digests import base_digest
from adapters_store.base.files import describe_base

Command = Callable[..., Any]


@pytest.fixture
def pushed(run: Command, run_json: Command, base: Path, adapter: Path) -> dict[str, Any]:
    """acme/law@1 for the base; the base's name and digest come back with it."""
    run("tenant", "create", "acme")
    return dict(run_json("adapter", "push", adapter, "--tenant", "acme", "--name", "law", "--base", base))


def test_merge_writes_a_base_of_its_own(run_json: Command, pushed: Any, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "law-base"
    told = run_json("adapter", "merge", "law", "--tenant", "acme", "--base", base, "--out", out)
    assert told["digest"] == base_digest(out) != told["base_digest"] == base_digest(base)
    assert told["adapter"] == pushed["digest"]
    assert told["parity"]["error"] <= told["parity"]["tolerance"]
    assert describe_base(out).name == "law-base"


def test_people_see_the_measured_parity(run: Command, pushed: Any, base: Path, tmp_path: Path) -> None:
    shown = run("adapter", "merge", "law@1", "-t", "acme", "--base", base, "--out", tmp_path / "out").stdout
    assert "logits differ by" in shown
    assert "(tolerance 1e-04)" in shown
    assert "a new base: it refuses adapters of tiny" in shown


def test_an_adapter_that_names_the_old_base_is_refused_on_the_merged_one(
    run: Command, run_json: Command, pushed: Any, base: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "law-base"
    run("adapter", "merge", "law", "-t", "acme", "--base", base, "--out", out)
    named = tmp_path / "named"
    named.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["multilora_base_digest"] = base_digest(base)
    (named / "adapter_config.json").write_text(json.dumps(config))
    (named / "adapter_model.safetensors").symlink_to(adapter / "adapter_model.safetensors")
    assert run_json("adapter", "push", named, "-t", "acme", "-n", "ok", "--base", base)["rank"] == 4
    error = run_json("adapter", "push", named, "-t", "acme", "-n", "no", "--base", out)["error"]
    assert error["code"] == "wrong_base"
    assert base_digest(base) in error["message"]
    assert "(law-base)" in error["message"]


@pytest.mark.parametrize(
    ("extra", "code", "exit_code"),
    [
        (("--quantize", "nf4"), "merge_not_exact", 4),
        (("--quantize", "int8"), "bad_field", 4),
        (("--out", "."), "out_exists", 4),
        (("--base", "/nowhere"), "base_not_found", 3),
    ],
)
def test_refusals_have_a_code_and_write_nothing(
    run: Command, pushed: Any, base: Path, tmp_path: Path, extra: tuple[str, ...], code: str, exit_code: int
) -> None:
    out = tmp_path / "out"
    result = run("adapter", "merge", "law", "-t", "acme", "--base", base, "--out", out, *extra)
    assert result.exit_code == exit_code, result.output
    assert result.stderr.startswith(f"{code}: ")
    assert not out.exists()


def test_nf4_is_refused_with_the_measured_error(run: Command, pushed: Any, base: Path, tmp_path: Path) -> None:
    result = run("adapter", "merge", "law", "-t", "acme", "--base", base, "--out", tmp_path / "o", "--quantize", "nf4")
    assert "merging into a 4-bit base is not exact" in result.stderr
    assert "logits differ by" in result.stderr


def test_another_base_is_refused(run_json: Command, pushed: Any, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "law-base"
    run_json("adapter", "merge", "law", "-t", "acme", "--base", base, "--out", out)
    error = run_json("adapter", "merge", "law", "-t", "acme", "--base", out, "--out", tmp_path / "twice")["error"]
    assert error["code"] == "wrong_base"
    assert pushed["base"] in error["message"]


def test_someone_elses_adapter_is_not_found(run: Command, pushed: Any, base: Path, tmp_path: Path) -> None:
    run("tenant", "create", "other")
    result = run("adapter", "merge", "law", "-t", "other", "--base", base, "--out", tmp_path / "out")
    assert result.exit_code == 3
    assert result.stderr.startswith("model_not_found: ")


def test_weights_that_changed_on_the_disk_are_not_merged(
    run: Command, run_json: Command, pushed: Any, base: Path, tmp_path: Path, data_dir: Path
) -> None:
    [weights] = (data_dir / "blobs").glob("??/*/adapter_model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    error = run_json("adapter", "merge", "law", "-t", "acme", "--base", base, "--out", tmp_path / "out")["error"]
    assert error["code"] == "blob_damaged"
    assert not (tmp_path / "out").exists()
