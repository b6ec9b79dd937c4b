"""What one step of deciding costs, so that a change that makes it slow is seen. Bounds are several times the usual."""

from __future__ import annotations

import time

from support.adapter_memory import digest_of
from support.scheduler_bench import Bench, make_bench


def fill(bench: Bench, count: int, *, num_prompt: int, max_tokens: int) -> None:
    for _ in range(count):
        bench.add(num_prompt, max_tokens=max_tokens)


def best_step_s(bench: Bench, repeats: int) -> float:
    """Fastest schedule() + commit(); the fastest, because other work shares the machine."""
    best = float("inf")
    for _ in range(repeats):
        start_s = time.perf_counter()
        schedule = bench.scheduler.schedule()
        assert schedule is not None
        bench.scheduler.commit(schedule, dict.fromkeys((row.request.id for row in schedule.rows if row.samples), 7))
        best = min(best, time.perf_counter() - start_s)
    return best


def test_a_step_of_32_decodes_costs_little() -> None:
    bench = make_bench(num_blocks=4096, max_model_len=4096, max_batch_tokens=2048, max_running=32)
    fill(bench, 32, num_prompt=16, max_tokens=1000)
    bench.step()
    assert best_step_s(bench, 200) < 200e-6


def test_a_step_costs_no_more_with_ten_thousand_waiting() -> None:
    bench = make_bench(
        num_blocks=4096, max_model_len=4096, max_batch_tokens=2048, max_running=32, max_waiting=20_000, lookahead=32
    )
    fill(bench, 31, num_prompt=16, max_tokens=1000)
    bench.step()
    for index in range(10_000):
        bench.add(16, adapter=digest_of(f"cold{index}"))
    assert bench.scheduler.num_waiting == 10_000
    assert best_step_s(bench, 200) < 400e-6
