from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer.spec import AdapterSpec, SpecError, TrainSpec

# A key that is a list, a date that is none, and more nesting than Python follows.
NO_YAML = ("? [a]\n: 1", "base: 2026-13-01", "base: " + "[" * 5000)
LEAST: dict[str, Any] = {"base": "/b", "data": "/d.jsonl"}


def test_a_spec_survives_its_own_mapping_and_yaml(tmp_path: Path) -> None:
    spec = TrainSpec.from_mapping(
        {
            **LEAST,
            "method": "qlora",
            "adapter": {"rank": 8, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 4}},
            "optim": {"learning_rate": 1e-3, "max_steps": 7},
            "batch": {"tokens": 512, "packing": False},
        }
    )
    assert TrainSpec.from_mapping(spec.to_mapping()) == spec
    (tmp_path / "spec.yaml").write_text(spec.to_yaml())
    assert TrainSpec.from_yaml(tmp_path / "spec.yaml") == spec


def test_defaults_are_those_the_documentation_names() -> None:
    spec = TrainSpec.from_mapping(LEAST)
    assert (spec.adapter.rank, spec.adapter.scaled_alpha, spec.adapter.dropout) == (16, 32.0, 0.0)
    assert (spec.optim.learning_rate, spec.optim.warmup_fraction, spec.optim.max_grad_norm) == (2e-4, 0.03, 1.0)
    assert spec.batch.forward_tokens == spec.batch.max_sequence_length


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"bas": "/b"}, "bas", "unknown_field"),
        ({"adapter": {"r": 4}}, "adapter.r", "unknown_field"),
        ({"adapter": []}, "adapter", "bad_field"),
        ({"adapter": {"rank": 257}}, "adapter.rank", "bad_field"),
        ({"adapter": {"rank": True}}, "adapter.rank", "bad_field"),
        ({"adapter": {"rank": 3, "init": "orthogonal"}}, "adapter.rank", "bad_field"),
        (
            {"adapter": {"rank": 4, "rank_pattern": {"q_proj": 3}, "init": "orthogonal"}},
            "adapter.rank_pattern.q_proj",
            "bad_field",
        ),
        ({"adapter": {"target_modules": "(a+)+$"}}, "adapter.target_modules", "bad_field"),
        ({"adapter": {"target_modules": []}}, "adapter.target_modules", "bad_field"),
        ({"adapter": {"rank_pattern": {"(a+)+$": 4}}}, "adapter.rank_pattern", "bad_field"),
        ({"adapter": {"alpha_pattern": {"q_proj": 0}}}, "adapter.alpha_pattern.q_proj", "bad_field"),
        ({"optim": {"learning_rate": float("nan")}}, "optim.learning_rate", "bad_field"),
        ({"optim": {"learning_rate": "fast"}}, "optim.learning_rate", "bad_field"),
        ({"optim": {"learning_rate": 0}}, "optim.learning_rate", "bad_field"),
        ({"batch": {"max_sequence_length": 64, "micro_tokens": 63}}, "batch.micro_tokens", "bad_field"),
        ({"method": "loro"}, "method", "bad_field"),
        ({"precision": "float16"}, "precision", "bad_field"),
        ({"checkpointing": "yes"}, "checkpointing", "bad_field"),
        ({"seed": -1}, "seed", "bad_field"),
        ({"sharding": "fsdp", "method": "dora"}, "method", "bad_field"),
        ({"sharding": "fsdp", "adapter": {"init": "eva"}}, "adapter.init", "bad_field"),
        ({"tool_dialect": "klingon"}, "tool_dialect", "bad_field"),
        ({"chat_template": " "}, "chat_template", "bad_field"),
        ({"chat_template": "x" * 65537}, "chat_template", "bad_field"),
        ({"chat_template": "x", "method": "full"}, "chat_template", "bad_field"),
        ({"adapter_dtype": "int4"}, "adapter_dtype", "bad_field"),
        ({"adapter_dtype": "int8", "method": "full"}, "adapter_dtype", "bad_field"),
        ({"data": None}, "data", "bad_field"),
        ({"base": 3}, "base", "bad_field"),
    ],
)
def test_a_bad_field_is_named_with_its_value_and_limit(change: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(SpecError) as caught:
        TrainSpec.from_mapping({**LEAST, **change})
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.message.startswith(f"{param}: must be ")


def test_a_missing_field_is_named() -> None:
    with pytest.raises(SpecError, match=r"data: must be given") as caught:
        TrainSpec.from_mapping({"base": "/b"})
    assert caught.value.code == "missing_field"


@pytest.mark.parametrize("text", ["base: [", "just words", "base: a\nbase: b\ndata: d", "\x00", "[1, 2]", *NO_YAML])
def test_a_file_that_is_no_spec_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(SpecError) as caught:
        TrainSpec.from_yaml(tmp_path / "bad.yaml")
    assert caught.value.code == "bad_spec"


def test_yaml_numbers_without_a_point_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("base: b\ndata: d.jsonl\noptim: {learning_rate: 2e-4}\n")
    spec = TrainSpec.from_yaml(tmp_path / "spec.yaml")
    assert spec.optim.learning_rate == 2e-4
    assert spec.data == tmp_path / "d.jsonl"


def test_a_spec_made_in_code_is_checked_as_one_from_a_file() -> None:
    with pytest.raises(SpecError, match=r"adapter\.rank"):
        AdapterSpec(rank=0)


def test_the_folder_of_an_unknown_user_is_a_path_that_does_not_exist() -> None:
    assert not TrainSpec.from_mapping({**LEAST, "base": "~no-such-user/base"}).base.exists()
