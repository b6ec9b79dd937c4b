"""Threads of a training: all while nothing else computes, fewer while something does, by the system's own counts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trainer.model import threads
from trainer.model.threads import BUSY_THREADS, SharedThreads, Times, is_alone, read_times

START = Times(at_s=100.0, others_s=50.0, niced_s=20.0, own_s=5.0)
WORKED = replace(START, at_s=110.0, niced_s=40.0, own_s=25.0)  # 10 s on two cores, all of it its own


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("now", "alone"),
    [
        (WORKED, True),
        (replace(WORKED, others_s=50.9), True),  # a server that waits for requests
        (replace(WORKED, others_s=52.0), False),
        (replace(WORKED, niced_s=20.0), False),  # its own work is not counted as niced: nothing can be told
    ],
)
def test_a_run_is_alone_only_if_the_counts_say_so(now: Times, alone: bool) -> None:
    assert is_alone(START, now) is alone


def test_the_number_follows_what_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = [START, WORKED, replace(WORKED, at_s=120.0, others_s=60.0), replace(WORKED, at_s=130.0, others_s=60.0)]
    monkeypatch.setattr(threads, "read_times", lambda: readings.pop(0))
    shared = SharedThreads(1, alone=3, _seen=readings.pop(0))
    seen = [torch.get_num_threads()]
    for _ in range(3):
        shared.adjust()
        seen.append(torch.get_num_threads())
    assert seen == [1, 3, 1, 3]


def test_without_the_job_workers_variable_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BUSY_THREADS, raising=False)
    torch.set_num_threads(2)
    shared = SharedThreads.from_environment()
    shared.adjust()
    assert (shared.busy, torch.get_num_threads()) == (None, 2)


def test_the_systems_counters_are_read_in_seconds(tmp_path: Path) -> None:
    tick = os.sysconf("SC_CLK_TCK")
    (tmp_path / "stat").write_text(f"cpu  {7 * tick} {3 * tick} 5 9\ncpu0 1 2 3 4\n")
    read = read_times(tmp_path / "stat")
    assert read is not None
    assert (read.others_s, read.niced_s) == (7.0, 3.0)
    assert read_times(tmp_path / "none") is None
