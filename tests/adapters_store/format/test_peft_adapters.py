"""Adapters that PEFT itself saved: accepted, with PEFT's own scales, and with PEFT's own weights in the buffer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from adapters_store.errors import AdapterRejected
from adapters_store.packed.layout import PackedAdapter
from adapters_store.store import AdapterStore
from support.models.adapter_files import HIDDEN, INTERMEDIATE, NUM_LAYERS, tiny_base


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def saved(llama: LlamaForCausalLM, tmp_path: Path) -> Any:
    """saved(**LoraConfig fields) -> (folder, {module: PEFT layer}), with random B."""
    made: list[PeftModel] = []

    def save(**fields: Any) -> tuple[Path, dict[str, LoraLayer]]:
        model = get_peft_model(llama, LoraConfig(**({"task_type": "CAUSAL_LM"} | fields)))
        made.append(model)
        layers = {name: layer for name, layer in model.base_model.model.named_modules() if isinstance(layer, LoraLayer)}
        for layer in layers.values():
            torch.nn.init.normal_(layer.lora_B["default"].weight)
        model.save_pretrained(tmp_path / "peft")
        return tmp_path / "peft", layers

    yield save
    for model in made:
        model.unload()


def publish(store: AdapterStore, folder: Path, dtype: str = "float32", name: str = "law") -> PackedAdapter:
    base = tiny_base(dtype=dtype)
    version = store.publish(
        tenant="acme",
        name=name,
        config=(folder / "adapter_config.json").read_bytes(),
        weights=folder / "adapter_model.safetensors",
        base=base,
    )
    return store.load_packed(version.digest, base)


def test_the_tiny_base_is_the_tiny_llama(llama: LlamaForCausalLM) -> None:
    linears = {
        name: (module.in_features, module.out_features)
        for name, module in llama.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert linears == {name: (shape.in_features, shape.out_features) for name, shape in tiny_base().modules.items()}


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "all linear": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "rslora": {"r": 6, "lora_alpha": 10, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "rank pattern": {
        "r": 4,
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7, "^model.layers.0.self_attn.v_proj": 1},
    },
    "alpha pattern, rslora": {
        "r": 3,
        "use_rslora": True,
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"up_proj": 5},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 5, "up_proj": 7},
    },
    "one layer by its index": {
        "r": 2,
        "target_modules": ["k_proj"],
        "layers_to_transform": 1,
        "layers_pattern": "layers",
    },
    "one module by its full name": {"r": 2, "target_modules": ["model.layers.1.mlp.down_proj"]},
    "some excluded": {"r": 2, "target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.0.self_attn.k_proj"]},
    "gaussian": {"r": 2, "target_modules": ["o_proj"], "init_lora_weights": "gaussian"},
    "orthogonal": {"r": 2, "target_modules": ["o_proj"], "init_lora_weights": "orthogonal"},
    "no task": {"r": 2, "target_modules": ["o_proj"], "task_type": None},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_peft_saved_is_served_with_pefts_scales_and_weights(variant: str, saved: Any, store: AdapterStore) -> None:
    folder, layers = saved(**VARIANTS[variant])
    packed = publish(store, folder)
    assert [module.name for module in packed.modules] == [name for name in tiny_base().modules if name in layers]
    for module in packed.modules:
        layer = layers[module.name]
        assert module.scale == layer.scaling["default"]
        assert module.rank == layer.r["default"]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert torch.equal(packed.buffer[module.a_offset :][: a.numel()].view_as(a), a)
        assert torch.equal(packed.buffer[module.b_offset :][: b.numel()].view(module.rank, -1), b.T)


def test_the_packed_delta_is_pefts_delta(saved: Any, store: AdapterStore) -> None:
    folder, layers = saved(**VARIANTS["alpha pattern, rslora"])
    packed = publish(store, folder)
    for module in packed.modules:
        shape = tiny_base().modules[module.name]
        a = packed.buffer[module.a_offset :][: module.rank * shape.in_features].view(module.rank, -1)
        b = packed.buffer[module.b_offset :][: module.rank * shape.out_features].view(module.rank, -1)
        torch.testing.assert_close(b.T @ a * module.scale, layers[module.name].get_delta_weight("default"))


def test_an_untouched_adapter_with_zero_b_is_accepted(saved: Any, store: AdapterStore) -> None:
    folder, _ = saved(r=4, target_modules=["q_proj"])
    weights = {
        name: t * 0 if "lora_B" in name else t for name, t in load_file(folder / "adapter_model.safetensors").items()
    }
    save_file(weights, folder / "adapter_model.safetensors")
    packed = publish(store, folder)
    for module in packed.modules:
        assert not packed.buffer[module.b_offset :][: module.rank * HIDDEN].any()


def test_a_raw_state_dict_name_means_the_same_adapter(saved: Any, store: AdapterStore) -> None:
    folder, _ = saved(r=4, target_modules=["q_proj"])
    usual = publish(store, folder)
    weights = load_file(folder / "adapter_model.safetensors")
    raw = {name.replace(".weight", ".default.weight"): tensor for name, tensor in weights.items()}
    save_file(raw, folder / "adapter_model.safetensors")
    assert publish(store, folder).digest == usual.digest


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"modules_to_save": ["lm_head"]}, "unsupported_modules_to_save"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "unsupported_full_weight"),
        ({"target_modules": ["q_proj", "lm_head"]}, "unsupported_full_weight"),
        ({"init_lora_weights": "olora"}, "base_altering_init"),
        ({"trainable_token_indices": [1]}, "unsupported_trainable_tokens"),
        ({"rank_pattern": {".*layers.0.*q_proj": 2}}, "regex_pattern"),
        ({"task_type": "FEATURE_EXTRACTION"}, "unsupported_task_type"),
    ],
)
def test_what_peft_saves_and_we_do_not_serve_is_refused(
    fields: dict[str, Any], code: str, store: AdapterStore, tmp_path: Path
) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = get_peft_model(
        LlamaForCausalLM(config), LoraConfig(**({"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | fields))
    )
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterRejected) as caught:
        publish(store, tmp_path)
    assert caught.value.code == code


def test_a_regular_expression_means_the_same_as_the_list(saved: Any, store: AdapterStore) -> None:
    folder, _ = saved(r=4, target_modules=["q_proj"])
    written = publish(store, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    for regex in (".*q_proj", r"(?!.*lm_head).*\.q_proj"):
        (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": regex}))
        assert publish(store, folder).digest == written.digest


def test_a_config_edited_by_hand_to_all_linear_means_the_same(saved: Any, store: AdapterStore) -> None:
    folder, _ = saved(r=4, target_modules="all-linear")
    written = publish(store, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": "all-linear"}))
    assert publish(store, folder).digest == written.digest
