"""Readers that come together share one text; no reader gets one older than allowed, and none blocks the loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import anyio
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from server.api.telemetry.metrics import MetricsText


class Counting(Collector):
    """Counts how often it was asked; waits while `may_answer` is not set, as a database does."""

    def __init__(self) -> None:
        self.num_asked = 0
        self.may_answer = threading.Event()
        self.may_answer.set()

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        self.may_answer.wait()
        self.num_asked += 1
        yield GaugeMetricFamily("asked", "", value=self.num_asked)


def made(max_age_s: float) -> tuple[Counting, MetricsText]:
    registry, counting = CollectorRegistry(), Counting()
    registry.register(counting)
    return counting, MetricsText(registry, max_age_s)


def test_readers_within_the_time_share_a_text() -> None:
    counting, text = made(3600.0)
    texts = {anyio.run(text.read) for _ in range(5)}
    assert (len(texts), counting.num_asked) == (1, 1)


def test_without_a_time_each_reader_has_a_new_one() -> None:
    counting, text = made(0.0)
    texts = {anyio.run(text.read) for _ in range(5)}
    assert (len(texts), counting.num_asked) == (5, 5)


def test_readers_that_come_while_it_is_rendered_wait_for_that_one_and_the_loop_goes_on() -> None:
    counting, text = made(3600.0)

    async def read_together() -> set[bytes]:
        counting.may_answer.clear()
        readers = [asyncio.ensure_future(text.read()) for _ in range(5)]
        await asyncio.sleep(0)  # the loop is free although no reader has its text
        counting.may_answer.set()
        return set(await asyncio.gather(*readers))

    assert len(asyncio.run(read_together())) == 1
    assert counting.num_asked == 1
