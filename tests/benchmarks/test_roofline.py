"""The roofline's counts agree with the tensors they count."""

from __future__ import annotations

import pytest
import torch

from benchmarks.common.time_model import CODE, H200, Cost
from benchmarks.roofline import (
    CONTEXT,
    GPUS,
    MODELS,
    NF4_BITS_PER_WEIGHT,
    Work,
    base_step,
    decode_attention,
    expand,
    linear,
    lora_step,
    main,
    predicted_costs,
    shrink,
)

H100 = GPUS[0]


def test_shrink_and_expand_count_the_tensors_they_touch() -> None:
    rows, adapters, rank, inputs, outs = 5, 3, 16, 96, (80, 33)
    x = torch.empty(rows, inputs, dtype=torch.bfloat16)
    a = torch.empty(adapters, len(outs), rank, inputs, dtype=torch.bfloat16)
    b = torch.empty(adapters, rank, sum(outs), dtype=torch.bfloat16)
    y = torch.empty(rows, sum(outs), dtype=torch.bfloat16)
    h = torch.empty(rows, len(outs), rank)
    shrunk = shrink(inputs, len(outs), rows=rows, adapters=adapters, rank=rank)
    assert shrunk.num_bytes == x.nbytes + a.nbytes + h.nbytes
    assert expand(outs, rows=rows, adapters=adapters, rank=rank).num_bytes == b.nbytes + h.nbytes + 2 * y.nbytes
    assert shrunk.operations == 2 * rows * len(outs) * rank * inputs


def test_no_more_adapters_are_read_than_there_are_rows() -> None:
    shape = MODELS["8b"]
    assert lora_step(shape, rows=8, adapters=64, rank=16) == lora_step(shape, rows=8, adapters=8, rank=16)


def test_weights_of_the_models_are_theirs() -> None:
    assert base_step(MODELS["8b"], rows=1).num_bytes == pytest.approx(2 * 7.5e9, rel=0.02)
    assert base_step(MODELS["70b"], rows=1).num_bytes == pytest.approx(2 * 69.5e9, rel=0.02)


def test_nf4_reads_about_a_quarter() -> None:
    bare, packed = (linear(4096, 4096, rows=1, bits_per_weight=bits) for bits in (16.0, NF4_BITS_PER_WEIGHT))
    assert packed.num_bytes / bare.num_bytes == pytest.approx(0.26, abs=0.01)


def test_the_floor_is_the_slower_of_memory_and_arithmetic() -> None:
    assert Work(3.35e12, 1).floor_s(H100) == pytest.approx(1.0)
    assert Work(1, 989e12).floor_s(H100) == pytest.approx(1.0)


def test_attention_reads_keys_and_values_of_every_cached_token_once() -> None:
    shape = MODELS["8b"]
    cache = 2 * CONTEXT * shape.kv_heads * 128 * 2
    assert decode_attention(shape, rows=4, context=CONTEXT).num_bytes == 4 * (cache + 2 * 4096 * 2)


def test_tables_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--model", "8b"])
    printed = capsys.readouterr().out
    assert "H100" in printed
    assert "Llama-70b" not in printed


@pytest.mark.parametrize(("base", "rank", "launches"), [("bf16", 0, 329), ("bf16", 16, 585), ("nf4", 0, 457)])
def test_a_predicted_step_has_the_launches_of_a_recorded_one(base: str, rank: int, launches: int) -> None:
    """Ten a layer: four products, attention and its join, two sums with norms, rotation with store, SwiGLU."""
    costs = list(predicted_costs(MODELS["8b"], base=base, rows=32, rank=rank))
    assert sum(cost.launches for cost in costs) == launches


def test_a_kernel_is_bound_by_bytes_by_those_in_flight_or_by_instructions() -> None:
    one_gb = 1e9 / H200.bytes_per_s
    assert Cost("shrink r16", 1e9).seconds(H200) == pytest.approx(one_gb + H200.gap_s)
    starved = CODE["expand r16"].in_flight / H200.full_in_flight
    assert Cost("expand r16", 1e9).seconds(H200) == pytest.approx(one_gb / starved + H200.gap_s)
    few, many = (Cost("nf4", 1e9, num_weights=weights).seconds(H200) for weights in (1e9, 1e10))
    assert few == pytest.approx(one_gb + H200.gap_s)
    assert many > 2 * few
