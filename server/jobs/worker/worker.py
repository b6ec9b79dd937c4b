"""The worker process: resumes the jobs its predecessor left, then works until a signal, or until its parent dies.

`python -m server.jobs.worker.worker --data-dir DIR`. One worker at a time works on a database; others wait until it
no longer leads. At its end it asks trainings to checkpoint, and stops at once: the next worker resumes from there.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sqlalchemy.exc import DBAPIError

from adapters_store.errors import StoreUnavailable
from server.jobs.service import Onboarding
from server.jobs.settings import KUBERNETES, RAY, JobSettings
from server.jobs.steps.gate import GATE, GateStep
from server.jobs.steps.memory import advice, estimated_bytes, free_bytes
from server.jobs.steps.onboarding import Steps
from server.jobs.steps.training import TRAINER, RetrySettings, Training
from server.jobs.store.records import Job, JobStatus
from server.jobs.tasks.driver import Driver, DriverSettings
from server.jobs.tasks.executor import Executor, SubprocessExecutor, Task, wait_until_ended
from server.jobs.tasks.resident import PYTHON, Resident, can_be_resident
from server.jobs.worker.dispatcher import CHECK, ONBOARD, Capacity, Dispatcher
from server.jobs.worker.durable import DurableSequences, database_url
from server.jobs.worker.leader import leading
from server.jobs.worker.options import WorkerSettings, parse

if TYPE_CHECKING:
    from adapters_store.store import AdapterStore

logger = logging.getLogger(__name__)

SWEEP_S = 600.0
STORE_WAIT_S = 1.0
_NICE = 5  # of tasks on this machine: above the server's


class Worker:
    """Wires the parts together. Made only by the leader."""

    def __init__(self, settings: WorkerSettings, stopping: threading.Event) -> None:
        self._settings = settings
        self._stopping = stopping
        data_dir = settings.data_dir
        self._store: AdapterStore | None = None
        self._onboarding = Onboarding.open(data_dir, database_url=settings.database_url, remote=settings.remote)
        self._jobs = self._onboarding.jobs
        trainer, gate = settings.trainer or TRAINER, settings.gate or GATE
        self._executor = executor_for(settings.jobs, num_gpus=self._num_gpus, commands=(trainer, gate))
        driver = Driver(self._jobs, self._executor, self._stopping, DriverSettings(tick_s=settings.tick_s / 2))
        steps = self._steps_with(driver, trainer, gate)
        sequences = {
            CHECK: [("validate", driver.retry_without_store(steps.validate))],
            ONBOARD: [
                ("train", driver.retry_without_store(steps.train)),
                ("gate", driver.retry_without_store(steps.gate)),
                ("publish", driver.retry_without_store(steps.publish)),
                ("activate", driver.retry_without_store(steps.activate)),
            ],
        }
        url = database_url(data_dir, settings.database_url)
        self._steps = steps
        self._sequences = DurableSequences(url, sequences, self._fail)
        self._dispatcher = Dispatcher(self._jobs, self._sequences, self._capacity(), self._executor.kind)

    def run(self) -> None:
        """Until `stopping` is set."""
        self._sequences.launch()
        sweep_s = 0.0
        while not self._stopping.wait(self._settings.tick_s):
            try:
                if time.monotonic() > sweep_s:
                    sweep_s = time.monotonic() + SWEEP_S
                    self._onboarding.sweep()
                self._dispatcher.tick()
            except StoreUnavailable as error:
                logger.warning("the store is unavailable, running jobs continue: %s", error.message)
                self._stopping.wait(STORE_WAIT_S)

    def stop_tasks(self) -> None:
        """Let every task of this machine checkpoint and end; kill those that have not when the grace period is over."""
        if self._executor.is_remote:
            return
        tasks = [task for job in self._jobs.list(statuses=(JobStatus.RUNNING,)) for task in _tasks_of(job)]
        for task in tasks:
            self._executor.stop(task)
        deadline_s = time.monotonic() + self._settings.grace_s
        for task in tasks:
            if not wait_until_ended(self._executor, task, max(0.0, deadline_s - time.monotonic())):
                self._executor.kill(task)

    def _fail(self, job_id: str, error: Exception) -> None:
        """End the job, and its process if one still runs: nothing follows it any more."""
        self._steps.fail(job_id, error)
        job = self._jobs.find(job_id)
        for task in () if job is None else _tasks_of(job):
            if self._executor.state(task).is_running:
                self._executor.kill(task)

    def _steps_with(self, driver: Driver, trainer: tuple[str, ...], gate: tuple[str, ...]) -> Steps:
        settings = self._settings
        retry = RetrySettings(first_wait_s=settings.retry_wait_s)
        training = Training(
            self._jobs,
            driver,
            retry=retry,
            threads=settings.threads,
            idle_threads=settings.idle_threads,
            trainer=trainer,
            track=settings.jobs.track,
        )
        gating = GateStep(driver, gate=gate)
        return Steps(
            jobs=self._jobs,
            open_store=self._open_store,
            training=training,
            gating=gating,
            executor=self._executor.kind,
        )

    def _open_store(self) -> AdapterStore:
        """Opened once. Two steps at the same time may each open a store; one of the two is kept."""
        from adapters_store.store import AdapterStore

        if self._store is None:
            self._store = AdapterStore.open(
                self._settings.data_dir, database_url=self._settings.database_url, remote=self._settings.remote
            )
        return self._store

    @property
    def _device(self) -> str:
        served = self._jobs.bases.last()
        return "cpu" if served is None else served.device

    def _num_gpus(self) -> int:
        return 1 if self._device == "cuda" else 0

    def _free_bytes(self, ranks: int) -> int | None:
        """What a training may take, what the resident process holds for it included. None also for other machines,
        whose scheduler knows their memory."""
        free = None if self._executor.is_remote else free_bytes(self._device, ranks)
        shared = self._executor.shared_bytes() if isinstance(self._executor, SubprocessExecutor) else 0
        return None if free is None else free + shared

    def _capacity(self) -> Capacity:
        return Capacity(
            max_running=self._settings.max_running,
            estimate=estimated_bytes,
            free=self._free_bytes,
            memory_bytes=self._settings.memory_bytes,
            advise=advice,
        )


def executor_for(
    settings: JobSettings, *, num_gpus: Callable[[], int], commands: Sequence[Sequence[str]] = ()
) -> Executor:
    """The executor of a kind. Imports only what that kind needs: Ray's and Kubernetes' clients are optional extras.

    num_gpus: that each rank of a task gets which starts now; this machine and a manifest know it themselves. commands:
    of the tasks, before their arguments; a resident process starts them if all are modules.

    Raises ModuleNotFoundError (an extra is not installed), and what the kind's own settings raise."""
    if settings.executor == RAY:
        from server.jobs.tasks.ray_jobs import RayJobExecutor

        return RayJobExecutor(settings.ray_address, num_gpus=num_gpus)
    if settings.executor == KUBERNETES:
        from server.jobs.tasks.kubernetes_jobs import KubernetesJobExecutor

        assert settings.kubernetes_template is not None
        return KubernetesJobExecutor.from_file(Path(settings.kubernetes_template))
    modules = tuple(command[-1] for command in commands if tuple(command[:-1]) == PYTHON)
    if not (modules and len(modules) == len(commands) and settings.resident_s and can_be_resident()):
        return SubprocessExecutor(_NICE)
    resident = Resident(modules, settings.resident_s, _NICE)
    resident.open()  # it imports while the worker reads its jobs
    return SubprocessExecutor(_NICE, resident)


def _tasks_of(job: Job) -> list[Task]:
    return [Task(name, job.run_dir, ()) for name in ("train", "gate")]


def work(settings: WorkerSettings, *, watch_stdin: bool = False) -> NoReturn:
    """Wait until no other worker leads, then work until SIGTERM or SIGINT, or until stdin ends. Ends the process."""
    stopping = threading.Event()
    is_working = False

    def stop(_number: int, _frame: object) -> None:
        stopping.set()
        if not is_working:
            os._exit(0)  # nothing has begun; the wait for the lock cannot be interrupted otherwise

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    if watch_stdin:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        with leading(settings.data_dir, settings.database_url, tick_s=settings.tick_s, lost=_end_at_once):
            is_working = True
            os._exit(_work(settings, stopping))
    except DBAPIError as error:
        logger.error("the database does not answer, so no worker can lead: %s", error.orig)
        os._exit(1)


def _work(settings: WorkerSettings, stopping: threading.Event) -> int:
    try:
        worker = Worker(settings, stopping)
        worker.run()
        worker.stop_tasks()
    except Exception:
        logger.exception("the job worker failed; the next worker resumes its jobs")
        return 1
    return 0


def _end_at_once() -> None:
    """Another worker may lead by now. Tasks continue; the next leader follows them."""
    logger.error("the database ended this worker's lead; the next worker resumes its jobs")
    os._exit(1)


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    settings, watch_stdin = parse(arguments, __doc__)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    work(settings, watch_stdin=watch_stdin)


if __name__ == "__main__":
    main()
