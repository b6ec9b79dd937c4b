"""What `multilora serve` cannot serve: one line each, an exit code, and no traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]
SMALL = ("--port", "0", "--threads", "1")


def _set_config(folder: Path, **changes: object) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))


def _cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json there"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no *.safetensors there"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: _set_config(folder, architectures=["MambaForCausalLM"]), "MambaForCausalLM is not supported"),
        (_cut_weights, "--base"),
        (lambda folder: [each.unlink() for each in folder.glob("tokenizer*")], "--base"),
    ],
)
def test_a_base_that_is_none_exits_6(
    run: Command, base: Path, copy_of: Callable[[Path], Path], spoil: Callable[[Path], object], words: str
) -> None:
    folder = copy_of(base)
    spoil(folder)
    result = run("serve", "--base", folder, *SMALL)
    assert result.exit_code == 6
    assert result.stderr.startswith("unsupported_base: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr


def test_a_base_that_does_not_exist_exits_3(run: Command) -> None:
    result = run("serve", "--base", "./no/such/folder")
    assert result.exit_code == 3
    assert result.stderr == "base_not_found: --base ./no/such/folder: no such folder\n"


@pytest.mark.parametrize("hub_id", ["someone/some-model-1B", "some-model", "some--one/x"])
def test_a_hub_id_without_a_local_copy_says_how_to_get_one(run: Command, tmp_path: Path, hub_id: str) -> None:
    result = run("serve", "--base", hub_id)
    assert result.exit_code == 3
    assert f"hf download {hub_id}" in result.stderr
    assert result.stderr.count("\n") == 1


def test_cuda_without_a_gpu_exits_6(run: Command, base: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    result = run("serve", "--base", base, "--device", "cuda", *SMALL)
    assert result.exit_code == 6
    assert "no CUDA device" in result.stderr


def test_more_memory_than_there_is_exits_6(run: Command, base: Path) -> None:
    result = run("serve", "--base", base, "--adapter-pool-mib", str(1 << 30), *SMALL)
    assert result.exit_code == 6
    assert result.stderr.startswith("out_of_memory: ")
    assert result.stderr.count("\n") == 1


def test_fewer_tokens_than_requests_in_a_batch_is_wrong_usage(run: Command, base: Path) -> None:
    result = run("serve", "--base", base, "--max-running", "100", "--max-batch-tokens", "50")
    assert result.exit_code == 2
    words = " ".join(result.stderr.replace("│", " ").split())
    assert "--max-batch-tokens: must be at least --max-running (100), got 50" in words


def test_a_busy_port_exits_5(run: Command, base: Path, busy_port: int) -> None:
    result = run("serve", "--base", base, "--port", str(busy_port))
    assert result.exit_code == 5
    assert result.stderr == (
        f"port_in_use: 127.0.0.1:{busy_port} is in use; stop what listens there, or give another --port\n"
    )


def test_a_host_that_is_none_exits_2(run: Command, base: Path) -> None:
    result = run("serve", "--base", base, "--host", "256.1.2.3.nowhere.invalid")
    assert result.exit_code == 2
    assert result.stderr.startswith("bad_host: ")


def test_a_host_of_another_machine_exits_2(run: Command, base: Path) -> None:
    result = run("serve", "--base", base, "--host", "192.0.2.1")  # an address kept for documents
    assert result.exit_code == 2
    assert result.stderr == "bad_host: --host 192.0.2.1: not an address of this machine\n"


def test_a_longer_context_than_the_bases_exits_6(run: Command, base: Path) -> None:
    """Cut in silence, it would be found by the first long prompt."""
    result = run("serve", "--base", base, "--port", "0", "--max-model-len", "1000000")
    assert result.exit_code == 6
    assert "max_model_len: the base takes" in result.stderr
    assert "got 1000000" in result.stderr


def test_a_short_admin_key_exits_4(run: Command, base: Path) -> None:
    result = run("serve", "--base", base, *SMALL, env={"MULTILORA_ADMIN_KEY": "short"})
    assert result.exit_code == 4
    assert result.stderr.startswith("bad_admin_key: MULTILORA_ADMIN_KEY: ")
    assert "16" in result.stderr


def test_a_generation_config_that_does_not_do_exits_6_before_anything_is_loaded(
    run: Command, base: Path, tmp_path: Path
) -> None:
    (tmp_path / "generation_config.json").write_text('{"temperature": 3}')
    result = run("serve", "--base", base, *SMALL, "--generation-config", tmp_path)
    assert result.exit_code == 6
    assert "temperature must be in [0.0, 2.0], got 3" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_cors_origin_that_no_browser_sends_exits_2(run: Command, base: Path) -> None:
    result = run("serve", "--base", base, *SMALL, "--cors-origin", "app.example.com/")
    assert result.exit_code == 2
    assert "--cors-origin" in result.stderr
    assert "app.example.com/" in result.stderr
