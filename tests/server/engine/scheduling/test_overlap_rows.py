"""Which rows a forward holds that is chosen before its predecessor's tokens are known, and when none is chosen."""

from __future__ import annotations

from server.engine.schedule import Schedule
from server.engine.scheduling.overlap import MAX_AHEAD_WHILE_WAITING
from support.worlds.adapter_memory import digest_of
from support.worlds.scheduler_bench import Bench, make_bench

A = digest_of("a")


def decoding(bench: Bench, *max_tokens: int) -> Schedule:
    """A forward in which requests of these lengths decode, all of it under way."""
    for count in max_tokens:
        bench.add(4, max_tokens=count)
    bench.step()
    schedule = bench.scheduler.schedule()
    assert schedule is not None
    return schedule


def test_what_is_chosen_ahead_is_the_next_token_of_each_that_surely_goes_on() -> None:
    bench = make_bench()
    schedule = decoding(bench, 8, 2, 8)
    ahead = bench.scheduler.schedule_next(schedule)
    assert ahead is not None
    assert [(row.request.id, row.start, row.num_tokens) for row in ahead.rows] == [("r0", 5, 1), ("r2", 5, 1)]
    assert (ahead.num_tokens, ahead.num_decodes) == (2, 2)
    bench.commit(schedule)
    assert all(row.is_current for row in ahead.rows)
    bench.scheduler.abort("r0")
    ahead.keep_current()
    assert [row.request.id for row in ahead.rows] == ["r2"]
    bench.commit(ahead)
    assert bench.step() == [("r2", 1)]


def test_nothing_is_chosen_ahead_of_a_prompt_or_beside_one_or_after_everybodys_last_token() -> None:
    bench = make_bench(prefill_chunk=4)
    bench.add(8)
    prompt = bench.scheduler.schedule()
    assert prompt is not None
    assert bench.scheduler.schedule_next(prompt) is None
    bench = make_bench()
    assert bench.scheduler.schedule_next(decoding(bench, 2, 2)) is None


def test_a_newcomer_a_place_that_opens_and_an_adapter_that_arrives_end_the_looking_ahead() -> None:
    for is_full in (False, True):
        bench = make_bench(max_running=2)
        schedule = decoding(bench, *((8, 8) if is_full else (8,)))
        assert bench.scheduler.schedule_next(schedule) is not None
        bench.add(4, adapter=A)
        assert bench.scheduler.schedule_next(schedule) is None, "it may be admitted"
        bench.commit(schedule)
        schedule = bench.scheduler.schedule()
        assert schedule is not None
        assert bench.scheduler.schedule_next(schedule) is not None, "it waits for its adapter, or for a slot"
        bench.adapters.ready_digests[A] = 0
        bench.scheduler.before_step()
        assert bench.scheduler.schedule_next(schedule) is None
    bench = make_bench(max_running=2)
    for count in (3, 9):
        bench.add(4, max_tokens=count)
    bench.add(4)
    bench.step()
    schedule = bench.scheduler.schedule()
    assert schedule is not None
    assert bench.scheduler.schedule_next(schedule) is not None
    bench.commit(schedule)
    schedule = bench.scheduler.schedule()
    assert schedule is not None
    assert bench.scheduler.schedule_next(schedule) is None, "r0 certainly ends and a request waits for its slot"


def test_looking_ahead_ends_now_and_then_while_somebody_waits_because_time_alone_may_let_it_in() -> None:
    bench = make_bench()
    bench.add(4, adapter=A)
    schedule = decoding(bench, 200)
    num_ahead = 0
    while (ahead := bench.scheduler.schedule_next(schedule)) is not None:
        bench.commit(schedule)
        schedule, num_ahead = ahead, num_ahead + 1
    assert num_ahead == MAX_AHEAD_WHILE_WAITING


def test_looking_ahead_preempts_nobody() -> None:
    bench = make_bench(num_blocks=4)
    schedule = decoding(bench, 8, 8)  # two blocks of 4 each: none is left for a ninth token
    for _ in range(3):
        ahead = bench.scheduler.schedule_next(schedule)
        assert ahead is not None
        bench.commit(schedule)
        schedule = ahead
    held = [list(request.block_ids) for request in bench.scheduler.running]
    assert bench.scheduler.schedule_next(schedule) is None
    assert [list(request.block_ids) for request in bench.scheduler.running] == held
    assert bench.pool.num_free == 0


def test_blocks_that_a_forward_under_way_may_still_write_are_wiped_before_others_get_them() -> None:
    bench = make_bench()
    schedule = decoding(bench, 20)
    for _ in range(3):
        bench.commit(schedule)
        schedule = bench.scheduler.schedule()  # type: ignore[assignment]
    request = schedule.rows[0].request
    ahead = bench.scheduler.schedule_next(schedule)
    assert ahead is not None
    bench.commit(schedule)
    written = request.block_ids[ahead.rows[0].start // 4]
    cached = len(bench.pool._cache)
    bench.scheduler.finish(request)
    assert bench.pool.take_blocks_to_zero() == [written]
    assert len(bench.pool._cache) == cached


def test_what_a_row_of_no_use_wrote_is_wiped_also_after_its_request_went_back_and_on() -> None:
    bench = make_bench()
    schedule = decoding(bench, 20)
    request = schedule.rows[0].request
    ahead = bench.scheduler.schedule_next(schedule)
    assert ahead is not None
    schedule.drop(request)  # it got no token: the same position is computed again
    bench.commit(schedule)
    ahead.keep_current()
    assert ahead.rows == []
    assert bench.step() == [(request.id, 1)]
    assert (request.num_computed_tokens, request.num_written_tokens) == (5, 6)
    bench.scheduler.finish(request)
    assert len(bench.pool.take_blocks_to_zero()) == 1, "position 5 may hold anything"
