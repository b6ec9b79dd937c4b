"""The planner counts parameters as transformers does, for every family that is served."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from support.models.models import FAMILY_CONFIGS, FAMILY_NAMES, config_of
from trainer.planner.shapes import KNOWN_SHAPES, PlanError, bytes_of, shape_named, shape_of_config, shape_of_count


@pytest.mark.parametrize("family", [*FAMILY_NAMES, "gemma", "granite"])
def test_parameters_and_adapters_of_each_family_are_counted_exactly(family: str, tmp_path: Path) -> None:
    config = config_of(family)
    config.save_pretrained(tmp_path)
    shape = shape_of_config(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
        peft_model = get_peft_model(model, LoraConfig(r=5, target_modules="all-linear"))
    adapter = sum(parameter.numel() for name, parameter in peft_model.named_parameters() if "lora_" in name)
    assert shape.adapter_parameters(5) == adapter


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3"])
def test_biases_of_the_attention_are_counted_where_a_family_has_them(family: str, tmp_path: Path) -> None:
    config = config_of(family)
    config.attention_bias = True
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shape_of_config(tmp_path).parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "kind", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "phi3"]
)
def test_what_a_config_leaves_out_is_what_transformers_takes(kind: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 640, "num_hidden_layers": 3, "intermediate_size": 96}
    if kind != "gemma3_text":  # whose published configs leave out these, too
        sizes |= {"num_attention_heads": 4, "vocab_size": 33_000}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **sizes}))
    shape = shape_of_config(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (shape.heads, shape.vocab) == (model.config.num_attention_heads, model.config.vocab_size)


def test_a_shape_is_read_without_transformers(tmp_path: Path) -> None:
    FAMILY_CONFIGS["llama"]().save_pretrained(tmp_path)
    code = f"from trainer.planner.shapes import shape_named; shape_named({str(tmp_path)!r}); import sys"
    code += "; assert not {'transformers', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-2-7b", 6_738_415_616),
        ("mistral-7b", 7_241_732_096),
        ("llama-3.1-8b", 8_030_261_248),
        ("qwen3-8b", 8_190_735_360),
        ("llama-2-13b", 13_015_864_320),
        ("llama-3.1-70b", 70_553_706_496),
    ],
)
def test_known_models_have_the_parameters_they_are_published_with(name: str, published: int) -> None:
    assert KNOWN_SHAPES[name].parameters == published


@pytest.mark.parametrize("count", [150_000_000, 500_000_000, 7_000_000_000, 13_000_000_000, 33_000_000_000])
def test_a_bare_count_is_kept_and_its_shape_is_said(count: int) -> None:
    shape = shape_of_count(count)
    assert shape.parameters == count
    assert shape.weight_bytes("bfloat16") == 2 * count
    assert len(shape.assumptions) == 1
    assert f"{count:,}" in shape.assumptions[0]
    counted = shape.layers * sum(rows * columns for rows, columns in shape.linears.values())
    assert counted == pytest.approx(shape.linear_parameters, rel=0.1)


def test_a_count_too_small_to_scale_is_refused() -> None:
    with pytest.raises(PlanError, match="at least 100M, got 5"):
        shape_of_count(5)


def test_adapter_ranks_follow_targets_and_patterns() -> None:
    shape = KNOWN_SHAPES["llama-3.1-8b"]
    assert shape.adapter_parameters(16) == 41_943_040  # what PEFT prints for r 16 on every linear layer
    only_queries = 32 * 8 * (4096 + 4096)
    assert shape.adapter_parameters(8, ["q_proj"]) == only_queries
    assert shape.adapter_parameters(8, ["q_proj"], {"q_proj": 4}) == only_queries // 2
    with pytest.raises(PlanError, match="'qkv' is none of q_proj"):
        shape.adapter_parameters(8, ["qkv"])


def test_keys_and_values_are_counted_by_their_heads() -> None:
    assert KNOWN_SHAPES["llama-3.1-8b"].kv_bytes(1) == 131_072
    assert KNOWN_SHAPES["llama-2-13b"].kv_bytes(1) == 819_200


def test_what_cannot_be_read_is_refused_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"no config\.json there"):
        shape_of_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(PlanError, match="model_type 'gpt2' is not counted"):
        shape_of_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(PlanError, match=r"config\.json"):
        shape_of_config(tmp_path)
    with pytest.raises(PlanError, match="got 'int8'"):
        bytes_of("int8")


def test_a_model_is_named_by_folder_name_or_count(tmp_path: Path) -> None:
    FAMILY_CONFIGS["llama"]().save_pretrained(tmp_path)
    assert shape_named(str(tmp_path)) == shape_named(str(tmp_path / "config.json"))
    assert shape_named("Llama-3.1-8B") is KNOWN_SHAPES["llama-3.1-8b"]
    assert shape_named("8.03B").parameters == 8_030_000_000
    assert shape_named("350m").parameters == 350_000_000
    with pytest.raises(PlanError, match="'gpt-9' is no folder, no count such as 7B or 350M, and none of smollm2-135m"):
        shape_named("gpt-9")
    with pytest.raises(PlanError, match="'~no-such-user/base' is no folder"):
        shape_named("~no-such-user/base")
