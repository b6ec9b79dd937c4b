"""Deciding costs by what runs, not by what waits: counted in function calls, which no busy machine changes."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from server.engine.request import Request, SamplingParams
from support.worlds.adapter_memory import digest_of
from support.worlds.scheduler_bench import Bench, make_bench


def fill(bench: Bench, count: int) -> None:
    for _ in range(count):
        bench.add(16, max_tokens=1000)


def calls_of_a_step(bench: Bench) -> int:
    """Python and C function calls of one schedule() + commit()."""
    num_calls = 0

    def count(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal num_calls
        num_calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        schedule = bench.scheduler.schedule()
        assert schedule is not None
        bench.scheduler.commit(schedule, dict.fromkeys((row.request.id for row in schedule.rows if row.samples), 7))
    finally:
        sys.setprofile(None)
    return num_calls


def test_a_step_of_decodes_costs_a_few_calls_a_row() -> None:
    bench = make_bench(num_blocks=4096, max_model_len=4096, max_batch_tokens=2048, max_running=32)
    fill(bench, 32)
    bench.step()
    assert min(calls_of_a_step(bench) for _ in range(20)) < 32 * 20


def test_a_step_costs_no_more_with_ten_thousand_waiting_than_with_a_hundred() -> None:
    costs = {}
    for num_waiting in (100, 10_000):
        bench = make_bench(
            num_blocks=4096,
            max_model_len=4096,
            max_batch_tokens=2048,
            max_running=32,
            max_waiting=20_000,
            max_waiting_per_tenant=20_000,
            lookahead=32,
        )
        fill(bench, 31)
        bench.step()
        for index in range(num_waiting):
            bench.add(16, adapter=digest_of(f"cold{index}"))
        assert bench.scheduler.num_waiting == num_waiting
        costs[num_waiting] = min(calls_of_a_step(bench) for _ in range(20))
    assert costs[10_000] <= 1.1 * costs[100]


def test_admitting_costs_no_more_with_two_thousand_tenants_waiting_than_with_twenty() -> None:
    costs = {}
    for num_tenants in (20, 2000):
        bench = make_bench(
            num_blocks=4096, max_model_len=4096, max_batch_tokens=2048, max_running=32, max_waiting=20_000
        )
        fill(bench, 32)
        bench.step()
        for index in range(2000):
            params = SamplingParams(max_tokens=1000)
            bench.scheduler.add(Request(f"w{index}", f"t{index % num_tenants}", list(range(16)), params))
        steps = []
        for _ in range(30):
            bench.scheduler.finish(bench.scheduler.running[0])
            steps.append(calls_of_a_step(bench))
        costs[num_tenants] = sorted(steps)[len(steps) // 2]
    assert costs[2000] <= 1.2 * costs[20], costs
