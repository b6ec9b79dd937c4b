"""Which requests run next. Adapter memory here is a set of ready adapters; the real one is tested in
test_simulation."""

from __future__ import annotations

import pytest

from adapters_store.errors import AdapterUnavailable, BlobDamaged
from server.engine.request import InvalidRequest, QueueFull, Request, SamplingParams, Status
from support.worlds.adapter_memory import digest_of
from support.worlds.scheduler_bench import make_bench

A, B, C = digest_of("a"), digest_of("b"), digest_of("c")


def test_decodes_come_first_then_running_prefills_then_the_queue() -> None:
    bench = make_bench()
    bench.add(4)
    bench.step()
    bench.add(20)
    assert bench.step() == [("r0", 1), ("r1", 15)]
    bench.add(20)
    schedule = bench.scheduler.schedule()
    assert schedule is not None
    assert [(row.request.id, row.start, row.num_tokens) for row in schedule.rows] == [
        ("r0", 5, 1),
        ("r1", 15, 5),
        ("r2", 0, 10),
    ]
    assert (schedule.num_decodes, schedule.num_tokens) == (1, 16)
    assert [row.samples for row in schedule.rows] == [True, True, False]


def test_every_decode_gets_its_token_while_a_long_prompt_is_read() -> None:
    bench = make_bench(max_batch_tokens=4, max_running=4)
    for _ in range(3):
        bench.add(1, max_tokens=40)
    bench.step()
    bench.add(30)
    for _ in range(30):
        assert bench.step() == [("r0", 1), ("r1", 1), ("r2", 1), ("r3", 1)]


def test_prefill_chunk_bounds_one_requests_share_of_a_step() -> None:
    bench = make_bench(prefill_chunk=5)
    long, short = bench.add(12), bench.add(3)
    assert bench.step() == [(long.id, 5), (short.id, 3)]
    assert bench.step() == [(short.id, 1), (long.id, 5)]
    assert bench.step() == [(short.id, 1), (long.id, 2)]


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "param"), [(20, 13, "max_tokens"), (32, 1, "prompt"), (0, 4, "prompt")]
)
def test_a_request_beyond_the_context_is_refused_by_field_and_limit(
    num_prompt: int, max_tokens: int, param: str
) -> None:
    bench = make_bench(max_model_len=32)
    with pytest.raises(InvalidRequest) as refusal:
        bench.add(num_prompt, max_tokens=max_tokens)
    assert refusal.value.param == param
    assert num_prompt == 0 or f"{num_prompt + max_tokens} tokens, context length is 32" in refusal.value.message
    assert not bench.scheduler._requests


def test_a_request_beyond_the_whole_cache_is_refused() -> None:
    bench = make_bench(num_blocks=4)
    with pytest.raises(InvalidRequest, match="17 tokens, KV cache is 16"):
        bench.add(10, max_tokens=7)
    bench.add(10, max_tokens=6)


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    bench = make_bench(max_waiting=2, retry_after_s=3.5)
    bench.add()
    bench.add()
    with pytest.raises(QueueFull, match="max_waiting 2") as refusal:
        bench.add()
    assert refusal.value.retry_after_s == 3.5
    bench.step()
    bench.add()


def test_one_tenants_full_queue_refuses_that_tenant_alone() -> None:
    bench = make_bench(max_waiting_per_tenant=2, retry_after_s=1.5)
    bench.add()
    bench.add()
    with pytest.raises(QueueFull, match=r"2 requests of law wait already \(max_waiting_per_tenant 2\)") as refusal:
        bench.add()
    assert refusal.value.retry_after_s == 1.5
    bench.scheduler.limits.check_queue("med")
    with pytest.raises(QueueFull, match="2 requests of med wait already"):
        bench.scheduler.limits.check_queue("med", num_arriving=2, num_arriving_of_tenant=2)


def test_a_request_is_known_by_its_id_until_it_is_over() -> None:
    bench = make_bench()
    request = bench.add(max_tokens=1)
    assert bench.scheduler._requests.get(request.id) is request
    bench.step()
    assert bench.scheduler._requests.get(request.id) is None


def test_nobody_waits_behind_a_request_whose_adapter_is_not_ready() -> None:
    bench = make_bench()
    bench.adapters.ready_digests[B] = 1
    cold, colder, warm, bare = (bench.add(adapter=adapter) for adapter in (A, A, B, None))
    assert bench.step() == [(warm.id, 4), (bare.id, 4)]
    assert bench.adapters.wanted == [A, B]
    bench.adapters.ready_digests[A] = 0
    assert bench.step() == [(warm.id, 1), (bare.id, 1), (cold.id, 4), (colder.id, 4)]
    assert (cold.slot, warm.slot, bare.slot) == (0, 1, None)


def test_a_ready_adapter_is_found_behind_more_cold_ones_than_the_lookahead() -> None:
    bench = make_bench(lookahead=4, max_waiting=2000)
    for index in range(1000):
        bench.add(adapter=digest_of(f"cold{index}"))
    bench.adapters.ready_digests[B] = 1
    warm = bench.add(adapter=B)
    assert bench.step() == [(warm.id, 4)]
    assert bench.adapters.wanted == [digest_of(f"cold{index}") for index in range(4)]


def test_an_adapter_that_cannot_come_fails_its_own_requests_once() -> None:
    bench = make_bench()
    bench.adapters.broken[A] = BlobDamaged("blob_damaged", "A is damaged")
    bad, good, worse = bench.add(adapter=A), bench.add(), bench.add(adapter=A)
    assert bench.step() == [(good.id, 4)]
    assert [(request.id, error.code) for request, error in bench.scheduler.take_failed()] == [
        (bad.id, "blob_damaged"),
        (worse.id, "blob_damaged"),
    ]
    assert bad.status is Status.FINISHED
    assert bench.scheduler.take_failed() == []
    assert bench.scheduler.num_waiting == 0


def test_deleting_an_adapter_fails_who_waits_for_it_and_leaves_who_runs_on_it() -> None:
    bench = make_bench(max_running=1)
    bench.adapters.ready_digests[A] = 0
    running, waiting = bench.add(adapter=A), bench.add(adapter=A)
    bench.step()
    bench.scheduler.fail_waiting(A, AdapterUnavailable("adapter_deleted", "A was deleted"))
    assert [request for request, _ in bench.scheduler.take_failed()] == [waiting]
    assert bench.step() == [(running.id, 1)]


def test_the_last_admitted_makes_room_and_resumes_at_the_front_with_its_tokens() -> None:
    bench = make_bench(num_blocks=6, max_running=2)
    bench.adapters.ready_digests[A] = 0
    old, new = bench.add(8, max_tokens=16), bench.add(7, max_tokens=12, adapter=A)
    bench.step()
    behind = bench.add(4)
    while new.status is Status.RUNNING:
        bench.step()
    assert old.status is Status.RUNNING
    assert behind.status.name == "WAITING"
    assert (new.num_preemptions, new.block_ids, new.num_computed_tokens, new.slot) == (1, [], 0, None)
    assert bench.adapters.references[A] == 0
    tokens = list(new.output_ids)
    assert tokens
    rows = [row for _ in range(30) for row in bench.step()]
    assert new.output_ids[: len(tokens)] == tokens
    assert len(new.output_ids) == 12
    assert next(request_id for request_id, count in rows if count > 1) == new.id
    assert behind.status is Status.FINISHED
    assert bench.pool.num_free == 6


def test_recompute_covers_prompt_and_output_of_a_preempted_request() -> None:
    bench = make_bench(num_blocks=6)
    old, new = bench.add(8, max_tokens=16), bench.add(7, max_tokens=12)
    while new.num_preemptions == 0:
        bench.step()
    num_tokens = new.num_tokens
    bench.scheduler.finish(old)
    schedule = bench.scheduler.schedule()
    assert schedule is not None
    (row,) = schedule.rows
    assert row.start + row.num_tokens == num_tokens
    assert row.samples


def test_admission_leaves_a_block_for_everyone_who_runs() -> None:
    bench = make_bench(num_blocks=8, max_batch_tokens=64)
    for _ in range(4):
        bench.add(6)
    assert len(bench.step()) == 3  # 2 blocks are left for 3 that grow: the fourth would be preempted at once
    assert bench.pool.num_free == 2
    assert bench.scheduler.num_waiting == 1


def test_a_request_that_finds_no_blocks_stops_those_behind_it() -> None:
    bench = make_bench(num_blocks=10, max_batch_tokens=64)
    bench.add(16)
    bench.step()
    large, small = bench.add(24), bench.add(4)
    bench.step()
    assert {large.status, small.status} == {Status.WAITING}


def test_copies_of_one_prompt_compute_it_once() -> None:
    bench = make_bench(num_blocks=32, max_batch_tokens=64)
    prompt = list(range(21))
    choices = [Request(f"c{index}", "law", prompt, SamplingParams(max_tokens=2)) for index in range(3)]
    for choice in choices:
        bench.scheduler.add(choice)
    other = bench.add(4)
    assert bench.step() == [("c0", 21), (other.id, 4)]
    rows = bench.step()
    assert [row for row in rows if row[0] in ("c1", "c2")] == [("c1", 1), ("c2", 1)]
    assert choices[1].block_ids[:5] == choices[2].block_ids[:5]
    assert choices[1].num_cached_tokens == 20


def test_a_thousand_twins_are_not_all_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make_bench(max_running=32, max_batch_tokens=32, lookahead=5)
    prompt, looked_at = list(range(40)), []
    for index in range(1000):
        bench.scheduler.add(Request(f"twin{index}", "law", prompt, SamplingParams(max_tokens=2)))
    match = bench.pool.match

    def noted_match(request: Request) -> list[int]:
        looked_at.append(request.id)
        return match(request)

    monkeypatch.setattr(bench.pool, "match", noted_match)
    bench.step()
    assert len(looked_at) == 1  # the first takes the whole step
    bench.step()
    assert len(looked_at) <= 1 + 6


def test_a_twin_goes_on_when_the_one_it_waited_for_is_aborted() -> None:
    bench = make_bench(num_blocks=32)
    prompt = list(range(40))
    for name in ("first", "twin"):
        bench.scheduler.add(Request(name, "law", prompt, SamplingParams(max_tokens=2)))
    assert bench.step() == [("first", 16)]
    bench.scheduler.abort("first")
    assert bench.step() == [("twin", 16)]


def test_finishing_gives_everything_back_once() -> None:
    bench = make_bench()
    bench.adapters.ready_digests[A] = 0
    request, waiting = bench.add(adapter=A), bench.add(adapter=B)
    bench.step()
    assert bench.scheduler.running_adapters() == [A]
    assert bench.scheduler.waiting.adapters() == [B]
    for each in (request, waiting, request):
        bench.scheduler.finish(each)
    assert bench.adapters.references[A] == 0
    assert bench.pool.num_free == 64
    assert not bench.scheduler._requests
    assert bench.scheduler.schedule() is None


def test_abort_returns_the_request_once_whether_it_waits_or_runs() -> None:
    bench = make_bench(max_running=1)
    running, waiting, behind = bench.add(), bench.add(), bench.add()
    bench.step()
    assert bench.scheduler.abort(waiting.id) is waiting
    assert bench.scheduler.abort(running.id) is running
    assert bench.scheduler.abort(running.id) is None
    assert bench.scheduler.abort("never seen") is None
    assert bench.step() == [(behind.id, 4)]


def test_a_request_aborted_during_the_forward_is_passed_over() -> None:
    bench = make_bench()
    request, other = bench.add(), bench.add()
    schedule = bench.scheduler.schedule()
    assert schedule is not None
    bench.scheduler.abort(request.id)
    bench.scheduler.commit(schedule, {request.id: 7, other.id: 7})
    assert request.output_ids == []
    assert other.output_ids == [7]
    assert sorted(bench.pool.take_blocks_to_zero()) == [0]


def test_a_request_with_poison_is_discarded_and_its_prompt_is_not_found_again() -> None:
    bench = make_bench()
    prompt = list(range(12))
    first = Request("first", "law", prompt, SamplingParams(max_tokens=4))
    bench.scheduler.add(first)
    bench.step()
    blocks = list(first.block_ids)
    bench.scheduler.discard(first)
    assert set(blocks[:3]) <= set(bench.pool.take_blocks_to_zero())
    bench.scheduler.add(Request("second", "law", prompt, SamplingParams(max_tokens=4)))
    assert bench.step() == [("second", 12)]


def test_a_row_without_a_token_must_be_finished_before_the_next_step() -> None:
    bench = make_bench()
    bench.add()
    schedule = bench.scheduler.schedule()
    assert schedule is not None
    bench.scheduler.commit(schedule, {})
    with pytest.raises(AssertionError, match="should have been finished"):
        bench.scheduler.schedule()


def test_the_starving_one_holds_back_later_adapters_but_neither_the_base_nor_those_before_it() -> None:
    bench = make_bench(max_batch_tokens=64, starvation_s=2.0)
    before = bench.add(adapter=C)
    cold = bench.add(adapter=A)
    later, bare = bench.add(adapter=B), bench.add()
    bench.adapters.ready_digests |= {B: 1, C: 2}
    bench.adapters.no_room_since[A] = bench.clock.now_s - 2.5
    assert bench.step() == [(before.id, 4), (bare.id, 4)]
    assert later.status is Status.WAITING
    bench.adapters.no_room_since.clear()
    bench.adapters.ready_digests[A] = 0
    bench.step()
    assert {cold.status, later.status} == {Status.RUNNING}


def test_nobody_is_held_back_before_the_starvation_limit() -> None:
    bench = make_bench(max_batch_tokens=64, starvation_s=2.0)
    bench.add(adapter=A)
    later = bench.add(adapter=B)
    bench.adapters.ready_digests[B] = 1
    bench.adapters.no_room_since[A] = bench.clock.now_s - 1.5
    assert bench.step() == [(later.id, 4)]


def test_only_those_up_to_the_starving_one_may_take_room() -> None:
    bench = make_bench(starvation_s=2.0)
    for adapter in (C, A, B):
        bench.add(adapter=adapter)
    bench.adapters.no_room_since[A] = bench.clock.now_s - 2.5
    bench.step()
    assert (bench.adapters.wanted, bench.adapters.limit) == ([C, A, B], 2)
