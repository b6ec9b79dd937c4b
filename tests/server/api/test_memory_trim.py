"""What threads freed comes back to the system while the server runs; what they hold stays."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks.soaking.watch import ProcessSize
from lora_kernels.process import MAX_ARENAS, c_library_trim
from server.api.background import MemoryTrim
from support.servers.waiting import wait_until
from support.stopwatch import quiet_s

CHUNK_BYTES = 60_000  # below what glibc maps by itself
NUM_CHUNKS = 1_000
REPOSITORY = Path(__file__).parents[3]

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
    assert quiet_s(trim) < 0.05


def test_it_stops_at_once_whether_or_not_it_was_started() -> None:
    for is_started in (True, False):
        trim = MemoryTrim(every_s=3600)
        if is_started:
            trim.start()
        start_s = time.perf_counter()
        trim.stop()
        assert time.perf_counter() - start_s < 600  # not the 3,600 s


COUNT_ARENAS = """
import ctypes, sys, threading
from lora_kernels.process import share_arenas

if sys.argv[1] == "shared":
    share_arenas()
all_there = threading.Barrier(17)

def take() -> None:
    held = bytes(50_000)
    all_there.wait()

for _ in range(16):
    threading.Thread(target=take).start()
all_there.wait()
libc = ctypes.CDLL(None)
libc.fdopen.restype = ctypes.c_void_p
libc.malloc_info(0, ctypes.c_void_p(libc.fdopen(1, b"w")))
libc.fflush(None)
"""


@pytest.mark.parametrize(("how", "most"), [("shared", MAX_ARENAS), ("as glibc has it", 64)])
def test_sixteen_threads_share_a_few_arenas(how: str, most: int) -> None:
    """In a process of its own: what is set holds for good."""
    environment = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    command = [sys.executable, "-c", COUNT_ARENAS, how]
    told = subprocess.run(
        command, env=environment, cwd=REPOSITORY, check=True, capture_output=True, text=True, timeout=60
    ).stdout
    num_arenas = told.count("<heap nr=")
    assert num_arenas <= most
    assert (num_arenas > MAX_ARENAS) == (how != "shared")
