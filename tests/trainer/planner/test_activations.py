"""What a forward is said to keep against what autograd really saves, tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from support.models import FAMILY_CONFIGS
from trainer.planner.activations import LOGIT_COPIES, kept_by_forward
from trainer.planner.shapes import KNOWN_SHAPES, shape_of_config

RANK = 8
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "sliding_window": None,
}


def model_of(family: str, layers: int, method: str, *, mixed: bool) -> Any:
    config = FAMILY_CONFIGS[family]()
    for name, value in {**SIZES, "num_hidden_layers": layers}.items():
        setattr(config, name, value)
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * layers
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    if method == "full":
        return model.train()
    frozen = model.to(torch.bfloat16 if mixed else torch.float32)
    return get_peft_model(frozen, LoraConfig(r=RANK, target_modules="all-linear")).train()


def saved_bytes(model: Any, tokens: int, *, mixed: bool) -> int:
    """Distinct storages that autograd holds after a forward, without the parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(3, 150, (1, tokens), generator=torch.Generator().manual_seed(0))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=mixed),
    ):
        out = model(input_ids=ids, position_ids=torch.arange(tokens)[None], use_cache=False)
    assert out.logits.requires_grad
    return sum(saved.values())


def bytes_per_token_and_layer(family: str, method: str, *, mixed: bool) -> float:
    """Differences in both, so that what belongs to neither falls out."""
    few, more = (model_of(family, layers, method, mixed=mixed) for layers in (2, 3))
    grown = [saved_bytes(more, t, mixed=mixed) - saved_bytes(few, t, mixed=mixed) for t in (64, 128)]
    return (grown[1] - grown[0]) / 64


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_a_layer_keeps_what_autograd_saves(family: str, method: str, mixed: bool, tmp_path: Path) -> None:
    model_of(family, 2, "full", mixed=False).config.save_pretrained(tmp_path)
    shape = shape_of_config(tmp_path)
    kept = kept_by_forward(
        shape,
        1,
        precision="bfloat16" if mixed else "float32",
        trains_base=method == "full",
        targets=() if method == "full" else tuple(shape.linears),
        rank=RANK,
        chunk=1,
    )
    measured = bytes_per_token_and_layer(family, method, mixed=mixed)
    assert kept.layer_bytes == pytest.approx(measured, rel=0.001 if family == "llama" else 0.08)


def test_checkpointing_keeps_inputs_and_one_layer() -> None:
    shape = KNOWN_SHAPES["llama-3.1-8b"]
    kept = kept_by_forward(
        shape, 2048, precision="bfloat16", trains_base=False, targets=tuple(shape.linears), rank=16, chunk=1024
    )
    assert kept.boundary_bytes == 2048 * 4096 * 2
    whole, small = (kept.total(32, checkpointing=flag) for flag in (False, True))
    assert whole - small == 31 * kept.layer_bytes - 32 * kept.boundary_bytes
    assert small < whole / 5


def test_the_loss_holds_a_chunk_of_logits_whatever_the_length() -> None:
    shape = KNOWN_SHAPES["llama-3.1-8b"]
    short, long = (
        kept_by_forward(shape, tokens, precision="bfloat16", trains_base=False, targets=(), rank=1, chunk=512)
        for tokens in (1024, 8192)
    )
    logits = LOGIT_COPIES * 512 * 128256 * 4
    assert short.loss_bytes - 2 * 1024 * 4096 * 4 == logits == long.loss_bytes - 2 * 8192 * 4096 * 4
