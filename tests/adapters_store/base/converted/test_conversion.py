"""A GGUF file becomes the folder it was made of: the same weights, tokens and chats; transformers is the oracle."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from adapters_store.base import digests
from adapters_store.base.converted import convert, door, shards
from adapters_store.base.converted.door import folder_of
from adapters_store.base.files import describe_base
from adapters_store.base.tokenizer import load_tokenizer
from benchmarks.peers.gguf_files import BF16, Q4_1, write_gguf
from server.demo.assets import BASE_FOLDER

TEXTS = (
    "Hello, world!",
    "in  2024, 3.14",
    "naïve café",
    "мир",
    "你好吗",
    "नमस्ते",
    "🙂🙃",
    "a\n\n\tb   c ",
    "<|end|>x",
    "",
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(door, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(digests, "cache_dir", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def test_weights_tokens_and_chats_are_those_of_the_folder_it_was_made_of(tmp_path: Path) -> None:
    said: list[str] = []
    folder = folder_of(write_gguf(BASE_FOLDER, tmp_path / "demo.Q.gguf"), said.append)
    assert said == [f"{tmp_path / 'demo.Q.gguf'}: BF16 weights, dequantised to bfloat16 in {folder}"]
    ours, original = load_file(folder / "model.safetensors"), load_file(BASE_FOLDER / "model.safetensors")
    assert ours.keys() == original.keys()
    assert all(torch.equal(ours[name], original[name]) for name in original)
    tokenizer, known = load_tokenizer(folder), load_tokenizer(BASE_FOLDER)
    assert [tokenizer.encode(text) for text in TEXTS] == [known.encode(text) for text in TEXTS]
    assert [tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) for text in TEXTS] == list(TEXTS)
    assert tokenizer.chat_template == known.chat_template
    assert describe_base(folder, name="b").modules == describe_base(BASE_FOLDER, name="b").modules


def test_quantised_values_are_those_that_transformers_reads(tmp_path: Path) -> None:
    file = write_gguf(BASE_FOLDER, tmp_path / "demo.gguf", Q4_1, with_head=True)
    folder = folder_of(file)
    oracle = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).state_dict()
    ours = load_file(folder / "model.safetensors")
    assert ours.keys() == oracle.keys()
    assert all(torch.equal(ours[name], oracle[name].to(torch.bfloat16)) for name in oracle)
    assert not json.loads((folder / "config.json").read_text())["tie_word_embeddings"]


def test_large_files_become_shards_that_transformers_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 1 << 20)
    folder = folder_of(write_gguf(BASE_FOLDER, tmp_path / "demo.gguf"))
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    original = load_file(BASE_FOLDER / "model.safetensors")
    read = LlamaForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(read[name], original[name]) for name in original)


def test_a_smollm_vocabulary_cuts_digits_alone_as_llama_cpp_does(tmp_path: Path) -> None:
    """transformers' own reading takes GPT-2's rule, by which the second of two blanks stays with the digit."""
    folder = folder_of(write_gguf(BASE_FOLDER, tmp_path / "demo.gguf", more={"tokenizer.ggml.pre": "smollm"}))
    pieces = AutoTokenizer.from_pretrained(folder).backend_tokenizer.pre_tokenizer.pre_tokenize_str("in  2024")
    assert [piece for piece, _ in pieces] == ["in", "ĠĠ", "2", "0", "2", "4"]


def test_a_folder_is_made_once_and_again_only_if_its_weights_changed(tmp_path: Path) -> None:
    file = write_gguf(BASE_FOLDER, tmp_path / "demo.gguf")
    said: list[str] = []
    folder = folder_of(file, said.append)
    moved = file.rename(tmp_path / "moved.gguf")
    assert folder_of(shutil.copy(moved, file), said.append) == folder
    assert len(said) == 1
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-2] + b"\0\1")
    folder_of(file, said.append)
    assert len(said) == 2
    assert load_file(weights)["model.norm.weight"].equal(
        load_file(BASE_FOLDER / "model.safetensors")["model.norm.weight"]
    )


def test_a_killed_conversion_leaves_no_folder_and_is_cleared_away(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(BASE_FOLDER, tmp_path / "demo.gguf")
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(convert, "_write_weights", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        folder_of(file)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (left,) = (path.name for path in (cache / "bases").iterdir() if path.is_dir())
    assert left.startswith(".converting-")
    folder = folder_of(file)
    assert [path for path in (cache / "bases").iterdir() if path.is_dir()] == [folder]


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(BASE_FOLDER, tmp_path / "demo.gguf")
    monkeypatch.setattr(door.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(door.UnsupportedBase, match=r"pip install 'multilora\[gguf\]'"):
        folder_of(file)


def test_a_disk_without_room_is_told_before_anything_is_written(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(BASE_FOLDER, tmp_path / "demo.gguf", BF16)
    monkeypatch.setattr(door, "_SPARE_BYTES", 1 << 60)
    with pytest.raises(door.UnsupportedBase, match="MiB left; free some"):
        folder_of(file)
    assert [path for path in (cache / "bases").iterdir() if path.is_dir()] == []
