"""Advice for a run that does not fit: every line that is given is true of the plan it names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from support.models.models import save_base
from trainer.planner.advice import advise, case_of
from trainer.planner.memory import GIB, memory_need
from trainer.planner.shapes import KNOWN_SHAPES
from trainer.spec import AdapterSpec, BatchSpec, TrainSpec

EIGHT_B = KNOWN_SHAPES["llama-3.1-8b"]


def spec(**changes: Any) -> TrainSpec:
    return TrainSpec(base=Path("base"), data=Path("data.jsonl"), **{"precision": "bfloat16", **changes})


def test_a_run_that_fits_gets_no_advice() -> None:
    assert advise(spec(), 80 * GIB, shape=EIGHT_B) == []


def test_the_first_line_says_what_is_needed_and_what_takes_it() -> None:
    first = advise(spec(), 24 * GIB, shape=EIGHT_B)[0]
    total = memory_need(case_of(spec(), shape=EIGHT_B)).total
    assert f"needs about {total / GIB:.1f} GiB a device, 24.0 GiB are available" in first
    assert "frozen weights 15.0 GiB" in first
    assert "activations" in first


def test_every_advice_fits_and_is_single() -> None:
    lines = advise(spec(), 24 * GIB, shape=EIGHT_B)[1:]
    assert any(line.startswith("batch.micro_tokens 1024 instead of 2048") for line in lines)
    assert any(line.startswith("checkpointing true") for line in lines)
    for line in lines:
        said = re.search(r"([\d.]+) GiB(?: each)?$", line)
        assert said is not None, line
        assert float(said[1]) <= 24


def test_what_is_advised_is_what_the_changed_spec_needs() -> None:
    changed = memory_need(case_of(spec(checkpointing=True), shape=EIGHT_B)).total
    assert f"{changed / GIB:.1f} GiB" in next(
        line for line in advise(spec(), 24 * GIB, shape=EIGHT_B) if line.startswith("checkpointing")
    )


def test_a_small_device_is_told_qlora_or_all_together() -> None:
    lines = advise(spec(checkpointing=True), 12 * GIB, shape=EIGHT_B)
    assert any(line.startswith("method qlora") for line in lines)
    (line,) = advise(spec(), 8 * GIB, shape=EIGHT_B)[1:]
    assert line.startswith("no single change is enough; qlora, checkpointing and micro_tokens 256 together")


def test_a_full_fine_tune_is_told_of_adapters_and_sharding() -> None:
    lines = advise(spec(method="full", checkpointing=True), 80 * GIB, shape=EIGHT_B)
    assert any(line.startswith("method lora") for line in lines)
    assert any(re.match(r"sharding fsdp on \d devices", line) for line in lines)


def test_a_base_beyond_everything_is_named() -> None:
    lines = advise(spec(), 4 * GIB, shape=KNOWN_SHAPES["llama-3.1-405b"])
    assert lines[1].endswith("a smaller base is needed")


def test_a_spec_on_disk_is_read_with_its_base(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    tiny = TrainSpec(
        base=base,
        data=base,
        adapter=AdapterSpec(rank=4, target_modules=("q_proj", "v_proj"), rank_pattern={"self_attn.v_proj": 2}),
        batch=BatchSpec(max_sequence_length=64, micro_tokens=128),
        sharding="fsdp",
        reshard_after_forward=False,
    )
    case = case_of(tiny, devices=2)
    assert case.trained_parameters == 3 * (4 * (64 + 64) + 2 * (64 + 32))
    assert case.tokens == 128
    assert (case.sharding.stage, case.sharding.devices) == (2, 2)
    assert case_of(tiny).sharding.devices == 1
    assert "MiB" in advise(tiny, 1 << 20)[0]


@pytest.mark.parametrize("method", ["lora", "qlora", "dora", "full"])
def test_every_method_can_be_advised(method: Any) -> None:
    assert len(advise(spec(method=method, precision="float32"), 6 * GIB, shape=EIGHT_B)) >= 2


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "dora"},
        {"method": "lora", "objective": "dpo"},
        {"adapter": {"init": "eva"}},
        {"optim": {"moments": "8bit"}},
        {"eval_samples": 2},
    ],
)
def test_sharding_is_advised_only_to_a_spec_that_takes_it(changes: dict[str, Any]) -> None:
    plain, other = (
        advise(TrainSpec.from_mapping({"base": "b", "data": "d", **fields}), 36 * GIB, shape=EIGHT_B)
        for fields in ({}, changes)
    )
    assert any("sharding fsdp" in line for line in plain)
    assert not any("sharding fsdp" in line for line in other)


def test_a_target_that_is_named_twice_is_counted_once() -> None:
    once, twice = (
        case_of(spec(method="dora", adapter=AdapterSpec(target_modules=targets)), shape=EIGHT_B)
        for targets in (("q_proj",), ("q_proj", "self_attn.q_proj"))
    )
    assert once.trained_parameters == twice.trained_parameters
    assert memory_need(once).total == memory_need(twice).total
