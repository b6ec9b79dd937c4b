"""`adapter push` of folders as people have them: each says what it is, and the way out that it names works."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters_store.base.files import describe_base
from adapters_store.errors import AdapterRejected
from adapters_store.parsing.adapter_files import HEAD_BYTES, refuse_foreign_weights
from adapters_store.store import AdapterStore
from server.cli.adapters.bin_child import convert

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 1234567\n"
WEIGHTS, CONFIG, BIN = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"

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


def saved_as_bin(folder: Path, content: object = None) -> Path:
    torch.save(load_file(folder / WEIGHTS) if content is None else content, folder / BIN)
    (folder / WEIGHTS).unlink()
    return folder


def test_an_old_pefts_bin_is_the_adapter_that_its_tensors_are(
    push: Push, folder: Path, adapter: Path, data_dir: Path
) -> None:
    digest = push(adapter)["digest"]
    files = sorted(data_dir.iterdir())
    assert push(saved_as_bin(folder))["digest"] == digest
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, BIN]  # the folder is read only
    assert sorted(data_dir.iterdir()) == files  # and nothing of the way there is left


def test_the_command_that_the_server_names_for_a_bin_converts_it(push: Push, folder: Path, adapter: Path) -> None:
    head = saved_as_bin(folder).joinpath(BIN).read_bytes()[:HEAD_BYTES]
    with pytest.raises(AdapterRejected) as caught:
        refuse_foreign_weights(head)
    assert caught.value.code == "pickle"
    follow(caught.value.message, folder)
    assert push(folder)["digest"] == push(adapter)["digest"]


class Payload:
    """Unpickled as Python's pickle does it, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._marker),)


HOSTILE: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "a call among tensors": (lambda f, m: torch.save({"a": torch.ones(2, 2), "b": Payload(m)}, f), "names posix.mkdir"),
    "a call alone": (lambda f, m: torch.save(Payload(m), f), "names posix.mkdir"),
    "a bare pickle": (lambda f, m: f.write_bytes(pickle.dumps({"a": Payload(m)}, protocol=2)), "names posix.mkdir"),
    "the old format": (
        lambda f, m: torch.save({"a": Payload(m)}, f, _use_new_zipfile_serialization=False),
        "names posix.mkdir",
    ),
}
SOUND: dict[str, tuple[Callable[[Path], object], str]] = {
    "a list": (lambda f: torch.save([torch.ones(2, 2)], f), "it holds a list"),
    "a number": (lambda f: torch.save({"a": torch.ones(2, 2), "epoch": 3}, f), "'epoch' is no plain tensor"),
    "noise": (lambda f: f.write_bytes(b"PK\3\4" + bytes(200)), "torch cannot read it"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_bin_is_refused_and_its_payload_does_not_run(tmp_path: Path, kind: str) -> None:
    make, words = HOSTILE[kind]
    source, target, marker = tmp_path / BIN, tmp_path / WEIGHTS, tmp_path / "ran"
    make(source, marker)
    reason = convert(source, target)
    assert reason is not None
    assert words in reason
    assert not marker.exists()
    assert not target.exists()
    with suppress(Exception):  # the payload is a real one: a reader of any pickle runs it
        torch.load(source, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("kind", SOUND)
def test_a_bin_that_is_no_adapter_says_what_it_is(tmp_path: Path, kind: str) -> None:
    make, words = SOUND[kind]
    make(tmp_path / BIN)
    assert words in str(convert(tmp_path / BIN, tmp_path / WEIGHTS))
    assert not (tmp_path / WEIGHTS).exists()


def test_a_push_of_a_hostile_bin_is_refused_by_its_process(push: Push, folder: Path, tmp_path: Path) -> None:
    saved_as_bin(folder, {"a": torch.ones(2, 2), "b": Payload(tmp_path / "ran")})
    error = push(folder)["error"]
    assert (error["code"], error["param"]) == ("pickle", "weights")
    assert error["message"].startswith("adapter_model.bin: it names posix.mkdir, which is no tensor")
    assert not (tmp_path / "ran").exists()


def test_a_hub_cache_is_pushed_by_its_main_snapshot(push: Push, adapter: Path, tmp_path: Path) -> None:
    """As huggingface_hub lays it out: names in snapshots/, which link to blobs/."""
    cache = tmp_path / "models--acme--law"
    for folder in ("blobs", "refs", "snapshots/aaa", "snapshots/bbb"):
        (cache / folder).mkdir(parents=True)
    for number, name in enumerate((CONFIG, WEIGHTS)):
        shutil.copy(adapter / name, cache / "blobs" / str(number))
        for snapshot in ("aaa", "bbb"):
            (cache / "snapshots" / snapshot / name).symlink_to(Path("../../blobs", str(number)))
    digest = push(adapter)["digest"]
    assert push(cache / "snapshots" / "aaa")["digest"] == digest
    error = push(cache)["error"]
    assert (error["code"], "2 snapshots" in error["message"]) == ("missing_config", True)
    (cache / "refs" / "main").write_text("bbb")
    assert push(cache)["digest"] == digest
    (cache / "blobs" / "1").unlink()
    error = push(cache)["error"]
    assert error["code"] == "missing_weights"
    assert "the download is incomplete" in error["message"]


def test_a_checkpoint_is_pushed_and_what_lies_beside_it_is_not_opened(
    push: Push, folder: Path, adapter: Path, tmp_path: Path
) -> None:
    for name in ("optimizer.pt", "training_args.bin", "rng_state.pth", "scheduler.pt"):
        torch.save(Payload(tmp_path / "ran"), folder / name)
    (folder / "global_step500").mkdir()
    assert push(folder)["digest"] == push(adapter)["digest"]
    assert not (tmp_path / "ran").exists()


def test_of_many_checkpoints_the_last_is_named(push: Push, folder: Path) -> None:
    for step in (500, 1000, 1500, 90):
        shutil.copytree(folder, folder / f"checkpoint-{step}", ignore=shutil.ignore_patterns("checkpoint-*"))
    (folder / CONFIG).unlink()
    message = push(folder)["error"]["message"]
    assert "(checkpoint-90, checkpoint-500, checkpoint-1000)" in message
    assert message.endswith("checkpoint-1500")


def test_shards_name_the_command_that_joins_them(push: Push, folder: Path, adapter: Path) -> None:
    tensors = list(load_file(folder / WEIGHTS).items())
    for number, part in enumerate((tensors[::2], tensors[1::2]), start=1):
        save_file(dict(part), folder / f"adapter_model-0000{number}-of-00002.safetensors")
    (folder / WEIGHTS).unlink()
    error = push(folder)["error"]
    assert error["code"] == "sharded_weights"
    follow(error["message"], folder)
    assert push(folder)["digest"] == push(adapter)["digest"]


def _pointer_as_bin(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / BIN).write_bytes(LFS)


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
        (_pointer_as_bin, "git_lfs_pointer", "git lfs pull"),
        (_mlx, "unsupported_format", "made by MLX-LM"),
        (_checkpoint, "missing_config", "checkpoint-500"),
        (_whole_model, "missing_config", "serve it as a base"),
        (lambda f: (f / WEIGHTS).rename(f / "model.safetensors"), "missing_weights", "model.safetensors"),
        (lambda f: (f / WEIGHTS).rename(f / "pytorch_model_fsdp_0.distcp"), "sharded_weights", "trainer.save_model"),
        (lambda f: (f / WEIGHTS).rename(f / "pytorch_lora.pt"), "pickle", "pytorch_lora.pt"),
        (lambda f: (f / WEIGHTS).write_bytes(b"GGUF\3\0\0\0" * 9), "unsupported_format", "GGUF"),
        (lambda f: (f / WEIGHTS).write_bytes(b"<!DOCTYPE html><html>404"), "unsupported_format", "web page"),
    ],
    ids=[
        "lfs weights",
        "lfs config",
        "lfs bin",
        "mlx",
        "checkpoint",
        "model",
        "other name",
        "fsdp",
        "pt",
        "gguf",
        "html",
    ],
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
