"""Runs one task of a job to its end: heartbeats, progress, and the owner's requests meanwhile. Knows no training."""

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
from server.jobs.tasks.executor import Executor, ExecutorUnavailable, Task

_log = logging.getLogger(__name__)

DesiredState = Literal["run", "pause", "cancel", "gone"]
Update = tuple[Mapping[str, Any], list[dict[str, Any]]]  # what `JobStore.record` takes at a heartbeat


@dataclass(frozen=True, kw_only=True)
class DriverSettings:
    """tick_s: between two looks at the task. heartbeat_s: between two heartbeats, which carry the updates.

    stop_s: the time a task gets to pause or cancel before it is killed. store_wait_s: before a step that found no store
    is run again.
    """

    tick_s: float = 0.1
    heartbeat_s: float = 0.5
    stop_s: float = 120.0
    store_wait_s: float = 1.0


@dataclass(frozen=True, slots=True)
class TaskEnd:
    """exit_code None: unknown. desired: what the owner wanted when it ended; "gone": the job was deleted."""

    exit_code: int | None
    desired: DesiredState


class Driver:
    """One for all jobs of a worker.

    stopping: set when the worker ends. Every call then blocks for good, and the next worker runs the task to its end:
    an orderly stop leaves the same state as a kill.
    """

    def __init__(
        self, jobs: JobStore, executor: Executor, stopping: threading.Event, settings: DriverSettings | None = None
    ) -> None:
        self.executor = executor
        self._jobs = jobs
        self._stopping = stopping
        self._settings = settings or DriverSettings()

    def run_to_end(
        self,
        job: Job,
        task: Task,
        *,
        update: Callable[[], Update] = lambda: ({}, []),
        request: Callable[[DesiredState], None] | None = None,
    ) -> TaskEnd:
        """Start the task, unless it runs already, and follow it to its end.

        request: passes the desired state on to the task; without it the task is killed for anything but "run".
        """
        self._block_if_stopping()
        self.executor.start(task)
        desired: DesiredState = "run"
        changed_s = beat_s = time.monotonic()
        while self.executor.state(task).is_running:
            self._block_if_stopping(task)
            wanted, now_s = self._desired(job), time.monotonic()
            if wanted != desired:
                desired, changed_s = wanted, now_s
                if request is not None:
                    request(wanted)
            is_late = now_s - changed_s > self._settings.stop_s
            if desired != "run" and (request is None or desired == "gone" or is_late):
                self.executor.kill(task)
            if now_s - beat_s > self._settings.heartbeat_s:
                beat_s = now_s
                self._jobs.record(job, *update())
            time.sleep(self._settings.tick_s)
        self._block_if_stopping()
        self._jobs.record(job, *update())
        return TaskEnd(self.executor.state(task).exit_code, self._desired(job))

    def wait(self, seconds: float) -> None:
        """Sleep; never returns if the worker ends meanwhile."""
        self._stopping.wait(seconds)
        self._block_if_stopping()

    def retry_without_store(self, step: Callable[[str], bool]) -> Callable[[str], bool]:
        """The step, run again from its beginning while the store or the executor is unavailable: a job does not fail
        for that. A process that the step has started keeps running meanwhile."""

        def run(job_id: str) -> bool:
            while True:
                try:
                    return step(job_id)
                except StoreUnavailable as error:
                    _log.warning("%s waits for the store: %s", job_id, error.message)
                except ExecutorUnavailable as error:
                    _log.warning("%s waits for what runs it: %s", job_id, error)
                self.wait(self._settings.store_wait_s)

        return run

    def _desired(self, job: Job) -> DesiredState:
        current = self._jobs.find(job.id)
        return "gone" if current is None else current.wanted

    def _block_if_stopping(self, task: Task | None = None) -> None:
        """When the worker ends: let a task of this machine end in order, and hold this thread."""
        if not self._stopping.is_set():
            return
        if task is not None and not self.executor.is_remote:
            self.executor.stop(task)
        threading.Event().wait()
