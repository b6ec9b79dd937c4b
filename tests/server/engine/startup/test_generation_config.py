"""Sampling defaults from generation_config.json, by vLLM's names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapters_store.base.families import UnsupportedBase
from server.engine.startup.generation_config import FILE_NAME, SamplingDefaults, sampling_defaults

QWEN = {
    "bos_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "pad_token_id": 151643,
    "repetition_penalty": 1.05,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "transformers_version": "4.37.0",
}  # Qwen2.5-1.5B-Instruct's own file


def written(folder: Path, config: Any) -> Path:
    (folder / FILE_NAME).write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def test_auto_reads_the_bases_own_file(tmp_path: Path) -> None:
    defaults = sampling_defaults("auto", written(tmp_path, QWEN))
    assert defaults == SamplingDefaults(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05)


@pytest.mark.parametrize("source", ["neutral", "vllm"])
def test_neutral_reads_nothing(tmp_path: Path, source: str) -> None:
    assert sampling_defaults(source, written(tmp_path, "not JSON")).given == {}


def test_auto_without_a_file_changes_nothing(tmp_path: Path) -> None:
    assert sampling_defaults("auto", tmp_path).given == {}


def test_a_folder_is_read_in_the_bases_place(tmp_path: Path) -> None:
    base, own = tmp_path / "base", tmp_path / "own"
    base.mkdir()
    own.mkdir()
    written(base, QWEN)
    written(own, {"min_p": 0.1, "max_new_tokens": 64, "top_k": -1})
    assert sampling_defaults(str(own), base).given == {"min_p": 0.1, "max_tokens": 64, "top_k": 0}
    with pytest.raises(UnsupportedBase, match="the folder has no generation_config"):
        sampling_defaults(str(tmp_path), base)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ([1], "JSON object"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"temperature": 3}, "temperature must be in"),
        ({"temperature": True}, "temperature must be a number"),
        ({"top_k": 1.5}, "top_k must be a number"),
        ({"top_p": [0.5]}, "top_p must be a number"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"repetition_penalty": 0}, "repetition_penalty must be in"),
    ],
)
def test_an_invalid_file_is_refused_at_start(tmp_path: Path, config: Any, words: str) -> None:
    with pytest.raises(UnsupportedBase, match=words) as caught:
        sampling_defaults("auto", written(tmp_path, config))
    assert "--generation-config" in str(caught.value)
