"""The training step: `python -m trainer` to its end, through kills, pauses and failures. Decides what each exit means.

The run's folder tells everything: events.jsonl (news), control (what is wanted), result.json (it is done), train.exit
(how the last process ended), failures.json (how often it failed without getting further).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from server.jobs.steps.run_events import RunEvents
from server.jobs.store.job_store import JobStore
from server.jobs.store.records import Job, JobFailure
from server.jobs.tasks.driver import Asked, Driver, News, TaskEnd
from server.jobs.tasks.executor import Task

SUCCEEDED, FAILED, BAD_INPUT, PAUSED, CANCELLED = range(5)
NOT_CURED_BY_TIME = frozenset({"out_of_memory", "disk_full"})
TRAINER_KILLED = "trainer_killed"
SPEC_FILE = "request.yaml"
TRAINER = (sys.executable, "-P", "-m", "trainer")  # -P: no module of the current folder is taken
Outcome = Literal["done", "failed", "paused", "cancelled", "gone"]


@dataclass(frozen=True, kw_only=True)
class RetrySettings:
    """attempts: in a row that end no further than the one before. Waits double from first_wait_s to longest_wait_s."""

    attempts: int = 3
    first_wait_s: float = 1.0
    longest_wait_s: float = 30.0

    def wait_s(self, failures: int) -> float:
        return float(min(self.longest_wait_s, self.first_wait_s * 2.0 ** (failures - 1)))


class Training:
    """trainer: the command before its arguments. threads: CPU threads of a training (None: as many as it takes)."""

    def __init__(
        self,
        jobs: JobStore,
        driver: Driver,
        *,
        retry: RetrySettings | None = None,
        trainer: tuple[str, ...] = TRAINER,
        threads: int | None = None,
    ) -> None:
        self._jobs = jobs
        self._driver = driver
        self._retry = retry or RetrySettings()
        self._trainer = trainer
        self._environment = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}

    def run(self, job: Job) -> tuple[Outcome, JobFailure | None]:
        """Train until it is decided. Safe to call again at any moment of an earlier call that was cut off."""
        while not has_succeeded(job.run_dir):
            end = self._attempt(job)
            outcome, failure = self._judge(job, end)
            if outcome is not None:
                return outcome, failure
        return "done", None

    def _attempt(self, job: Job) -> TaskEnd:
        """One process, or the rest of one that runs; or, where one has ended and nobody looked, how that ended."""
        task = self._task(job)
        before = self._driver.executor.state(task)
        current = self._jobs.find(job.id)
        asked: Asked = "gone" if current is None else current.wanted
        if not before.is_running and (asked != "run" or before.exit_code == BAD_INPUT):
            return TaskEnd(before.exit_code, asked)
        events = RunEvents(job.run_dir / "events.jsonl")
        if not before.is_running:
            _tell(job.run_dir, "run")

        def news() -> News:
            told = events.news()
            return {"progress": events.progress} if events.progress else {}, told

        return self._driver.drive(job, task, news=news, ask=lambda wanted: _tell(job.run_dir, wanted))

    def _task(self, job: Job) -> Task:
        folder = job.run_dir
        resume = ("--resume",) if (folder / "events.jsonl").exists() else ()
        command = (*self._trainer, str(folder / SPEC_FILE), "--run-dir", str(folder), *resume)
        return Task("train", folder, command, self._environment)

    def _judge(self, job: Job, end: TaskEnd) -> tuple[Outcome | None, JobFailure | None]:
        """None: try again."""
        code, asked = end.exit_code, end.asked
        if asked == "gone":
            return "gone", None
        if has_succeeded(job.run_dir):
            return "done", None
        if code == BAD_INPUT:
            return "failed", failure_in(job.run_dir) or JobFailure("bad_input", "the trainer refused the job")
        if asked != "run":
            return ("cancelled" if asked == "cancel" else "paused"), None
        if code in (PAUSED, CANCELLED):
            return None, None  # asked by somebody, and taken back, or the worker was stopped
        return self._failed(job, code)

    def _failed(self, job: Job, code: int | None) -> tuple[Outcome | None, JobFailure | None]:
        failure = (failure_in(job.run_dir) if code == FAILED else None) or _unexplained(code)
        count = _count_failure(job.run_dir)
        if failure.code in NOT_CURED_BY_TIME or count >= self._retry.attempts:
            return "failed", failure
        wait_s = self._retry.wait_s(count)
        text = f"Training failed ({failure.message}); it goes on from the last checkpoint in {wait_s:g} s"
        self._jobs.note(job, f"retry:{_step_of(job.run_dir)}:{count}", text, level="warn", code=failure.code)
        self._driver.wait(wait_s)
        return None, None


def has_succeeded(run_dir: Path) -> bool:
    return result_of(run_dir).get("status") == "succeeded"


def result_of(run_dir: Path) -> Mapping[str, Any]:
    """result.json; empty where the run has none yet."""
    try:
        body = json.loads((run_dir / "result.json").read_text())
    except FileNotFoundError:
        return {}
    return body if isinstance(body, dict) else {}


def failure_in(run_dir: Path) -> JobFailure | None:
    """What result.json or the last event says went wrong."""
    events = RunEvents(run_dir / "events.jsonl")
    events.news()
    for source in (result_of(run_dir), events.last):
        error = source.get("error")
        if isinstance(error, dict) and error.get("code"):
            return JobFailure(str(error["code"]), str(error.get("message", "")), error.get("param"))
    return None


def _unexplained(code: int | None) -> JobFailure:
    if code is None:
        return JobFailure("trainer_lost", "the training process is gone and left no exit code")
    if code < 0:
        text = f"the training process was killed by signal {-code}; out of memory is a usual cause"
        return JobFailure(TRAINER_KILLED, text)
    return JobFailure("trainer_failed", f"the training process ended with exit code {code}")


def _tell(run_dir: Path, asked: Asked) -> None:
    """The trainer looks for this file at every step."""
    control = run_dir / "control"
    if asked in ("run", "gone"):
        control.unlink(missing_ok=True)
        return
    scratch = run_dir / ".control"
    scratch.write_text(asked)
    os.replace(scratch, control)


def _step_of(run_dir: Path) -> int:
    """The newest checkpoint's step; 0 without one."""
    steps = [int(folder.name.removeprefix("step-")) for folder in (run_dir / "checkpoints").glob("step-*[0-9]")]
    return max(steps, default=0)


def _count_failure(run_dir: Path) -> int:
    """One more; from 1 again where the run has got further since the last."""
    path, step = run_dir / "failures.json", _step_of(run_dir)
    try:
        before = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        before = {"step": -1, "count": 0}
    count = before["count"] + 1 if before["step"] == step else 1
    scratch = run_dir / ".failures"
    scratch.write_text(json.dumps({"step": step, "count": count}))
    os.replace(scratch, path)
    return int(count)
