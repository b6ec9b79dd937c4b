"""Who comes next, between tenants: turns, loads, bounded queues, deadlines. Within a tenant: test_scheduler."""

from __future__ import annotations

import pytest

from adapters_store.tiers.entries import Owner
from server.engine.request import QueueFull, Request, SamplingParams, Status
from support.worlds.adapter_memory import digest_of
from support.worlds.scheduler_bench import Bench, make_bench

A, B, C = digest_of("a"), digest_of("b"), digest_of("c")


def add(bench: Bench, tenant: str, *, num_prompt: int = 4, max_tokens: int = 8, **fields: object) -> Request:
    prompt = [1000 * bench.num_requests + index for index in range(num_prompt)]
    request = Request(f"{tenant}{bench.num_requests}", tenant, prompt, SamplingParams(max_tokens=max_tokens))
    for name, value in fields.items():
        setattr(request, name, value)
    bench.num_requests += 1
    bench.scheduler.add(request)
    return request


def order(bench: Bench, steps: int = 200) -> list[str]:
    """Tenants in the order in which their requests were admitted."""
    seen: dict[str, None] = {}
    for _ in range(steps):
        seen |= dict.fromkeys(request_id for request_id, _ in bench.step())
    return [request_id.rstrip("0123456789") for request_id in seen]


def test_tenants_take_turns_however_many_requests_each_has_sent() -> None:
    bench = make_bench(max_running=1)
    for _ in range(6):
        add(bench, "flood")
    add(bench, "law")
    add(bench, "med")
    assert order(bench)[:4] == ["flood", "law", "med", "flood"]


def test_long_prompts_and_long_answers_cost_turns() -> None:
    bench = make_bench(max_running=1)
    for _ in range(3):
        add(bench, "long", num_prompt=16, max_tokens=16)
    for _ in range(9):
        add(bench, "short", num_prompt=4, max_tokens=4)
    first = order(bench)[:8]
    assert first.count("short") == 6  # 16 + 2 x 16 = 48 against 4 + 2 x 4 = 12


def test_a_dear_token_counts_for_more() -> None:
    bench = make_bench(max_running=1)
    for _ in range(6):
        add(bench, "large_rank", price=3.0)
        add(bench, "small_rank")
    assert order(bench)[:8].count("small_rank") == 6


def test_a_tenants_queue_is_bounded_and_the_others_are_not_refused() -> None:
    bench = make_bench(max_waiting_per_tenant=2)
    add(bench, "flood")
    add(bench, "flood")
    with pytest.raises(QueueFull, match="2 requests of flood wait already"):
        add(bench, "flood")
    add(bench, "law")
    bench.step()
    add(bench, "flood")


def test_a_tenant_with_many_adapters_gets_one_turn_to_load_like_one_with_a_single_adapter() -> None:
    bench = make_bench(lookahead=6)
    for index in range(50):
        add(bench, "cycler", adapter=digest_of(f"c{index}"))
    add(bench, "law", adapter=A)
    add(bench, "med", adapter=B)
    bench.step()
    assert bench.adapters.wanted == [digest_of("c0"), A, B, *(digest_of(f"c{index}") for index in (1, 2, 3))]
    assert bench.adapters.owners[1] == Owner("law")
    bench.adapters.loads = [(Owner("cycler"), 100)]
    bench.step()
    assert bench.adapters.wanted[:3] == [A, B, digest_of("c0")]


def test_an_adapter_of_two_tenants_is_wanted_once_and_for_the_more_urgent() -> None:
    bench = make_bench()
    add(bench, "law", adapter=A)
    add(bench, "med", adapter=A)
    bench.step()
    assert (bench.adapters.wanted, bench.adapters.owners) == ([A], [Owner("law")])


def test_a_crowding_tenant_takes_no_more_of_the_device_but_the_base() -> None:
    bench = make_bench(max_batch_tokens=64)
    bench.adapters.ready_digests |= {A: 0, B: 1}
    bench.adapters.over_share_tenants = {"crowd"}
    held, bare, other = add(bench, "crowd", adapter=A), add(bench, "crowd"), add(bench, "law", adapter=B)
    bench.step()
    assert (held.status, bare.status, other.status) == (Status.WAITING, Status.RUNNING, Status.RUNNING)
    bench.adapters.over_share_tenants = set()
    bench.step()
    assert held.status is Status.RUNNING


def test_one_that_starves_beyond_its_share_holds_back_its_own_tenant_alone() -> None:
    bench = make_bench(max_batch_tokens=64, starvation_s=2.0)
    bench.adapters.ready_digests |= {B: 1, C: 2}
    add(bench, "crowd", adapter=A)
    own, other = add(bench, "crowd", adapter=B), add(bench, "law", adapter=C)
    bench.adapters.no_room_since[A] = bench.clock.now_s - 2.5
    bench.adapters.over_share = {A}
    bench.step()
    assert (own.status, other.status) == (Status.WAITING, Status.RUNNING)


def test_the_tenant_that_runs_most_makes_room_in_the_kv_cache() -> None:
    bench = make_bench(num_blocks=12, max_running=8, max_batch_tokens=64, reserved=0.0)
    flood = [add(bench, "flood", num_prompt=7, max_tokens=30) for _ in range(4)]
    bench.step()
    law = add(bench, "law", num_prompt=4, max_tokens=12)
    for _ in range(14):
        bench.step()
    assert law.num_preemptions == 0
    assert sum(request.num_preemptions for request in flood) > 0
    assert flood[0].num_preemptions == 0


def test_the_last_places_are_kept_for_tenants_that_run_less_than_their_part() -> None:
    bench = make_bench(max_running=8, reserved=0.25)
    first = add(bench, "law", max_tokens=1)
    bench.step()
    flood = [add(bench, "flood", num_prompt=1, max_tokens=100) for _ in range(10)]
    bench.step()
    assert sum(request.status is Status.RUNNING for request in flood) == 6
    late = add(bench, "law")
    bench.step()
    assert (first.status, late.status) == (Status.FINISHED, Status.RUNNING)


def test_a_lone_tenant_has_every_place() -> None:
    bench = make_bench(max_running=8, reserved=0.25)
    for _ in range(10):
        add(bench, "law", num_prompt=1, max_tokens=100)
    bench.step()
    assert bench.scheduler.num_running == 8


def test_what_is_late_is_dropped_before_it_is_computed_and_reported_once() -> None:
    bench = make_bench(max_running=1)
    running = add(bench, "law", max_tokens=50)
    bench.step()
    now_s = bench.clock.now_s
    late, patient = add(bench, "law", deadline_s=now_s + 1.0), add(bench, "law", deadline_s=now_s + 9.0)
    bench.clock.advance(1.0)
    bench.step()
    assert bench.scheduler.take_late() == [late]
    assert bench.scheduler.take_late() == []
    assert (late.status, late.first_scheduled_s) == (Status.FINISHED, None)
    assert (running.status, patient.status) == (Status.RUNNING, Status.WAITING)


def test_a_running_request_ends_at_its_deadline_and_gives_its_blocks_back() -> None:
    bench = make_bench()
    request = add(bench, "law", max_tokens=50, deadline_s=bench.clock.now_s + 1.0)
    bench.step()
    assert bench.pool.num_free < bench.pool.num_blocks
    bench.clock.advance(1.5)
    assert bench.step() == []
    assert bench.scheduler.take_late() == [request]
    assert bench.pool.num_free == bench.pool.num_blocks


def test_one_that_ended_in_time_is_not_late() -> None:
    bench = make_bench()
    add(bench, "law", max_tokens=1, deadline_s=bench.clock.now_s + 1.0)
    bench.step()
    bench.clock.advance(5.0)
    bench.step()
    assert bench.scheduler.take_late() == []


def test_short_prompts_of_another_tenant_go_before_the_rest_of_a_long_one() -> None:
    bench = make_bench(max_batch_tokens=16)
    long = add(bench, "flood", num_prompt=100)
    assert bench.step() == [(long.id, 16)]
    short = add(bench, "law", num_prompt=6)
    assert bench.step() == [(long.id, 10), (short.id, 6)]  # half was left to it, and what it left went back
    assert bench.step() == [(short.id, 1), (long.id, 15)]
    assert short.status is Status.RUNNING


def test_nothing_is_left_over_for_one_whose_adapter_is_not_there() -> None:
    bench = make_bench(max_batch_tokens=16)
    long = add(bench, "flood", num_prompt=100)
    bench.step()
    add(bench, "law", adapter=A)
    assert bench.step() == [(long.id, 16)]


def test_a_new_weight_counts_from_the_tenants_next_request_on() -> None:
    """A flooding tenant's queue may never be empty, and its weight is what an operator lowers."""
    bench = make_bench(max_running=1)
    for weight in (1.0, 1.0, 0.25):
        add(bench, "flood", weight=weight)
    assert bench.scheduler.shares.account("flood").weight == 0.25
