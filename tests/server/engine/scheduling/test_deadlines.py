"""Requests whose client has stopped waiting are answered as such by a running engine."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from server.engine.request import Request, SamplingParams, TokenEvent
from server.engine.scheduling.limits import Deadlines
from support.servers.service import TENANT, Answer, Service, make_base, running
from support.worlds.scheduler_bench import make_bench


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("deadlines")
    with running(make_base(folder / "base"), {}, folder / "data") as service:
        yield service


def ask(service: Service, name: str, deadline_s: float, max_tokens: int) -> Answer:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    answer = Answer()
    service.worker.submit(Request(name, TENANT, [1, 2, 3], params, deadline_s=deadline_s), answer.events.put)
    return answer


def test_a_late_request_is_answered_504_without_a_token(service: Service) -> None:
    events = ask(service, "late", time.monotonic() - 0.001, 8).collect()
    assert len(events) == 1
    assert events[0].error is not None
    assert (events[0].error.code, events[0].error.status) == ("deadline_exceeded", 504)
    assert "after 0 of 8 tokens" in events[0].error.message


def test_a_request_that_takes_too_long_ends_at_its_deadline(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time is over once the fifth token is out."""
    scheduler, answer, deadline_s = service.parts.engine.scheduler, Answer(), time.monotonic() + 3600

    def listen(event: TokenEvent) -> None:
        if event.num_output_tokens == 5 and event.error is None:
            monkeypatch.setattr(scheduler, "_clock", lambda: time.monotonic() + 3601)
        answer.events.put(event)

    params = SamplingParams(max_tokens=900, temperature=0.0, ignore_eos=True)
    service.worker.submit(Request("slow", TENANT, [1, 2, 3], params, deadline_s=deadline_s), listen)
    final = answer.collect()[-1]
    assert final.error is not None
    assert final.error.code == "deadline_exceeded"
    assert 5 <= final.num_output_tokens < 20
    assert service.parts.engine.scheduler.pool.num_free == service.parts.engine.scheduler.pool.num_blocks


def test_one_with_time_to_spare_is_answered_in_full(service: Service) -> None:
    assert len(ask(service, "easy", time.monotonic() + 60.0, 8).tokens()) == 8


def test_everybody_is_named_once_and_in_order() -> None:
    deadlines = Deadlines()
    for name, deadline_s in (("c", 3.0), ("a", 1.0), ("b", 2.0)):
        deadlines.watch(name, deadline_s)
    assert deadlines.take_late(0.9) == []
    assert deadlines.take_late(2.0) == ["a", "b"]
    assert deadlines.take_late(9.0) == ["c"]
    assert deadlines.take_late(9.0) == []


def test_deadlines_of_ended_requests_do_not_pile_up() -> None:
    """A client may give each request a day, and send a hundred a second."""
    bench = make_bench(max_waiting=8)
    for _ in range(2000):
        request = bench.add(max_tokens=1, deadline_s=1e6)
        bench.scheduler.finish(request)
    kept = bench.add(max_tokens=1, deadline_s=5e5)
    assert len(bench.scheduler._deadlines._heap) < 200
    bench.clock.advance(6e5)
    bench.scheduler.schedule()
    assert bench.scheduler.take_late() == [kept]
