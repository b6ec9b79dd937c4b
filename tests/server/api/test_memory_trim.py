"""What threads freed comes back to the system while the server runs; what they hold stays."""

from __future__ import annotations

import os
import threading
import time

import pytest

from benchmarks.soak_watch import ProcessSize
from server.api.memory_trim import MemoryTrim, c_library_trim
from support.waiting import wait_until

CHUNK_BYTES = 60_000  # below what glibc maps by itself
NUM_CHUNKS = 1_000

pytestmark = pytest.mark.skipif(c_library_trim() is None, reason="this C library gives back what is freed")


def anon_mb() -> float:
    return ProcessSize.of(os.getpid()).anon_mb


@pytest.fixture
def held() -> list[bytes]:
    """Every tenth of 60 MB that a thread took; the rest it freed, but glibc did not."""
    kept: list[bytes] = []

    def take() -> None:
        taken = [bytes([index % 251]) * CHUNK_BYTES for index in range(NUM_CHUNKS)]
        kept.extend(taken[9::10])

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return kept


def test_freed_memory_comes_back_and_what_is_held_is_as_it_was(held: list[bytes]) -> None:
    trim = MemoryTrim(every_s=0.2)
    before_mb = anon_mb()
    trim.start()
    wait_until(lambda: anon_mb() < before_mb - 40)
    trim.stop()
    assert all(len(set(chunk)) == 1 and len(chunk) == CHUNK_BYTES for chunk in held)


def test_a_trim_takes_a_few_milliseconds(held: list[bytes]) -> None:
    trim = c_library_trim()
    assert trim is not None
    start_s = time.thread_time()
    trim()
    assert time.thread_time() - start_s < 0.05


def test_it_stops_at_once_whether_or_not_it_was_started() -> None:
    for is_started in (True, False):
        trim = MemoryTrim(every_s=3600)
        if is_started:
            trim.start()
        start_s = time.perf_counter()
        trim.stop()
        assert time.perf_counter() - start_s < 2.0
