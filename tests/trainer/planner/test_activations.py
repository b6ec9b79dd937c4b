"""What a forward is said to keep against what autograd really saves, tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from support.models.models import save_base
from trainer.model.model import Trainee, load
from trainer.planner.activations import LOGIT_COPIES, kept_by_forward
from trainer.planner.shapes import KNOWN_SHAPES, shape_of_config
from trainer.spec import AdapterSpec, TrainSpec

RANK = 8
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "sliding_window": None,
}


def trainee_of(folder: Path, family: str, layers: int, method: str, precision: str) -> Trainee:
    kinds = {"layer_types": ["full_attention"] * layers} if family == "qwen3" else {}
    base = save_base(folder / f"{family}-{layers}", family, num_hidden_layers=layers, **kinds, **SIZES)
    adapter = AdapterSpec(rank=RANK)
    return load(
        TrainSpec(base=base, data=base, method=method, precision=precision, adapter=adapter), torch.device("cpu")
    )


def saved_bytes(trainee: Trainee, tokens: int) -> int:
    """Distinct storages that autograd holds after a forward, without the parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in trainee.module.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(3, 150, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = trainee.logits(ids, torch.arange(tokens)[None])
    assert logits.requires_grad
    return sum(saved.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_a_layer_keeps_what_autograd_saves(family: str, method: Any, precision: str, tmp_path: Path) -> None:
    """Differences in layers and in tokens, so that what belongs to neither falls out."""
    few, more = (trainee_of(tmp_path, family, layers, method, precision) for layers in (2, 3))
    grown = [saved_bytes(more, tokens) - saved_bytes(few, tokens) for tokens in (64, 128)]
    shape = shape_of_config(tmp_path / f"{family}-2")
    kept = kept_by_forward(
        shape,
        1,
        precision=precision,
        trains_base=method == "full",
        targets=() if method == "full" else tuple(shape.linears),
        rank=RANK,
        chunk=1,
    )
    assert kept.layer_bytes == pytest.approx((grown[1] - grown[0]) / 64, rel=0.001 if family == "llama" else 0.08)


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
    assert short.loss_bytes - 3 * 1024 * 4096 * 4 == logits == long.loss_bytes - 3 * 8192 * 4096 * 4
