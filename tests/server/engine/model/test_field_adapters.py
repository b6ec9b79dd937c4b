"""adapter_config.json files in the shapes that people's repositories hold, on adapters that PEFT made: served with
PEFT's logits, or refused with a code that fits. The shapes: PEFT 0.2 to tomorrow's, Unsloth, Axolotl, Together."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adapters_store.errors import AdapterRejected
from adapters_store.format.config import parse_config
from adapters_store.format.limits import AdapterLimits
from server.engine.model.base_model import BaseModel, load_base
from support.models.models import VOCAB, peft_model, save_base
from support.models.packed_forward import PackedForward, pack_folder

Body = dict[str, Any]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QV = ["q_proj", "v_proj"]
PEFT_0_2 = (
    "base_model_name_or_path bias fan_in_fan_out inference_mode lora_alpha lora_dropout modules_to_save peft_type r"
)
PEFT_0_2 += " target_modules task_type"
_PARTS = "self_attn|attention|attn|mlp|feed_forward|ffn|dense"
UNSLOTHS_REGEX = (
    rf"(?:.*?(?:language|text).*?(?:{_PARTS}).*?(?:{'|'.join(ALL)}).*?)"
    rf"|(?:\bmodel\.layers\.[\d]{{1,}}\.(?:{_PARTS})\.(?:(?:{'|'.join(ALL)})))"
)
PROMPTS = [[5, 9, 30, 41, 7], [77, 3, 120, 64, 64, 8, 19, 33, 90, 150, 11]]


@dataclass(frozen=True)
class Shape:
    """peft: what LoraConfig is given. edit: the saved config as the other program wrote it. weights: likewise."""

    peft: Mapping[str, Any]
    edit: Callable[[Body], Body] = lambda body: body
    weights: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = lambda tensors: tensors
    family: str = "llama"
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def _only(names: str, **more: Any) -> Callable[[Body], Body]:
    return lambda body: {name: body[name] for name in names.split()} | more


def _with(**more: Any) -> Callable[[Body], Body]:
    return lambda body: body | more


SHAPES: dict[str, Shape] = {
    "PEFT 0.2": Shape({"target_modules": QV, "r": 8}, _only(PEFT_0_2, enable_lora=None, merge_weights=False)),
    "PEFT 0.3, no task": Shape({"target_modules": QV}, _only(PEFT_0_2, task_type=None, init_lora_weights=True)),
    "keys backwards": Shape({"target_modules": ALL}, lambda body: dict(reversed(body.items()))),
    "a neutral field of tomorrow": Shape({"target_modules": QV}, _with(use_quantum=False, quantum_config=None)),
    "Unsloth": Shape(
        {"target_modules": ALL, "r": 16, "lora_dropout": 0},
        _with(
            auto_mapping={"base_model_class": "LlamaForCausalLM", "parent_library": "x", "unsloth_fixed": True},
            revision="unsloth",
        ),
    ),
    "Axolotl": Shape({"target_modules": ALL}, _with(fan_in_fan_out=None)),
    "fan_in_fan_out, which PEFT turns off on a linear layer": Shape({"target_modules": QV}, _with(fan_in_fan_out=True)),
    "Together": Shape({"target_modules": "all-linear"}, _with(exclude_modules=[])),
    "a name twice": Shape({"target_modules": QV}, _with(target_modules=["q_proj", "v_proj", "q_proj"])),
    "whole paths": Shape({"target_modules": ["model.layers.1.mlp.up_proj", "model.layers.2.self_attn.q_proj"]}),
    "ends of paths": Shape({"target_modules": ["self_attn.q_proj", "mlp.down_proj"]}),
    "names of several families": Shape({"target_modules": ["q_proj", "v_proj", "query_key_value", "c_attn"]}),
    "Llama's names on Phi-3": Shape({"target_modules": ["k_proj", "v_proj", "q_proj", "o_proj"]}, family="phi3"),
    "Phi-3's own names": Shape({"target_modules": ["qkv_proj", "gate_up_proj", "q_proj"]}, family="phi3"),
    "a target excluded whole": Shape(
        {"target_modules": ALL, "exclude_modules": ["model.layers.0.mlp.up_proj", "k_proj"]}
    ),
    "a target excluded layer by layer": Shape(
        {"target_modules": ["q_proj", "o_proj"], "exclude_modules": [f"layers.{i}.self_attn.o_proj" for i in range(3)]}
    ),
    "Unsloth's regular expression": Shape({"target_modules": UNSLOTHS_REGEX}),
    "one that looks ahead, by ms-swift": Shape(
        {"target_modules": r"^(model(?!.*(lm_head|output|emb|wte|shared)).*\.(q_proj|down_proj))$"}
    ),
    "excluded by a regular expression": Shape(
        {"target_modules": [*ALL, "lm_head"], "exclude_modules": r".*(k_proj|lm_head|layers\.1\..*)"}
    ),
    "a regular expression, and init false": Shape(
        {"target_modules": r".*\.[12]\.self_attn\.[qv]_proj", "init_lora_weights": False}
    ),
    "texts that a person added": Shape(
        {"target_modules": QV}, _with(task="summaries", domain="law", peft_version="0.9")
    ),
    "all-linear with exclusions": Shape({"target_modules": "all-linear", "exclude_modules": ["down_proj", "lm_head"]}),
    "one layer, as a number": Shape({"target_modules": QV, "layers_to_transform": 2}),
    "layers and their pattern": Shape(
        {"target_modules": ["q_proj", "fc1"], "layers_to_transform": [0, 2], "layers_pattern": "layers"}
    ),
    "alpha an eighth of the rank": Shape({"target_modules": QV, "r": 64, "lora_alpha": 8}),
    "alpha 32 times the rank": Shape({"target_modules": ["o_proj"], "r": 1, "lora_alpha": 32}),
    "alpha a fraction": Shape({"target_modules": QV, "r": 3, "lora_alpha": 8.5}),
    "rsLoRA with patterns": Shape(
        {
            "target_modules": ALL,
            "use_rslora": True,
            "rank_pattern": {"k_proj": 2},
            "alpha_pattern": {"1.mlp.up_proj": 3},
        }
    ),
    "the head": Shape({"target_modules": ["q_proj", "lm_head"]}, kwargs={"save_embedding_layers": False}),
    "the head, and the base's weights beside it": Shape(
        {"target_modules": ["q_proj", "lm_head"]}, kwargs={"save_embedding_layers": True}
    ),
    "the same on a tied head": Shape(
        {"target_modules": ["q_proj", "lm_head"]}, family="gemma", kwargs={"save_embedding_layers": True}
    ),
    "LoRA on the embedding, and the base's weights beside it": Shape(
        {"target_modules": ["q_proj", "embed_tokens"]}, kwargs={"save_embedding_layers": True}
    ),
    "no head, and the base's weights": Shape({"target_modules": QV}, kwargs={"save_embedding_layers": True}),
    "gaussian": Shape({"target_modules": [*QV, "W_pack"], "init_lora_weights": "gaussian"}),
    "init false": Shape({"target_modules": [*QV, "W_pack"], "init_lora_weights": False}),
    "orthogonal": Shape({"target_modules": [*QV, "W_pack"], "init_lora_weights": "orthogonal"}),
    "float16 file": Shape({"target_modules": QV}, weights=lambda t: {k: v.half() for k, v in t.items()}),
    "bfloat16 file": Shape({"target_modules": QV}, weights=lambda t: {k: v.bfloat16() for k, v in t.items()}),
}
FAMILIES = sorted({shape.family for shape in SHAPES.values()})


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {family: save_base(root / family, family) for family in FAMILIES}


def make(shape: Shape, base: Path, folder: Path) -> Path:
    """PEFT's adapter, random A and B, its config and weights as the other program would have left them."""
    model = AutoModelForCausalLM.from_pretrained(base, local_files_only=True)
    options = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "task_type": "CAUSAL_LM", **shape.peft}
    adapter = get_peft_model(model, LoraConfig(**options))
    torch.manual_seed(len(str(shape.peft)))
    for name, parameter in adapter.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapter.save_pretrained(folder, **{"save_embedding_layers": False, **shape.kwargs})
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config.write_text(json.dumps(shape.edit(json.loads(config.read_text()))))
    save_file(shape.weights(load_file(weights)), weights)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_every_shape_of_the_field_has_pefts_logits(
    family: str, bases: dict[str, Path], tmp_path: Path, subtests: pytest.Subtests
) -> None:
    shapes = {name: shape for name, shape in SHAPES.items() if shape.family == family}
    folders = [make(shape, bases[family], tmp_path / str(index)) for index, shape in enumerate(shapes.values())]
    forward = PackedForward(load_base(bases[family], dtype="float32"), folders)
    bare = peft_model(bases[family], None)
    for index, (name, folder) in enumerate(zip(shapes, folders, strict=True)):
        oracle = peft_model(bases[family], folder)
        for tokens in PROMPTS:
            [got] = forward.logits([forward.request(0, tokens, index)])
            with torch.inference_mode():
                expected, without = (model(torch.tensor([tokens])).logits[0] for model in (oracle, bare))
            with subtests.test(name):
                assert (got - expected).abs().max() <= 1e-4
                assert (got - without).abs().max() > 1e-2  # the adapter does something


@pytest.fixture(scope="module")
def llama(bases: dict[str, Path]) -> BaseModel:
    return load_base(bases["llama"], dtype="float32")


def refusal(base: BaseModel, folder: Path) -> AdapterRejected:
    with pytest.raises(AdapterRejected) as caught:
        pack_folder(folder, base)
    return caught.value


@pytest.mark.parametrize("target", ["o_proj", "embed_tokens", "model.layers.0.mlp.up_proj"])
def test_a_target_that_the_base_has_and_the_file_lacks_is_refused(
    llama: BaseModel, bases: dict[str, Path], tmp_path: Path, target: str
) -> None:
    folder = make(Shape({"target_modules": QV}, _with(target_modules=[*QV, target])), bases["llama"], tmp_path)
    error = refusal(llama, folder)
    assert (error.code, error.param) == ("unmatched_target", "target_modules")
    assert repr(target) in error.message


def test_tensors_that_a_regular_expression_does_not_match_are_refused(
    llama: BaseModel, bases: dict[str, Path], tmp_path: Path
) -> None:
    """PEFT would leave them out with a warning."""
    regex = r"model\.layers\.[01]\..*q_proj"
    error = refusal(llama, make(Shape({"target_modules": QV}, _with(target_modules=regex)), bases["llama"], tmp_path))
    assert (error.code, error.param) == ("regex_targets", "target_modules")
    assert "does not match model.layers.0.self_attn.v_proj" in error.message


OTHER_METHODS: tuple[PeftConfig, ...] = (
    PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20),
    PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8),
    IA3Config(target_modules=QV, feedforward_modules=[]),
    LoHaConfig(r=8, target_modules=QV),
    VeraConfig(r=256, target_modules=QV),
    AdaLoraConfig(total_step=10, target_modules=QV),
)


@pytest.mark.parametrize("config", OTHER_METHODS, ids=lambda config: type(config).__name__)
def test_another_method_is_called_so(config: PeftConfig, tmp_path: Path) -> None:
    config.save_pretrained(str(tmp_path))
    with pytest.raises(AdapterRejected) as caught:
        parse_config((tmp_path / "adapter_config.json").read_bytes(), AdapterLimits())
    assert (caught.value.code, caught.value.param) == ("unsupported_peft_type", "peft_type")


def test_the_advice_on_a_whole_weight_fits_the_case(llama: BaseModel, bases: dict[str, Path], tmp_path: Path) -> None:
    def trained(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        [name] = [name for name in tensors if name.endswith("embed_tokens.weight")]
        tensors[name][-1, -1] += 1e-3
        return tensors

    shape = Shape({"target_modules": QV}, weights=trained, kwargs={"save_embedding_layers": True})
    changed = refusal(llama, make(shape, bases["llama"], tmp_path / "trained"))
    assert (changed.code, changed.param) == ("unsupported_full_weight", "weights")
    assert "embed_tokens.weight: a whole weight that is not the base's" in changed.message

    rounded = Shape(  # PEFT would answer with the rounded weights
        {"target_modules": ["q_proj", "lm_head"]},
        weights=lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()},
        kwargs={"save_embedding_layers": True},
    )
    narrower = refusal(llama, make(rounded, bases["llama"], tmp_path / "rounded"))
    assert narrower.code == "unsupported_full_weight"
    assert "save_embedding_layers=False" in narrower.message

    model = AutoModelForCausalLM.from_pretrained(bases["llama"], local_files_only=True)
    model.resize_token_embeddings(VOCAB + 8)
    grown = get_peft_model(model, LoraConfig(r=4, target_modules=QV, task_type="CAUSAL_LM"))
    grown.save_pretrained(tmp_path / "grown", save_embedding_layers=True)
    message = refusal(llama, tmp_path / "grown").message
    assert f"[{VOCAB + 8}, 64] and the base's is [{VOCAB}, 64]" in message
    assert "save_embedding_layers" not in message  # which would drop the trained rows
