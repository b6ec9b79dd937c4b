"""CPU time of a tree of processes counts those whose parent has ended."""

from __future__ import annotations

import os
import subprocess

import pytest

from benchmarks.common import tree_times
from benchmarks.common.tree_times import TreeTimes


def test_a_process_stays_counted_after_its_parent_has_ended() -> None:
    command = ["sh", "-c", "sleep 600 > /dev/null & echo $!; read line"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        orphan = int(parent.stdout.readline())
        try:
            times = TreeTimes(os.getpid())
            times._look()
            parent.communicate(b"\n")
            times._look()
            assert {os.getpid(), parent.pid, orphan} <= {pid for pid, _ in times._ticks}
            assert times.total_s > 0
        finally:
            os.kill(orphan, 9)


def test_a_process_that_has_an_ended_ones_id_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    times, init = TreeTimes(10), (1, 0, 900, 1)
    for processes in (
        [init, (10, 1, 5, 40), (11, 10, 7, 41)],
        [init, (10, 1, 6, 40), (11, 1, 800, 90), (12, 11, 800, 91)],
    ):
        monkeypatch.setattr(tree_times, "_processes", lambda processes=processes: iter(processes))
        times._look()
    assert times.total_s == (6 + 7) / os.sysconf("SC_CLK_TCK")
