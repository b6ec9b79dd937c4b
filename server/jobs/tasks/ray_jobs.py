"""Runs tasks as jobs of a Ray cluster. Needs `multilora[ray]`, and the run folder at the same path on every node.

NAME.ray in the run folder holds the submission id. It is written before the job is submitted, and Ray refuses a second
job of the same id: a worker that is killed in between leaves one job or none.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

from ray.dashboard.modules.job.common import JobStatus
from ray.job_submission import JobSubmissionClient

from adapters_store.filesystem import Filesystem
from server.jobs.settings import RAY
from server.jobs.tasks.executor import ExecutorUnavailable, Task, TaskState

_STOP_GRACE_S = "60"  # Ray's own 3 s are too few for a checkpoint
_NO_JOB = "does not exist"  # Ray's client raises RuntimeError for any answer but 200
_REFUSED = re.compile(r"status code 4\d\d")  # the head passes an agent's refusal on as a 500 that quotes it
_TRAIN = ("-P", "-m", "server.jobs.tasks.ray_train")


class RayJobExecutor:
    """address: of the cluster's job server. num_gpus: for each rank of a task, asked at its start."""

    kind, is_remote = RAY, True

    def __init__(self, address: str, *, num_gpus: Callable[[], int] = lambda: 0) -> None:
        self._address = address
        self._num_gpus = num_gpus
        self._connected: JobSubmissionClient | None = None

    def start(self, task: Task) -> None:
        """Raises RuntimeError (Ray refuses the job), OSError, and as `state`."""
        if self.state(task).is_running:
            return
        known = task.remembered(RAY)
        submission = known if known is not None and self._details(known) is None else uuid4().hex
        Filesystem().write_atomic(task.file(RAY), submission.encode())
        with _reached():
            self._client.submit_job(
                entrypoint=f"{shlex.join(_command(task))} >> {shlex.quote(str(task.file('log')))} 2>&1",
                submission_id=submission,
                entrypoint_num_gpus=self._num_gpus() * task.ranks if task.nodes == 1 else 0,
                runtime_env={"env_vars": {**task.environment, "RAY_JOB_STOP_WAIT_TIME_S": _STOP_GRACE_S}},
                metadata={"multilora_run": task.folder.name, "multilora_task": task.name},
            )

    def state(self, task: Task) -> TaskState:
        """Raises ExecutorUnavailable."""
        submission = task.remembered(RAY)
        details = None if submission is None else self._details(submission)
        if details is None:
            return TaskState(is_running=False)
        if not details.status.is_terminal():
            return TaskState(is_running=True)
        return TaskState(is_running=False, exit_code=_exit_code(details))

    def stop(self, task: Task) -> None:
        self._end(task)

    def kill(self, task: Task) -> None:
        """Ray has one way to end a job: SIGTERM, then SIGKILL."""
        self._end(task)

    def _end(self, task: Task) -> None:
        submission = task.remembered(RAY)
        if submission is not None and self.state(task).is_running:
            with _reached():
                self._client.stop_job(submission)

    def _details(self, submission: str) -> Any:
        """None: the cluster knows no such job."""
        try:
            with _reached():
                return self._client.get_job_info(submission)
        except RuntimeError as error:
            if _NO_JOB not in str(error):
                raise ExecutorUnavailable(str(error)) from error
            return None

    @property
    def _client(self) -> JobSubmissionClient:
        if self._connected is None:
            self._connected = JobSubmissionClient(self._address)
        return self._connected


def _command(task: Task) -> tuple[str, ...]:
    """One machine: as here. Several: a driver that lets Ray Train start the ranks where there is room."""
    if task.nodes == 1:
        return task.on_one_node
    counts = ("--nodes", str(task.nodes), "--ranks", str(task.ranks), "--")
    return (sys.executable, *_TRAIN, *counts, *task.command)


@contextmanager
def _reached() -> Iterator[None]:
    """ExecutorUnavailable if the job server cannot be reached (builtin and requests' errors alike are OSErrors) or
    cannot do it now: a cluster whose agents are still starting answers 500. A RuntimeError that stays is a refusal."""
    try:
        yield
    except OSError as error:
        raise ExecutorUnavailable(f"Ray's job server: {error}") from error
    except RuntimeError as error:
        if _REFUSED.search(str(error)):
            raise
        raise ExecutorUnavailable(f"Ray's job server: {str(error)[:300]}") from error


def _exit_code(details: Any) -> int | None:
    """As a subprocess has it: negative for a signal, which the shell reports as 128 and more."""
    code = 0 if details.status is JobStatus.SUCCEEDED else details.driver_exit_code
    return 128 - code if code is not None and code > 128 else code
