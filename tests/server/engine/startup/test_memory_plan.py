"""How memory is divided, and that a refusal names the numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adapters_store.base.families import UnsupportedBase
from server.engine.model.base_model import BaseModel, load_base
from server.engine.startup import memory_plan
from server.engine.startup.memory_plan import GIB, Reserved, divided, plan_memory
from server.engine.startup.settings import MIB, MemoryBudget


@pytest.fixture(scope="module")
def model(base: Path) -> BaseModel:
    return load_base(base, dtype="float32")


def test_a_gpu_is_filled_except_for_the_step_the_graphs_and_a_little_slack() -> None:
    reserved = Reserved(step_bytes=2 * GIB, graph_bytes=GIB)
    pool, spare = divided(60 * GIB, MemoryBudget(), reserved, on_gpu=True)
    assert pool == pytest.approx(54 / 8 * GIB, rel=0.01)
    assert pool + spare + reserved.total == pytest.approx(57 * GIB, rel=0.001)


def test_adapters_take_at_most_eight_gib_unless_asked() -> None:
    assert divided(600 * GIB, MemoryBudget(), Reserved(), on_gpu=True)[0] == 8 * GIB
    assert divided(60 * GIB, MemoryBudget(adapter_pool=20 * GIB), Reserved(), on_gpu=True)[0] == 20 * GIB


def test_a_cpu_keeps_most_of_its_memory() -> None:
    assert divided(16 * GIB, MemoryBudget(), Reserved(), on_gpu=False) == (GIB, 4 * GIB)


def test_a_budget_that_is_set_is_kept(model: BaseModel) -> None:
    budget = MemoryBudget(kv_cache=8 * MIB, adapter_pool=MIB, host_cache=3 * MIB)
    plan = plan_memory(model, budget, block_size=16, max_tokens_useful=1 << 20)
    assert (plan.adapter_pool_bytes, plan.host_cache_bytes) == (MIB, 3 * MIB)
    assert 0 <= 8 * MIB - plan.kv_bytes < MIB


def test_no_more_blocks_than_can_ever_be_used(model: BaseModel) -> None:
    assert plan_memory(model, MemoryBudget(), block_size=16, max_tokens_useful=100).num_blocks == 7


def test_the_table_names_every_part_that_takes_something(model: BaseModel) -> None:
    reserved = Reserved(step_bytes=700 * MIB, graph_bytes=90 * MIB)
    budget = MemoryBudget(kv_cache=8 * MIB, adapter_pool=MIB, host_cache=3 * MIB)
    options = {"block_size": 16, "max_tokens_useful": 1 << 20}
    rows = dict(plan_memory(model, budget, reserved=reserved, **options).rows())
    assert rows["the largest step (measured)"] == "700 MiB"
    assert rows["CUDA graphs (at most)"] == "90 MiB"
    assert "tokens in blocks of 16" in rows["KV cache"]
    assert "CUDA graphs (at most)" not in dict(plan_memory(model, budget, **options).rows())


def test_a_base_that_leaves_no_room_is_refused_with_the_numbers(
    model: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_plan, "free_device_bytes", lambda device: 2 * GIB)
    monkeypatch.setattr(memory_plan, "bytes_per_block", lambda base, block_size: GIB)
    reserved = Reserved(step_bytes=700 * MIB, graph_bytes=90 * MIB)
    expected = (
        "one block takes 1,024 MiB, 512 MiB are left of 2,048 MiB free on cpu beside the base: 256 MiB are for "
        "adapters, 700 MiB for the largest step, 90 MiB for CUDA graphs"
    )
    with pytest.raises(UnsupportedBase, match=expected):
        plan_memory(model, MemoryBudget(), block_size=16, max_tokens_useful=4096, reserved=reserved)


def test_free_memory_of_the_host_is_known() -> None:
    assert memory_plan.free_device_bytes(torch.device("cpu")) > 64 * MIB
