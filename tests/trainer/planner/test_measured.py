"""The planned bytes against the bytes that tensors of our own training steps really hold at their peak."""

from __future__ import annotations

import os
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from support.models.models import save_base
from trainer.data.packing import pack
from trainer.data.types import EncodedExample
from trainer.model.model import load
from trainer.optim import clip, make_optimizer
from trainer.planner.advice import case_of
from trainer.planner.memory import memory_need
from trainer.spec import AdapterSpec, BatchSpec, OptimSpec, TrainSpec

SHORT = os.environ.get("MULTILORA_SHARDED") != "all"
ALL = list(product(["lora", "full"], ["float32", "bfloat16"], [False, True]))
PAIRS = [  # every value beside every other's
    ("lora", "float32", True),
    ("lora", "bfloat16", False),
    ("full", "float32", False),
    ("full", "bfloat16", True),
]
TOKENS = 512
SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 2048,
}


def peak_of_steps(spec: TrainSpec) -> int:
    """The most bytes that tensors hold over two optimizer steps of two forwards each, as trainer.loop makes them."""
    trainee = load(spec, torch.device("cpu"))
    optimizer = make_optimizer(trainee.trained(), spec.optim)
    ids = np.random.default_rng(0).integers(3, SHAPE["vocab_size"], TOKENS).astype(np.int32)
    batch = pack([EncodedExample(ids, np.ones(TOKENS, np.float32), b"0")])
    resident = sum(weight.numel() * weight.element_size() for weight in trainee.module.parameters())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        for _ in range(2):
            for _ in range(2):
                trainee.loss(batch).backward()
            clip(trainee.trained(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    assert len(changes) > 1000
    return resident + int(np.cumsum([num_bytes for _, num_bytes in sorted(changes, key=itemgetter(0))]).max())


def test_8_bit_moments_take_what_is_planned(tmp_path: Path) -> None:
    shape = {**SHAPE, "num_hidden_layers": 1}
    base = save_base(tmp_path / "base", "llama", **shape)
    spec = TrainSpec(
        base=base,
        data=tmp_path,
        method="full",
        optim=OptimSpec(moments="8bit"),
        batch=BatchSpec(max_sequence_length=TOKENS),
    )
    planned, measured = memory_need(case_of(spec)), peak_of_steps(spec)
    assert planned.total == pytest.approx(measured, rel=0.05)
    assert memory_need(case_of(spec.model_copy(update={"optim": OptimSpec()}))).total > 1.1 * measured


@pytest.mark.parametrize(("method", "precision", "checkpointing"), PAIRS if SHORT else ALL)
def test_the_plan_is_within_a_twentieth_of_what_our_steps_take(
    method: Any, precision: str, checkpointing: bool, tmp_path: Path
) -> None:
    spec = TrainSpec(
        base=save_base(tmp_path / "base", "llama", **SHAPE),
        data=tmp_path,
        method=method,
        precision=precision,
        checkpointing=checkpointing,
        adapter=AdapterSpec(rank=16),
        batch=BatchSpec(max_sequence_length=TOKENS),
    )
    planned, measured = memory_need(case_of(spec)), peak_of_steps(spec)
    print(f"{method} {precision} checkpointing={checkpointing}: {planned.total:,} planned, {measured:,} measured")
    assert planned.total == pytest.approx(measured, rel=0.05)
