"""adapter_config.json files of public repositories: taken or refused, and with the modules, ranks and scales of PEFT.

The rows: root-level files of causal text models on families that are served, from the first repositories by name that
have one; every row is one file. Only what differs from its PEFT's defaults is kept; layer numbers fit the tiny base.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from adapters_store.base.description import BaseDescription, LinearShape
from adapters_store.base.families import family_of
from adapters_store.format.adapter_folder import plan_folder
from adapters_store.parsing.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from support.models.models import config_of

ALL = ["gate_proj", "v_proj", "o_proj", "k_proj", "down_proj", "up_proj", "q_proj"]
QV, QKVO = ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]
# Fields that each version of PEFT writes beside those of the versions before it.
ERAS: dict[str, dict[str, Any]] = {
    "0.2": {
        "base_model_name_or_path": "x",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
    },
    "0.4": dict.fromkeys(("auto_mapping", "layers_pattern", "layers_to_transform", "modules_to_save", "revision")),
    "0.6": {"alpha_pattern": {}, "rank_pattern": {}},
    "0.9": {
        "layer_replication": None,
        "loftq_config": {},
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "use_dora": False,
        "use_rslora": False,
    },
    "0.14": {"eva_config": None, "exclude_modules": None, "lora_bias": False},
    "0.15": {"corda_config": None, "trainable_token_indices": None},
    "0.17": {"qalora_group_size": 16, "target_parameters": None, "use_qalora": False},
    "0.18": {
        "alora_invocation_tokens": None,
        "arrow_config": None,
        "ensure_weight_tying": False,
        "peft_version": "0.18.1",
    },
    "0.19": {"lora_ga_config": None, "peft_version": "0.19.1", "use_bdlora": None},
    "0.20": {"monteclora_config": None, "peft_version": "0.20.0", "velora_config": None},
    "0.21": {"kasa_config": None, "peft_version": "0.21.1"},
}


class Row(NamedTuple):
    family: str
    peft: str
    r: int
    alpha: int
    targets: list[str]
    dropout: float = 0.05
    more: dict[str, Any] = {}  # noqa: RUF012  never written


def _unsloth(name: str) -> dict[str, Any]:
    return {"auto_mapping": {"base_model_class": name, "parent_library": "transformers.models", "unsloth_fixed": True}}


ROWS = [
    Row("llama", "0.6", 8, 16, QV),
    Row("llama", "0.21", 16, 32, QV),
    Row("llama", "0.19", 16, 32, ALL),
    Row("llama", "0.17", 4, 8, QKVO),
    Row("qwen2", "0.18", 16, 32, ALL),
    Row("llama", "0.15", 8, 32, QV),
    Row("llama", "0.9", 32, 32, ALL, 0, {"modules_to_save": ["lm_head", "embed_tokens"]}),
    Row("qwen2", "0.19", 16, 32, ALL),
    Row("llama", "0.4", 64, 16, QV, 0.1),
    Row("gemma2", "0.18", 16, 32, ALL, 0.05, {"layers_to_transform": [1, 2]}),
    Row("llama", "0.18", 16, 16, ALL, 0, _unsloth("LlamaForCausalLM")),
    Row("llama", "0.9", 64, 32, ALL, 0),
    Row("qwen2", "0.20", 16, 32, ALL),
    Row("llama", "0.17", 64, 128, ALL),
    Row("mistral", "0.4", 16, 16, QKVO),
    Row("qwen2", "0.18", 8, 16, QKVO),
    Row("llama", "0.9", 16, 16, ALL, 0, {"revision": "unsloth"}),
    Row("llama", "0.9", 16, 16, ALL, 0),
    Row("llama", "0.14", 16, 16, ALL + ALL[::-1], 0),
    Row("llama", "0.9", 16, 16, ["o_proj", "v_proj", "q_proj"], 0.01),
    Row("qwen3", "0.15", 32, 64, ["q_proj", "k_proj", "v_proj"]),
    Row("qwen2", "0.17", 8, 16, ALL, 0.0),
    Row("llama", "0.17", 8, 16, QV),
    Row("qwen2", "0.14", 64, 64, ALL, 0),
    Row("gemma2", "0.14", 64, 8, ALL, 0),
    Row("qwen3", "0.18", 64, 128, ALL),
    Row("llama", "0.2", 8, 16, QV),
    Row("llama", "0.4", 2, 32, [f"model.layers.2.self_attn.{name}" for name in QKVO] + ["model.layers.2.mlp.up_proj"]),
    Row("llama", "0.4", 32, 16, QV, 0.1),
    Row("qwen2", "0.19", 16, 32, ALL, 0.05, _unsloth("Qwen2ForCausalLM")),
    Row("phi", "0.4", 16, 16, ["fc1", "fc2", "Wqkv", "out_proj"]),
    Row("phi", "0.18", 16, 32, QV),
]


def body_of(row: Row) -> dict[str, Any]:
    body: dict[str, Any] = {}
    for version, fields in ERAS.items():
        body |= fields
        if version == row.peft:
            break
    body |= {"r": row.r, "lora_alpha": row.alpha, "lora_dropout": row.dropout, "target_modules": row.targets}
    return body | row.more


@cache
def described(family: str) -> BaseDescription:
    model = model_of(family)
    groups = tuple(family_of(type(model).__name__).groups(model.config.num_hidden_layers))
    linears = {name: model.get_submodule(name) for group in groups for name in group}
    shapes = {name: LinearShape(layer.in_features, layer.out_features) for name, layer in linears.items()}  # type: ignore[arg-type]
    return BaseDescription("sha256:0", family, type(model).__name__, "float32", shapes, groups)


def model_of(family: str) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config_of(family))
    return model


def test_32_configs_of_the_field_mean_what_they_mean_to_peft(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for index, row in enumerate(ROWS):
        folder = tmp_path / str(index)
        folder.mkdir()
        body = body_of(row)
        with torch.device("meta"):
            theirs = get_peft_model(model_of(row.family), LoraConfig(**body))
        tensors = get_peft_model_state_dict(theirs, save_embedding_layers=False)
        save_file({name: torch.zeros(t.shape) for name, t in tensors.items()}, folder / WEIGHTS_FILE)
        (folder / CONFIG_FILE).write_text(json.dumps(body))
        plan = plan_folder(folder, described(row.family))
        layers = {
            name.removeprefix("base_model.model."): m for name, m in theirs.named_modules() if isinstance(m, LoraLayer)
        }
        with subtests.test(index=index):
            assert {m.name: (m.rank, m.scale) for m in plan.modules} == {
                name: (layer.r["default"], layer.scaling["default"]) for name, layer in layers.items()
            }
            saved = {name for name, module in theirs.named_modules() if isinstance(module, ModulesToSaveWrapper)}
            assert {f"base_model.model.{layer.name}" for layer in plan.token_layers} == saved
