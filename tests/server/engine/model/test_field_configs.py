"""The command that compares found adapter_config.json files with PEFT, on files in the forms that were found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.models.field_configs import DIFFERENT, EQUAL, main, make_toy, outcome

PEFT_0_2: dict[str, Any] = {
    "base_model_name_or_path": "../llama-7b-hf",
    "bias": "none",
    "enable_lora": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "merge_weights": False,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 4,
    "target_modules": ["q_proj", "v_proj", "query_key_value"],
    "task_type": "CAUSAL_LM",
}
NEWER = {name: value for name, value in PEFT_0_2.items() if name not in ("enable_lora", "merge_weights")}
FORMS: dict[str, dict[str, Any]] = {
    "llama/old": PEFT_0_2,
    "llama/one_deep_layer": NEWER | {"r": 2, "target_modules": ["model.layers.5.mlp.up_proj"], "peft_version": "0.5"},
    "llama/trained_embedding": NEWER | {"modules_to_save": ["lm_head", "embed_tokens"], "revision": "unsloth"},
    "llama/with_biases": NEWER | {"bias": "all"},
    "gemma3/upper_layers": NEWER | {"layers_to_transform": [4, 5, 6], "layers_pattern": "layers"},
    "bert/classifier": NEWER | {"target_modules": ["query"], "task_type": "SEQ_CLS"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, body in FORMS.items():
        file = tmp_path / f"{name}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(body))
    return tmp_path


def test_files_are_counted_by_what_becomes_of_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(folder)])
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["bert: 1, not served", "gemma3: {'equal': 1}"]
    assert printed[2] == "llama: {'equal': 3, 'unsupported_bias': 1}"
    assert printed[3].startswith("  with_biases.json: unsupported_bias: bias")
    assert printed[4:] == ["of served families: {'equal': 4, 'unsupported_bias': 1}"]


def test_a_base_that_computes_otherwise_is_different(folder: Path, tmp_path: Path) -> None:
    """The comparison can fail."""
    toy, other = (make_toy(tmp_path / f"{family}-base", family, 0) for family in ("llama", "qwen3"))
    file = folder / "llama" / "old.json"
    assert outcome(file, toy, tmp_path / "same").verdict == EQUAL
    assert outcome(file, replace(toy, served=other.served), tmp_path / "other").verdict == DIFFERENT
