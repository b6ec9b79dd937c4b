"""`adapter push` of folders as people have them: each says what it is, and the way out that it names works."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters_store.base.files import describe_base
from adapters_store.store import AdapterStore

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 1234567\n"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

Push = Callable[[Path], Any]


@pytest.fixture
def push(run_json: Callable[..., Any], data_dir: Path, base: Path) -> Push:
    store = AdapterStore.open(data_dir)
    store.remember_base(describe_base(base, name="served"))
    store.tenants.create("acme")
    store.close()
    return lambda folder: run_json("adapter", "push", folder, "--tenant", "acme", "--name", "law")


@pytest.fixture
def folder(copy_of: Callable[[Path], Path], adapter: Path) -> Path:
    return copy_of(adapter)


def follow(advice: str, folder: Path) -> None:
    """Run the command that a refusal ends with."""
    program, *arguments = shlex.split(advice[advice.index("python -c") :])
    assert program == "python"
    subprocess.run([sys.executable, *arguments], cwd=folder, check=True, timeout=300)


def test_an_old_pefts_bin_names_the_command_that_converts_it(push: Push, folder: Path, adapter: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    error = push(folder)["error"]
    assert error["code"] == "pickle"
    assert "adapter_model.bin is a pickle" in error["message"]
    follow(error["message"], folder)
    assert push(folder)["digest"] == push(adapter)["digest"]


def test_shards_name_the_command_that_joins_them(push: Push, folder: Path, adapter: Path) -> None:
    tensors = list(load_file(folder / WEIGHTS).items())
    for number, part in enumerate((tensors[::2], tensors[1::2]), start=1):
        save_file(dict(part), folder / f"adapter_model-0000{number}-of-00002.safetensors")
    (folder / WEIGHTS).unlink()
    error = push(folder)["error"]
    assert error["code"] == "sharded_weights"
    follow(error["message"], folder)
    assert push(folder)["digest"] == push(adapter)["digest"]


def _mlx(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapters.safetensors")
    parameters = {"rank": 8, "scale": 20.0, "dropout": 0.0}
    body = {"fine_tune_type": "lora", "lora_parameters": parameters, "num_layers": 16, "model": "mlx-community/x"}
    (folder / CONFIG).write_text(json.dumps(body))


def _checkpoint(folder: Path) -> None:
    inner = folder / "checkpoint-500"
    inner.mkdir()
    for name in (CONFIG, WEIGHTS):
        (folder / name).rename(inner / name)


def _whole_model(folder: Path) -> None:
    (folder / CONFIG).unlink()
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')


@pytest.mark.parametrize(
    ("spoil", "code", "words"),
    [
        (lambda f: (f / WEIGHTS).write_bytes(LFS), "git_lfs_pointer", "git lfs pull"),
        (lambda f: (f / CONFIG).write_bytes(LFS), "git_lfs_pointer", "git lfs pull"),
        (_mlx, "unsupported_format", "made by MLX-LM"),
        (_checkpoint, "missing_config", "checkpoint-500"),
        (_whole_model, "missing_config", "serve it as a base"),
        (lambda f: (f / WEIGHTS).rename(f / "model.safetensors"), "missing_weights", "model.safetensors"),
        (lambda f: (f / WEIGHTS).rename(f / "pytorch_lora.pt"), "pickle", "pytorch_lora.pt"),
        (lambda f: (f / WEIGHTS).write_bytes(b"GGUF\3\0\0\0" * 9), "unsupported_format", "GGUF"),
        (lambda f: (f / WEIGHTS).write_bytes(b"<!DOCTYPE html><html>404"), "unsupported_format", "web page"),
    ],
    ids=["lfs weights", "lfs config", "mlx", "checkpoint", "model", "other name", "pt", "gguf", "html"],
)
def test_a_folder_that_is_something_else_is_called_so(
    push: Push, folder: Path, spoil: Callable[[Path], object], code: str, words: str
) -> None:
    spoil(folder)
    error = push(folder)["error"]
    assert error["code"] == code
    assert words in error["message"]


def test_a_chat_template_and_tokens_of_its_own_are_noted(push: Push, folder: Path, adapter: Path) -> None:
    assert push(adapter)["notes"] == []
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    (folder / "added_tokens.json").write_text(json.dumps({"<|law|>": 420, "<|med|>": 421}))
    template, tokens = push(folder)["notes"]
    assert template.startswith("tokenizer_config.json brings a chat template, which is not used")
    assert tokens.startswith("added_tokens.json adds 2 tokens (<|law|>, <|med|>), which are not used")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert push(folder)["notes"][0].startswith("chat_template.jinja brings")
