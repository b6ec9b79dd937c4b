"""Which job runs next, and whether it fits. `choose` decides; `Dispatcher` carries the decision out.

Fair between tenants: the tenant with the fewest running jobs goes first, then the one whose last start is longest ago,
then the oldest job. So a tenant's hundred jobs never delay another tenant's single one.

A job that does not fit lets those behind it pass, for RESERVE_AFTER_S. Then none behind it starts until it fits: small
jobs cannot keep a large one waiting without end. Since when it waits is one of its events, so another worker counts on.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from adapters_store.storage.database import now_s
from server.jobs.settings import SUBPROCESS
from server.jobs.steps.memory import Estimate
from server.jobs.store.job_store import JobStore
from server.jobs.store.records import Job, JobFailure, JobStatus
from trainer.spec import SpecError, TrainSpec

logger = logging.getLogger(__name__)

CHECK, ONBOARD = "check", "onboard"
RESERVE_AFTER_S = 600.0
Advice = Callable[[TrainSpec, int], Sequence[str]]


class Starts(Protocol):
    """Starts a durable sequence; does nothing if it runs already."""

    def start(self, sequence: str, subject: str, number: int) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """max_running: trainings at once. memory_bytes: for all trainings together (None: whatever is free).

    estimate: what each rank of a training takes; free: what is left now for a number of ranks (None: unknown); advise:
    changes that make each rank fit.
    """

    max_running: int
    estimate: Estimate
    free: Callable[[int], int | None]
    memory_bytes: int | None = None
    advise: Advice | None = None


def choose(queued: Sequence[Job], running: Sequence[Job], last_starts: Mapping[str, int]) -> list[Job]:
    """The queued jobs, in the order in which they start."""
    busy = Counter(job.tenant for job in running)
    return sorted(queued, key=lambda job: (busy[job.tenant], last_starts.get(job.tenant, 0), job.number))


class Dispatcher:
    """Looks at all jobs once a tick. Only one process may have one.

    executor: the kind that runs the jobs admitted here. A job that runs under another kind belongs to a worker of that
    kind: two executors know nothing of each other's processes, and would train it twice.
    """

    def __init__(
        self,
        jobs: JobStore,
        sequences: Starts,
        capacity: Capacity,
        executor: str = SUBPROCESS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._jobs = jobs
        self._sequences = sequences
        self._capacity = capacity
        self._executor = executor
        self._clock = clock
        self._started: set[tuple[str, str, int]] = set()
        self._short_since_s: dict[str, float] = {}  # by job: when it was first found not to fit

    def tick(self) -> None:
        """Validate new jobs, resume running ones that have no sequence here, admit the next ones."""
        active = self._jobs.list(statuses=(JobStatus.VALIDATING, JobStatus.QUEUED, JobStatus.RUNNING))
        known = {job.id for job in active}
        self._started = {each for each in self._started if each[1] in known}
        for job in reversed(active):
            if job.status is JobStatus.VALIDATING:
                self._start(CHECK, job)
            elif job.status is JobStatus.RUNNING:
                self._start(ONBOARD, job) if self._is_own(job) else self._leave(job)
        running = [job for job in active if job.status is JobStatus.RUNNING and self._is_own(job)]
        queued = [job for job in active if job.status is JobStatus.QUEUED]
        waiting = {job.id for job in queued}
        self._short_since_s = {each: since_s for each, since_s in self._short_since_s.items() if each in waiting}
        if queued and len(running) < self._capacity.max_running:
            self._admit(queued, running)

    def _is_own(self, job: Job) -> bool:
        return (job.executor or SUBPROCESS) == self._executor

    def _leave(self, job: Job) -> None:
        """Tell its owner, once per process, why it waits."""
        if self._is_first("leave", job):
            text = f"The job waits for a worker with --jobs-executor {job.executor}; this one has {self._executor}"
            self._jobs.note(job, f"leave:{job.run_number}:{self._executor}", text, level="warn")

    def _start(self, sequence: str, job: Job) -> None:
        """Once per process: asking DBOS at every tick is not needed."""
        if self._is_first(sequence, job):
            self._sequences.start(sequence, job.id, job.run_number)

    def _is_first(self, what: str, job: Job) -> bool:
        """Whether this is done for the first time in this run of the job."""
        key = (what, job.id, job.run_number)
        is_first = key not in self._started
        self._started.add(key)
        return is_first

    def _admit(self, queued: Sequence[Job], running: Sequence[Job]) -> None:
        for job in choose(queued, running, self._jobs.last_starts()):
            needed = self._needed(job)
            free = self._free(job, running)
            if free is None or needed <= free:
                started = {"started_at": now_s(), "executor": self._executor}
                if self._jobs.move(job, JobStatus.RUNNING, only_in=(JobStatus.QUEUED,), **started):
                    self._start(ONBOARD, job)
                return  # one a tick: the next tick sees the memory this one takes
            most = self._capacity.memory_bytes if running else free
            if most is not None and needed > most:
                self._jobs.end(job, JobStatus.FAILED, self._too_large(job, needed, most))
            elif self._clock() - self._short_since(job, needed, free) >= RESERVE_AFTER_S:
                text = f"The job has waited for memory for {RESERVE_AFTER_S:.0f} s"
                self._jobs.note(job, f"reserve:{job.run_number}", f"{text}. Jobs behind it wait until it has started")
                return

    def _short_since(self, job: Job, needed: int, free: int) -> float:
        """When the job was first found not to fit, by any worker. Its event says so."""
        if job.id not in self._short_since_s:
            key, begin_s = f"short:{job.run_number}", self._clock()
            text = f"The job waits for memory: it needs about {needed} bytes, {free} are free"
            self._jobs.note(job, key, text, waiting_since=int(begin_s))
            event = self._jobs.find_event(job, key)
            self._short_since_s[job.id] = begin_s if event is None else event.data["waiting_since"]
        return self._short_since_s[job.id]

    def _needed(self, job: Job) -> int:
        """Of all ranks, at most: shards take less than the whole. Nothing if this version refuses the spec, which an
        earlier one accepted: the job's own step then ends the job, and names the field."""
        try:
            return self._capacity.estimate(TrainSpec.from_mapping(job.spec)) * job.ranks
        except SpecError:
            return 0

    def _free(self, job: Job, running: Sequence[Job]) -> int | None:
        """Free memory, less what trainings that have just begun will still take."""
        free, budget = self._capacity.free(job.ranks), self._capacity.memory_bytes
        promised = sum(self._needed(job) for job in running)
        if budget is not None:
            return budget - promised if free is None else min(free, budget - promised)
        return None if free is None else free - promised

    def _too_large(self, job: Job, needed: int, free: int) -> JobFailure:
        spec = TrainSpec.from_mapping(job.spec)
        advice = "; ".join(self._capacity.advise(spec, free // job.ranks)) if self._capacity.advise is not None else ""
        message = f"training needs about {needed} bytes of memory, {free} are free"
        logger.warning("%s: %s", job.id, message)
        return JobFailure("out_of_memory", f"{message}. {advice}".rstrip(". "), "multilora")
