"""How many adapters a server holds: the known example, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from trainer.planner.memory import GB
from trainer.planner.serving import ServingCase, adapters_per_server
from trainer.planner.shapes import KNOWN_SHAPES, PlanError, shape_of_count

THIRTEEN_B = ServingCase(
    shape=shape_of_count(13_000_000_000),
    device_bytes=80 * GB,
    reserve_bytes=20 * GB,
    adapter_bytes=25_000_000,
    host_bytes=64 * GB,
)


def test_13b_on_80_gb_with_20_gb_reserved_holds_1360_adapters_of_25_mb() -> None:
    """80 - 26 - 20 = 34 GB."""
    need = adapters_per_server(THIRTEEN_B)
    assert need.adapters_on_device == 1360
    assert need.adapters_in_host == 2560
    assert sum(line.num_bytes for line in need.lines) == 80 * GB


def test_with_nf4_it_holds_2112() -> None:
    """Linear layers at 4.127 bits, embeddings and head as they were: 7.2 instead of 26 GB."""
    need = adapters_per_server(replace(THIRTEEN_B, nf4=True))
    assert need.adapters_on_device == 2112
    assert need.lines[0].num_bytes / GB == pytest.approx(7.19, abs=0.01)


def test_an_adapter_takes_its_own_rank_and_targets() -> None:
    shape = KNOWN_SHAPES["llama-3.1-8b"]
    whole = ServingCase(shape=shape, device_bytes=80 * GB)
    assert whole.one_adapter == 83_886_080
    few = replace(whole, rank=8, targets=("q_proj", "v_proj"))
    assert few.one_adapter == 2 * 32 * 8 * (8192 + 5120)
    assert adapters_per_server(few).adapters_on_device > 10 * adapters_per_server(whole).adapters_on_device


def test_keys_and_values_take_their_part() -> None:
    without = ServingCase(shape=KNOWN_SHAPES["llama-3.1-8b"], device_bytes=24 * GB)
    need = adapters_per_server(replace(without, kv_tokens=32768))
    taken = 32768 * 131_072
    assert need.adapters_on_device == pytest.approx(
        adapters_per_server(without).adapters_on_device - taken / without.one_adapter, abs=1
    )


def test_a_cold_adapter_costs_one_copy() -> None:
    need = adapters_per_server(ServingCase(shape=KNOWN_SHAPES["llama-3.1-8b"], device_bytes=80 * GB))
    assert need.load_s == pytest.approx(83_886_080 / 25e9)
    assert any("25 GB/s" in line for line in need.assumptions)


def test_a_base_that_does_not_fit_is_refused_with_its_cure() -> None:
    case = ServingCase(shape=KNOWN_SHAPES["llama-3.1-70b"], device_bytes=80 * GB)
    with pytest.raises(PlanError, match=r"base 141\.1 GB .* exceed the device's 80\.0 GB; --nf4 brings the base to 39"):
        adapters_per_server(case)
    with pytest.raises(PlanError, match="take a larger device"):
        adapters_per_server(replace(case, nf4=True, device_bytes=24 * GB))
    with pytest.raises(PlanError, match="adapter_bytes must be at least 1, got 0"):
        adapters_per_server(replace(THIRTEEN_B, adapter_bytes=0))
