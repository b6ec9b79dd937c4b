"""The training step: `python -m trainer` to its end, through kills, pauses and failures. Decides what each exit means.

All state is in the run's folder: see trainer.run_folder.folder; and train.exit (how the last process ended),
failures.json (how often in a row the training failed without progress).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from adapters_store.storage.blobs import disk_full_is_an_answer
from server.jobs.steps.run_events import RunEvents
from server.jobs.store.job_store import JobStore
from server.jobs.store.records import Job, JobFailure
from server.jobs.tasks.driver import DesiredState, Driver, TaskEnd, Update
from server.jobs.tasks.executor import Task
from server.jobs.tasks.resident import PYTHON
from trainer.run_folder.events import EventReader, read_events
from trainer.run_folder.folder import Exit, RunFolder, as_json
from trainer.spec import TrainSpec

NOT_CURED_BY_TIME = frozenset({"out_of_memory", "disk_full"})
TRAINER_KILLED = "trainer_killed"
SPEC_FILE = "request.yaml"
TRAINER = (*PYTHON, "trainer")
Outcome = Literal["done", "failed", "paused", "cancelled", "gone"]


@dataclass(frozen=True, kw_only=True)
class RetrySettings:
    """attempts: failures in a row without progress. The wait doubles from first_wait_s up to longest_wait_s."""

    attempts: int = 3
    first_wait_s: float = 1.0
    longest_wait_s: float = 30.0

    def wait_s(self, failures: int) -> float:
        return float(min(self.longest_wait_s, self.first_wait_s * 2.0 ** (failures - 1)))


class Training:
    """trainer: the command before its arguments. threads: CPU threads of a training (None: its own choice).
    idle_threads: while nothing else works on its machine (None: the same). track: the trackers
    that trainings are shown in."""

    def __init__(
        self,
        jobs: JobStore,
        driver: Driver,
        *,
        retry: RetrySettings | None = None,
        trainer: tuple[str, ...] = TRAINER,
        threads: int | None = None,
        idle_threads: int | None = None,
        track: Sequence[str] = (),
    ) -> None:
        self._jobs = jobs
        self._driver = driver
        self._retry = retry or RetrySettings()
        self._trainer = trainer
        self._track = tuple(word for name in track for word in ("--track", name))
        self._environment = _threads_for(threads, idle_threads)

    def run(self, job: Job) -> tuple[Outcome, JobFailure | None]:
        """Train until the outcome is decided. Safe to call again after an earlier call was cut off anywhere."""
        while not RunFolder(job.run_dir).has_succeeded:
            end = self._attempt(job)
            outcome, failure = self._judge(job, end)
            if outcome is not None:
                return outcome, failure
        return "done", None

    def _attempt(self, job: Job) -> TaskEnd:
        """Run one process to its end: a new one, or one that still runs. One that ended unseen is taken as it ended."""
        task = self._task(job)
        before = self._driver.executor.state(task)
        current = self._jobs.find(job.id)
        desired: DesiredState = "gone" if current is None else current.wanted
        if not before.is_running and (desired != "run" or before.exit_code == Exit.BAD_INPUT):
            return TaskEnd(before.exit_code, desired)
        events, folder = RunEvents(EventReader(job.run_dir)), RunFolder(job.run_dir)
        if not before.is_running:
            write_spec(job, SPEC_FILE)  # with this host's paths: the run may have begun on another
            folder.request("")

        def update() -> Update:
            entries = events.new_entries()
            return {"progress": events.progress} if events.progress else {}, entries

        def request(state: DesiredState) -> None:
            folder.request("" if state in ("run", "gone") else state)

        return self._driver.run_to_end(job, task, update=update, request=request)

    def _task(self, job: Job) -> Task:
        folder = job.run_dir
        resume = ("--resume",) if RunFolder(folder).has_begun else ()
        command = (*self._trainer, str(folder / SPEC_FILE), "--run-dir", str(folder), *resume, *self._track)
        return Task("train", folder, command, self._environment, nodes=job.nodes, ranks=job.ranks)

    def _judge(self, job: Job, end: TaskEnd) -> tuple[Outcome | None, JobFailure | None]:
        """None: try again."""
        code, desired = end.exit_code, end.desired
        if desired == "gone":
            return "gone", None
        if job.nodes * job.ranks > 1:
            code = RunFolder(job.run_dir).result().get("exit_code", code)  # torchrun's own says only that a rank failed
        if RunFolder(job.run_dir).has_succeeded:
            return "done", None
        if code == Exit.BAD_INPUT:
            return "failed", failure_in(job.run_dir) or JobFailure("bad_input", "the trainer refused the job")
        if desired != "run":
            return ("cancelled" if desired == "cancel" else "paused"), None
        if code in (Exit.PAUSED, Exit.CANCELLED):
            return None, None  # the request was withdrawn, or the worker was stopped
        return self._failed(job, code)

    def _failed(self, job: Job, code: int | None) -> tuple[Outcome | None, JobFailure | None]:
        failure = (failure_in(job.run_dir) if code == Exit.FAILED else None) or _unexplained(code)
        count = _count_failure(job.run_dir)
        if failure.code in NOT_CURED_BY_TIME or count >= self._retry.attempts:
            return "failed", failure
        wait_s = self._retry.wait_s(count)
        text = f"Training failed ({failure.message}); it resumes from the last checkpoint in {wait_s:g} s"
        self._jobs.note(job, f"retry:{_step_of(job.run_dir)}:{count}", text, level="warn", code=failure.code)
        self._driver.wait(wait_s)
        return None, None


def _threads_for(threads: int | None, idle_threads: int | None) -> dict[str, str]:
    if threads is None:
        return {}
    if idle_threads is None or idle_threads <= threads:
        return {"OMP_NUM_THREADS": str(threads)}
    return {"OMP_NUM_THREADS": str(idle_threads), "MULTILORA_BUSY_THREADS": str(threads)}


def write_spec(job: Job, name: str) -> None:
    """The job's spec, with this host's paths. Raises SpecError, StoreError (disk_full), OSError."""
    folder = RunFolder(job.run_dir)
    with disk_full_is_an_answer():
        folder.write(folder.path / name, TrainSpec.from_mapping(job.spec).to_yaml().encode())


def failure_in(run_dir: Path) -> JobFailure | None:
    """The error in result.json, or in the last event."""
    *_, last = ({}, *read_events(run_dir))
    for source in (RunFolder(run_dir).result(), last):
        error = source.get("error")
        if isinstance(error, dict) and error.get("code"):
            return JobFailure(str(error["code"]), str(error.get("message", "")), error.get("param"))
    return None


def _unexplained(code: int | None) -> JobFailure:
    if code is None:
        return JobFailure("trainer_lost", "the training process disappeared without an exit code")
    if code < 0:
        text = f"the training process was killed by signal {-code}; out of memory is a common cause"
        return JobFailure(TRAINER_KILLED, text)
    return JobFailure("trainer_failed", f"the training process exited with code {code}")


def _step_of(run_dir: Path) -> int:
    """The newest checkpoint's step; 0 without one."""
    return max(RunFolder(run_dir).checkpoint_steps(), default=0)


def _count_failure(run_dir: Path) -> int:
    """One more; 1 if the run has made progress since the last failure."""
    path, step = run_dir / "failures.json", _step_of(run_dir)
    try:
        before = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        before = {"step": -1, "count": 0}
    count = before["count"] + 1 if before["step"] == step else 1
    RunFolder(run_dir).write(path, as_json({"step": step, "count": count}))
    return int(count)
