"""The memory sums against figures that others published, each with the counting that yields it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from trainer.model import loss
from trainer.planner.memory import CHUNK_LOGITS, GB, GIB, OPTIMIZER_STATES, Sharding, TrainingCase, memory_need
from trainer.planner.shapes import KNOWN_SHAPES, PlanError, shape_of_count

SEVEN_B = shape_of_count(7_000_000_000)


def full(shape: Any = SEVEN_B, optimizer_state: str = "bf16", **changes: Any) -> TrainingCase:
    return TrainingCase(shape=shape, method="full", optimizer_state=OPTIMIZER_STATES[optimizer_state], **changes)


@pytest.mark.parametrize(
    ("optimizer_state", "gigabytes"),
    [
        ("bf16-moments", 56),
        ("8bit-moments", 42),
        ("bf16", 84),
        ("bf16-fp32-grads", 98),
        ("zero", 112),
        ("trainer", 112),
    ],
)
def test_a_7b_full_fine_tune_takes_its_bytes_per_parameter(optimizer_state: str, gigabytes: int) -> None:
    assert memory_need(full(optimizer_state=optimizer_state)).state_bytes == gigabytes * GB


def test_8b_at_12_bytes_is_the_known_91_5_gib() -> None:
    """Qwen3-8B has 8.19e9 parameters; 98 GB and 91.5 GiB are the same bytes."""
    need = memory_need(full(KNOWN_SHAPES["qwen3-8b"]))
    assert need.state_bytes / GIB == pytest.approx(91.5, abs=0.05)
    assert need.state_bytes / GB == pytest.approx(98.3, abs=0.05)


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 84), (1, 35), (2, 22.75), (3, 10.5)])
def test_zero_stages_of_7b_on_8_devices(stage: int, gigabytes: float) -> None:
    need = memory_need(full(sharding=Sharding(stage, 8)))
    assert need.state_bytes == pytest.approx(gigabytes * GB, abs=32)  # shares are rounded up


def test_zero_stage_3_holds_gathered_layers_besides() -> None:
    need = memory_need(full(sharding=Sharding(3, 8)))
    assert need.bytes_of("gathered layers") == 2 * 2 * SEVEN_B.linear_parameters // SEVEN_B.layers
    assert "ZeRO stage 3 on 8 devices" in " ".join(need.assumptions)


@pytest.mark.parametrize(("tokens", "checkpointing"), [(2048, True), (4096, True)])
def test_qlora_of_8b_takes_8_to_10_gb(tokens: int, checkpointing: bool) -> None:
    case = TrainingCase(
        shape=KNOWN_SHAPES["llama-3.1-8b"],
        method="qlora",
        tokens=tokens,
        checkpointing=checkpointing,
        runtime_bytes=GIB,
    )
    assert 8 * GB <= memory_need(case).total <= 10 * GB


def test_the_loss_is_chunked_as_the_trainer_chunks_it() -> None:
    assert CHUNK_LOGITS == loss.CHUNK_LOGITS
    assert TrainingCase(shape=KNOWN_SHAPES["llama-3.1-8b"]).loss_rows == loss.CHUNK_LOGITS // 128256
    assert TrainingCase(shape=SEVEN_B, logits_rows=4096, tokens=100).loss_rows == 100


def test_methods_order_as_they_must() -> None:
    totals = [
        memory_need(TrainingCase(shape=SEVEN_B, method=method, checkpointing=True)).total
        for method in ("qlora", "lora", "dora", "full")
    ]
    assert totals == sorted(totals)
    assert totals[0] < totals[1] / 2


def test_full_trains_every_parameter_and_freezes_none() -> None:
    need = memory_need(full())
    assert need.bytes_of("frozen weights") == 0
    assert need.bytes_of("trained weights") == 2 * SEVEN_B.parameters


def test_dora_trains_a_magnitude_per_output_besides() -> None:
    lora = TrainingCase(shape=KNOWN_SHAPES["llama-3.1-8b"], targets=("q_proj",))
    assert replace(lora, method="dora").trained_parameters - lora.trained_parameters == 32 * 4096


def test_one_forward_a_step_never_holds_all_gradients_beside_all_activations() -> None:
    several, one = memory_need(full(tokens=512)), memory_need(full(tokens=512, accumulates=False))
    assert several.total == sum(line.num_bytes for line in several.lines)
    assert one.total < several.total
    assert several.total - one.total <= several.bytes_of("activations", "loss")


def test_everything_assumed_is_said() -> None:
    said = " ".join(memory_need(full(runtime_bytes=GIB, accumulates=False)).assumptions)
    for part in ("exactly 7,000,000,000 parameters", "= 12 bytes per trained parameter", "1.0 GiB for CUDA", "SDPA"):
        assert part in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"precision": "int4"}, "got 'int4'"),
    ],
)
def test_impossible_cases_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        memory_need(TrainingCase(shape=SEVEN_B, **changes))


def test_sharding_outside_its_range_is_refused() -> None:
    with pytest.raises(PlanError, match="stage must be 0 to 3, got 4"):
        Sharding(4, 8)
    with pytest.raises(PlanError, match="devices must be at least 1, got 0"):
        Sharding(3, 0)
