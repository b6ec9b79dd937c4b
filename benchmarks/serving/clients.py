"""Clients of a running engine worker: a closed loop of requests, and streams watched token by token. No HTTP."""

from __future__ import annotations

import itertools
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from adapters_store.base.description import AdapterDigest
from benchmarks.common.workload import Adapters, Lengths, make_request, random_prompts
from server.engine.request import TokenEvent
from server.engine.worker import EngineWorker

PATIENCE_S = 120.0


@dataclass(slots=True)
class Stamped:
    """A request's events as they came. All times: time.perf_counter() seconds."""

    sent_s: float
    times_s: list[float] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        return self.times_s[0] - self.sent_s

    def gaps_between(self, begin_s: float, end_s: float) -> list[float]:
        """Inter-token gaps that lie within the window."""
        inside = [moment for moment in self.times_s if begin_s <= moment <= end_s]
        return [after - before for before, after in itertools.pairwise(inside)]


@dataclass(frozen=True, slots=True)
class LoopRun:
    """A closed loop from first submission to last answer."""

    seconds: float
    num_tokens: int
    ttfts_s: list[float]

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds


def closed_loop(
    worker: EngineWorker,
    adapters: Adapters,
    prompts: Sequence[list[int]],
    max_tokens: Sequence[int],
    *,
    concurrency: int,
    tenant: str = "bench",
) -> LoopRun:
    """One request per adapter of the list, `concurrency` of them in flight: each answer sends the next request."""
    answered: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
    sent: list[Stamped] = []

    def send() -> None:
        index = len(sent)
        sent.append(Stamped(time.perf_counter()))
        own, put = sent[-1].times_s, answered.put

        def listen(event: TokenEvent) -> None:
            own.append(time.perf_counter())
            if event.finish_reason is not None:
                put(event)

        worker.submit(make_request(prompts[index], adapters[index], max_tokens[index], tenant=tenant), listen)

    began_s = time.perf_counter()
    for _ in range(min(concurrency, len(adapters))):
        send()
    for _ in adapters:
        event = answered.get(timeout=PATIENCE_S)
        assert event.error is None, event.error
        if len(sent) < len(adapters):
            send()
    return LoopRun(time.perf_counter() - began_s, sum(max_tokens), [one.ttft_s for one in sent])


@contextmanager
def endless_streams(
    worker: EngineWorker, adapters: Adapters, lengths: Lengths, vocab: int, *, seed: int
) -> Iterator[list[Stamped]]:
    """One stream per adapter, all of them decoding when the block begins, aborted when it ends.

    They must be long enough to outlast the block: one that ends by itself is an error.
    """
    streams: list[Stamped] = []
    finals: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
    ids: list[str] = []
    for prompt, adapter in zip(random_prompts(len(adapters), lengths.prompt, vocab, seed=seed), adapters, strict=True):
        request = make_request(prompt, adapter, lengths.new)
        stream = Stamped(time.perf_counter())
        streams.append(stream)
        ids.append(request.id)
        worker.submit(request, _recorder(stream, finals))
    _wait_until_decoding(streams)
    yield streams
    for request_id in ids:
        worker.abort(request_id)
    reasons = [finals.get(timeout=PATIENCE_S).finish_reason for _ in ids]
    assert reasons == ["abort"] * len(ids), f"a stream ended before its time: {reasons}"


def _recorder(stream: Stamped, finals: queue.SimpleQueue[TokenEvent]) -> Callable[[TokenEvent], None]:
    def listen(event: TokenEvent) -> None:
        if event.finish_reason is None:
            stream.times_s.append(time.perf_counter())
        else:
            finals.put(event)

    return listen


def _wait_until_decoding(streams: Sequence[Stamped]) -> None:
    deadline_s = time.perf_counter() + PATIENCE_S
    while any(len(stream.times_s) < 3 for stream in streams):
        assert time.perf_counter() < deadline_s, "streams do not start"
        time.sleep(0.005)


def load_and_answer(worker: EngineWorker, digests: Sequence[AdapterDigest], *, concurrency: int) -> None:
    """Another tenant asks each of these adapters for one token after a prompt of one: the shortest requests there are,
    so that what they cost beyond loading is next to nothing."""
    prompts = [[2 + index] for index in range(len(digests))]
    closed_loop(worker, digests, prompts, [1] * len(digests), concurrency=concurrency, tenant="other")
