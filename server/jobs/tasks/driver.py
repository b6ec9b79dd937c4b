"""Follows one task of a job to its end: heartbeat, news, and what the owner wants meanwhile. Knows no training."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from adapters_store.errors import StoreUnavailable
from server.jobs.store.job_store import JobStore
from server.jobs.store.records import Job
from server.jobs.tasks.executor import Executor, Task

_log = logging.getLogger(__name__)

News = tuple[Mapping[str, Any], list[dict[str, Any]]]  # columns that changed, and what is told
Asked = Literal["run", "pause", "cancel", "gone"]


@dataclass(frozen=True, kw_only=True)
class DriveSettings:
    """tick_s: between two looks. heartbeat_s: between two heartbeats, which carry the news. obey_s: how long a task may
    take to do what it was asked before it is killed. store_wait_s: before a store that was away is asked again."""

    tick_s: float = 0.1
    heartbeat_s: float = 0.5
    obey_s: float = 120.0
    store_wait_s: float = 1.0


@dataclass(frozen=True, slots=True)
class TaskEnd:
    """exit_code None: nobody knows. asked: what the owner wanted when it ended; "gone": the job was deleted."""

    exit_code: int | None
    asked: Asked


class Driver:
    """One for all jobs of a worker. stopping: set when the worker is asked to end; a driven job then never returns, and
    is driven again by the next worker: what a kill leaves and what a stop leaves are the same."""

    def __init__(
        self, jobs: JobStore, executor: Executor, stopping: threading.Event, settings: DriveSettings | None = None
    ) -> None:
        self.executor = executor
        self._jobs = jobs
        self._stopping = stopping
        self._settings = settings or DriveSettings()

    def drive(
        self, job: Job, task: Task, *, news: Callable[[], News], ask: Callable[[Asked], None] | None = None
    ) -> TaskEnd:
        """Start the task, unless it runs already, and follow it to its end.

        ask: tells the task what is wanted; without one it is killed for anything but "run".
        """
        self._stay_out_of_the_way()
        self.executor.start(task)
        asked: Asked = "run"
        asked_s = beat_s = time.monotonic()
        while self.executor.state(task).is_running:
            self._stay_out_of_the_way(task)
            wanted, now_s = self._wanted(job), time.monotonic()
            if wanted != asked:
                asked, asked_s = wanted, now_s
                if ask is not None:
                    ask(wanted)
            if asked != "run" and (ask is None or asked == "gone" or now_s - asked_s > self._settings.obey_s):
                self.executor.kill(task)
            if now_s - beat_s > self._settings.heartbeat_s:
                beat_s = now_s
                self._jobs.record(job, *news())
            time.sleep(self._settings.tick_s)
        self._stay_out_of_the_way()
        self._jobs.record(job, *news())
        return TaskEnd(self.executor.state(task).exit_code, self._wanted(job))

    def wait(self, seconds: float) -> None:
        """Sleep, and never wake where the worker ends meanwhile."""
        self._stopping.wait(seconds)
        self._stay_out_of_the_way()

    def patient(self, step: Callable[[str], bool]) -> Callable[[str], bool]:
        """The step, done again from its beginning while the store is away: a job does not fail for that. What the step
        has started goes on meanwhile."""

        def run(job_id: str) -> bool:
            while True:
                try:
                    return step(job_id)
                except StoreUnavailable as error:
                    _log.warning("%s waits for the store: %s", job_id, error.message)
                self.wait(self._settings.store_wait_s)

        return run

    def _wanted(self, job: Job) -> Asked:
        current = self._jobs.find(job.id)
        return "gone" if current is None else current.wanted

    def _stay_out_of_the_way(self, task: Task | None = None) -> None:
        """Once the worker ends: let the task end in order, and this thread go no further."""
        if not self._stopping.is_set():
            return
        if task is not None:
            self.executor.stop(task)
        threading.Event().wait()
