"""Keeps a job worker running beside a server: started at the first job, restarted when it dies. Knows no job.

A server without jobs runs no worker. The worker ends with its parent, whose pipe it watches. Many servers on one
PostgreSQL have one worker together; when it is gone, the next server to notice starts another.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from adapters_store.errors import StoreError
from adapters_store.remote.settings import URL_VARIABLE
from lora_kernels.cgroups import usable_cpus
from lora_kernels.process import operator_chose_threads
from server.jobs.limits import JobLimits
from server.jobs.service import Onboarding
from server.jobs.settings import JobSettings
from server.jobs.worker.leader import is_led
from server.jobs.worker.options import DATABASE_URL_VARIABLE

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SupervisorSettings:
    """jobs: what runs them. options: further arguments of the worker. look_s: between two checks for work. waits_s:
    before the n-th restart of a worker that died within settled_s; the last one repeats. grace_s: for a worker to end.
    serves: whether requests are served beside it, which then keep half of the CPU.
    """

    options: tuple[str, ...] = ()
    jobs: JobSettings = field(default_factory=JobSettings)
    look_s: float = 0.5
    waits_s: tuple[float, ...] = (0.0, 1.0, 5.0, 30.0)
    settled_s: float = 60.0
    grace_s: float = 35.0
    environment: Mapping[str, str] = field(default_factory=dict)
    serves: bool = True


class WorkerSupervisor:
    """A thread that checks for work and for the worker."""

    def __init__(self, onboarding: Onboarding, settings: SupervisorSettings | None = None) -> None:
        self._onboarding = onboarding
        self._settings = settings or SupervisorSettings()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="job-worker-supervisor", daemon=True)
        self._deaths = 0
        self._started_s = 0.0
        self.worker: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the worker in order: its trainings checkpoint, and resume at the next start."""
        self._stopping.set()
        self._thread.join()
        if self.worker is None or self.worker.poll() is not None:
            return
        self.worker.terminate()
        try:
            self.worker.wait(self._settings.grace_s)
        except subprocess.TimeoutExpired:
            self.worker.kill()
            self.worker.wait()

    def _run(self) -> None:
        while not self._stopping.wait(self._settings.look_s):
            try:
                self._look()
            except (StoreError, OSError) as error:  # OSError: no process, or no file, can be had now
                logger.warning("cannot check for jobs: %s", error)

    def _look(self) -> None:
        if self.worker is not None:
            if self.worker.poll() is None:
                return
            self._died(self.worker)
        if self._onboarding.jobs.has_work() and not is_led(self._onboarding.database, self._onboarding.data_dir):
            self._started_s = time.monotonic()
            self.worker = self._spawn()

    def _died(self, worker: subprocess.Popen[bytes]) -> None:
        settled = time.monotonic() - self._started_s > self._settings.settled_s
        self._deaths = 0 if settled else self._deaths + 1
        waits_s = self._settings.waits_s
        logger.warning("the job worker exited with code %s; the next one resumes its jobs", worker.returncode)
        self.worker = None
        self._stopping.wait(waits_s[min(self._deaths, len(waits_s) - 1)])

    def _spawn(self) -> subprocess.Popen[bytes]:
        url = self._onboarding.database_url  # not an argument: it may hold a password
        environment = {**os.environ, **self._settings.environment, DATABASE_URL_VARIABLE: url}
        command = (sys.executable, "-P", "-m", "server.jobs.worker.worker", "--watch-stdin")
        limits = _options(self._onboarding.limits, serves=self._settings.serves)
        options = (*limits, "--jobs", self._settings.jobs.to_json(), *self._settings.options)
        remote = self._onboarding.remote
        environment |= {URL_VARIABLE: ""} if remote is None else remote.settings.to_environment()
        return subprocess.Popen(
            [*command, "--data-dir", str(self._onboarding.data_dir), *options],
            stdin=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # a terminal's Ctrl-C reaches the server alone
        )


def _options(limits: JobLimits, *, serves: bool) -> Iterator[str]:
    """The limits, as the worker's options."""
    yield from ("--max-running", str(limits.max_running))
    if limits.memory_bytes is not None:
        yield from ("--memory-bytes", str(limits.memory_bytes))
    threads = default_threads(limits.max_running, serves=serves)
    if threads is not None:
        yield from ("--threads", str(threads), "--idle-threads", str(idle_threads(limits.max_running)))


def default_threads(max_running: int, *, serves: bool = True) -> int | None:
    """CPU threads of one training: all trainings together get the machine, half of it beside a server; None if the
    environment sets the number."""
    share = usable_cpus() // 2 if serves else usable_cpus()
    return None if operator_chose_threads() else max(1, share // max_running)


def idle_threads(max_running: int) -> int:
    """CPU threads of one training while nothing else works on the machine."""
    return max(1, usable_cpus() // max_running)
