"""Both scripts run from nothing, in short form: a tokenizer, a base that learns, an adapter that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.demo.recipe.make_adapters import make_adapter
from server.demo.recipe.make_base import make_base
from server.demo.recipe.styles import Style


@pytest.fixture(scope="module")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    out = tmp_path_factory.mktemp("base")
    return out, make_base(out, Console(quiet=True), num_documents=240)


def test_the_base_learns_and_loads(small_base: tuple[Path, list[float]]) -> None:
    folder, losses = small_base
    assert losses[0] > 7.0
    assert losses[-1] < losses[0] - 1.0
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == [
        tokenizer.eos_token_id,
        tokenizer.convert_tokens_to_ids("<|end_of_turn|>"),
    ]


def test_the_same_seed_makes_the_same_base(tmp_path: Path, quiet: Console) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    assert make_base(one, quiet, num_documents=16) == make_base(other, quiet, num_documents=16)
    assert (one / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_an_adapter_is_a_plain_peft_folder(
    small_base: tuple[Path, list[float]], tmp_path: Path, quiet: Console
) -> None:
    make_adapter(Style.LAW, small_base[0], tmp_path, quiet, num_dialogues=24)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "multilora-demo-base"
    assert config["r"] == 8
    assert config["target_modules"] == sorted(config["target_modules"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert any("lora_B" in name and tensor.any() for name, tensor in tensors.items())
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small_base[0]), str(tmp_path))
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 4 * 7
