"""How many CPU threads a job's training uses: all while it is alone, fewer while other programs work. Knows no server.

Linux counts the time of programs of positive niceness apart (/proc/stat, column "nice"), and jobs are such programs. So
the column "user" is what everything else computes: a server that answers requests, and whatever else runs there.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

BUSY_THREADS = "MULTILORA_BUSY_THREADS"  # set by the job worker; without it a run keeps its threads
LEAST_S = 0.2  # between two readings: the counters move in steps of 10 ms
OTHERS = 0.1  # of one CPU: what others may compute while the run is alone


@dataclass(frozen=True, slots=True)
class Times:
    """CPU seconds since the start: others' of the machine, those of programs of positive niceness, this process's."""

    at_s: float
    others_s: float
    niced_s: float
    own_s: float


def read_times(stat: Path = Path("/proc/stat")) -> Times | None:
    """None where the system does not count so."""
    try:
        words = stat.read_text().split(maxsplit=3)
    except OSError:
        return None
    tick = os.sysconf("SC_CLK_TCK")
    return Times(time.monotonic(), int(words[1]) / tick, int(words[2]) / tick, time.process_time())


def is_alone(before: Times, now: Times) -> bool:
    """Whether others computed next to nothing between the two. False as well if this process's own time is not among
    the niced: then its niceness is not positive, or the counters are not this machine's."""
    own_s = now.own_s - before.own_s
    counted = now.niced_s - before.niced_s >= 0.5 * own_s
    return counted and now.others_s - before.others_s <= OTHERS * (now.at_s - before.at_s)


@dataclass(eq=False)
class SharedThreads:
    """busy: threads while others work; None: the number never changes. `adjust` between two forwards."""

    busy: int | None
    alone: int = field(default_factory=torch.get_num_threads)
    _seen: Times | None = field(default_factory=read_times)

    def __post_init__(self) -> None:
        if self.busy is not None:
            torch.set_num_threads(min(self.busy, self.alone))

    @classmethod
    def from_environment(cls) -> SharedThreads:
        value = os.environ.get(BUSY_THREADS, "")
        return cls(int(value) if value.isascii() and value.isdigit() and int(value) else None)

    def adjust(self) -> None:
        """Take all threads or fewer, by what other programs computed since the last call."""
        if self.busy is None or self._seen is None:
            return
        now = read_times()
        if now is None or now.at_s - self._seen.at_s < LEAST_S:
            return
        torch.set_num_threads(self.alone if is_alone(self._seen, now) else min(self.busy, self.alone))
        self._seen = now
