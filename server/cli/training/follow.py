"""Follows a job to its end and shows its progress; starts a worker if none runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from server.cli.common.output import Output
from server.jobs.service import Onboarding
from server.jobs.store.records import Job, JobStatus
from server.jobs.worker.supervisor import SupervisorSettings, WorkerSupervisor

_POLL_S = 0.2


class JobScreen(Protocol):
    """What shows a job while it runs."""

    def say(self, text: str) -> None:
        """One of its messages."""

    def show(self, job: Job) -> None:
        """The job as it is now, several times a second."""


def follow(onboarding: Onboarding, job: Job, output: Output, screen_of: ScreenOf | None = None) -> Job:
    """Returns the job when it has ended or paused. screen_of: how it is shown; a progress bar by default."""
    with _a_worker(onboarding), (screen_of or _screen)(output) as screen:
        seen = 0
        while True:
            current = onboarding.jobs.get(job.id)
            for event in reversed(onboarding.jobs.events(current)):
                if event.number > seen:
                    seen = event.number
                    if event.type == "message":
                        screen.say(event.message)
            screen.show(current)
            if current.status.has_ended or current.status is JobStatus.PAUSED:
                return current
            time.sleep(_POLL_S)


ScreenOf = Callable[[Output], AbstractContextManager[JobScreen]]


@contextmanager
def _a_worker(onboarding: Onboarding) -> Iterator[None]:
    """A running server's worker, or our own; a lock lets only one of them work."""
    supervisor = WorkerSupervisor(onboarding, SupervisorSettings(look_s=0.1, serves=False))
    supervisor.start()
    try:
        yield
    finally:
        supervisor.stop()


class _Screen:
    """A line per event, and on a terminal a progress bar."""

    def __init__(self, output: Output, bar: Progress | None) -> None:
        self._output = output
        self._bar = bar
        self._task = None if bar is None else bar.add_task("waiting", total=None, loss="")

    def say(self, text: str) -> None:
        self._output.say(text, style="dim")

    def show(self, job: Job) -> None:
        if self._bar is None or self._task is None:
            return
        progress: dict[str, Any] = dict(job.progress)
        loss = progress.get("loss")
        self._bar.update(
            self._task,
            description=job.status.value,
            total=progress.get("num_steps"),
            completed=progress.get("step", 0),
            loss="" if loss is None else f"loss {loss:.3f}",
        )


@contextmanager
def _screen(output: Output) -> Iterator[JobScreen]:
    if not output.is_live:
        yield _Screen(output, None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    loss = TextColumn("{task.fields[loss]}")
    with Progress(*columns, loss, TimeRemainingColumn(), console=output.console, transient=True) as bar:
        yield _Screen(output, bar)
