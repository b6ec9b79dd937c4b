"""`multilora adapter export` through llama.cpp's own converters: the files hold the adapter, and the merged weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from peft import LoraConfig
from safetensors.torch import load_file

from adapters_store.base.converted.door import folder_of
from adapters_store.base.files import describe_base
from benchmarks.peers.gguf_files import write_adapter_gguf
from server.cli.adapters.gguf import convert, find_converter, lora_config
from support.models.models import save_adapter
from trainer.merge import merge


@pytest.fixture(scope="module")
def checkout() -> Path:
    named = os.environ.get("LLAMA_CPP")
    assert named, "LLAMA_CPP must name llama.cpp's sources: `make test-real` gets them"
    return Path(named)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On every kind of layer, scaled as rsLoRA does."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_rslora=True)
    return save_adapter(base, tmp_path_factory.mktemp("adapter") / "law", config, seed=0)


def test_a_gguf_adapter_holds_pefts_tensors_and_its_scale(
    checkout: Path, base: Path, adapter: Path, tmp_path: Path
) -> None:
    path = adapter / "adapter_config.json"
    config = lora_config(json.loads(path.read_text()))
    path.write_text(json.dumps(config))
    out = tmp_path / "law.gguf"
    convert(find_converter("gguf-lora", checkout), adapter, out, "--base", str(base), "--outtype", "f32")
    theirs, expected = GGUFReader(out), GGUFReader(write_adapter_gguf(adapter, base, tmp_path / "expected.gguf"))
    assert theirs.fields["adapter.lora.alpha"].contents() / 4 == pytest.approx(8 / 4**0.5)
    tensors = {tensor.name: tensor.data for tensor in theirs.tensors}
    assert len(tensors) == 2 * 7 * 30
    for tensor in expected.tensors:
        assert np.array_equal(tensors[tensor.name], tensor.data), tensor.name


def test_a_merged_gguf_file_is_read_back_as_the_merged_weights(
    checkout: Path, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MULTILORA_CACHE", str(tmp_path / "cache"))
    merged, out = tmp_path / "merged", tmp_path / "law.gguf"
    merge(base, adapter, merged, description=describe_base(base))
    convert(find_converter("gguf", checkout), merged, out, "--outtype", "auto")
    again = load_file(folder_of(out) / "model.safetensors")
    weights = load_file(merged / "model.safetensors")
    assert [name for name in again if not torch.equal(again[name], weights[name])] == []
