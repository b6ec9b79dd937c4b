"""CPU time of a tree of processes counts those whose parent has ended."""

from __future__ import annotations

import os
import subprocess

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
