"""Operations, time and cost against the rules they come from."""

from __future__ import annotations

from dataclasses import replace

import pytest

from trainer.planner.gpus import GPUS, gpu_of
from trainer.planner.hardware import options
from trainer.planner.memory import OPTIMIZER_STATES, Sharding, TrainingCase
from trainer.planner.shapes import KNOWN_SHAPES, PlanError, shape_of_count
from trainer.planner.timing import flops_per_token, link_bytes_per_forward, run_time

SHAPE = KNOWN_SHAPES["llama-3.1-8b"]
FULL = TrainingCase(shape=SHAPE, method="full", optimizer_state=OPTIMIZER_STATES["bf16"])
LORA = TrainingCase(shape=SHAPE)


def test_full_is_6_operations_a_weight_and_lora_4() -> None:
    weights = SHAPE.multiplied_parameters
    assert flops_per_token(FULL, 1) == pytest.approx(6 * weights, rel=1e-3)
    assert flops_per_token(LORA, 1) == pytest.approx(4 * weights + 6 * LORA.trained_parameters, rel=1e-3)


def test_checkpointing_adds_a_forward_and_length_adds_attention() -> None:
    again = flops_per_token(replace(FULL, checkpointing=True), 1) / flops_per_token(FULL, 1)
    assert again == pytest.approx(8 / 6, rel=1e-3)
    grown = flops_per_token(FULL, 8192) - flops_per_token(FULL, 1)
    assert grown == 6 * 32 * 4096 * 8191


def test_time_and_cost_follow_from_the_stated_share_of_the_peak() -> None:
    gpu = gpu_of("h100", usd_per_hour=2.0)
    time = run_time(FULL, gpu, train_tokens=10**9, sequence_length=2048, utilisation=0.5)
    assert time.hours == pytest.approx(10**9 * flops_per_token(FULL, 2048) / (0.5 * 989e12) / 3600)
    assert time.usd == pytest.approx(2.0 * time.hours)
    assert time.bound == "compute"
    assert "50% of 989 TFLOP/s" in time.assumptions[0]


def test_zero_3_sends_three_times_the_weights() -> None:
    """Two gathers and a scatter of gradients, each passed on by all but one: arXiv 1910.02054, section 7."""
    case = replace(FULL, sharding=Sharding(3, 8))
    assert link_bytes_per_forward(case) == pytest.approx(3 * 2 * SHAPE.parameters * 7 / 8)
    assert link_bytes_per_forward(FULL) == 0


def test_a_slow_link_sets_the_pace() -> None:
    case = replace(FULL, sharding=Sharding(3, 8), tokens=512)
    slow = replace(GPUS["h100"], link_bytes_per_s=1e9)
    assert run_time(case, slow, train_tokens=10**6, sequence_length=512).bound == "link"


def test_options_fit_and_come_cheapest_first() -> None:
    found = options(FULL, train_tokens=10**8, sequence_length=2048)
    assert found
    costs = [option.time.usd for option in found]
    assert costs == sorted(costs)
    for option in found:
        assert option.need.total <= option.gpu.memory_bytes
        assert option.devices == option.case.sharding.devices
    assert not [option for option in found if option.gpu.name == "l4" and option.devices < 8]


def test_dora_is_offered_on_one_device_alone() -> None:
    found = options(replace(LORA, method="dora"), train_tokens=10**6, sequence_length=512)
    assert {option.devices for option in found} == {1}


def test_nothing_is_offered_where_nothing_fits() -> None:
    huge = replace(FULL, shape=KNOWN_SHAPES["llama-3.1-405b"])
    assert options(huge, train_tokens=10**6, sequence_length=2048, gpus=[GPUS["l4"]]) == []


def test_recomputation_is_taken_only_where_it_is_needed() -> None:
    small = TrainingCase(shape=shape_of_count(1_000_000_000), tokens=1024)
    assert not options(small, train_tokens=10**6, sequence_length=512, gpus=[GPUS["h100"]])[0].case.checkpointing
    long = TrainingCase(shape=SHAPE, tokens=16384)
    assert options(long, train_tokens=10**6, sequence_length=16384, gpus=[GPUS["h100"]])[0].case.checkpointing


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(PlanError, match=r"gpu must be one of l4, .* got 'tpu'"):
        gpu_of("tpu")
