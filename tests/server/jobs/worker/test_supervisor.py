"""Beside a server a worker runs when there is something to do, and again when it has died."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters_store.remote.settings import URL_VARIABLE
from server.jobs.limits import JobLimits
from server.jobs.store.records import JobStatus
from server.jobs.worker.options import DATABASE_URL_VARIABLE
from server.jobs.worker.supervisor import SupervisorSettings, WorkerSupervisor
from support.servers.job_world import GATE, TRAINER, JobWorld
from support.servers.waiting import wait_until

OPTIONS = ("--trainer", json.dumps(TRAINER), "--gate", json.dumps(GATE), "--tick-s", "0.05")


@pytest.fixture
def supervisor(world: JobWorld) -> Iterator[WorkerSupervisor]:
    supervisor = WorkerSupervisor(world.onboarding, SupervisorSettings(options=OPTIONS, look_s=0.05, waits_s=(0.0,)))
    supervisor.start()
    yield supervisor
    supervisor.stop()


def test_no_job_no_worker_and_a_dead_one_is_replaced(world: JobWorld, supervisor: WorkerSupervisor) -> None:
    time.sleep(0.3)
    assert supervisor.worker is None
    job = world.create(steps=40, step_s=0.05)
    world.wait(job, lambda each: each.progress.get("step", 0) >= 1)
    assert supervisor.worker is not None
    first = supervisor.worker.pid
    supervisor.worker.kill()
    assert world.wait_ended(job).status is JobStatus.SUCCEEDED
    assert supervisor.worker is not None
    assert supervisor.worker.pid != first


def test_a_worker_that_cannot_be_started_is_started_later(
    world: JobWorld, supervisor: WorkerSupervisor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(sys, "executable", str(world.root / "missing"))
        job = world.create()
        wait_until(lambda: "cannot check for jobs" in caplog.text)
    assert world.wait_ended(job).status is JobStatus.SUCCEEDED


def test_where_another_works_already_none_is_started(world: JobWorld, supervisor: WorkerSupervisor) -> None:
    world.start_worker()
    wait_until((world.data_dir / "jobs.db").exists)
    assert world.wait_ended(world.create()).status is JobStatus.SUCCEEDED
    assert supervisor.worker is None


def test_the_worker_is_on_the_supervisors_store_whatever_the_environment_says(
    world: JobWorld, supervisor: WorkerSupervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DATABASE_URL_VARIABLE, "postgresql+psycopg://nobody@127.0.0.1:1/nowhere")
    monkeypatch.setenv(URL_VARIABLE, "s3://nowhere/blobs")
    assert world.wait_ended(world.create()).status is JobStatus.SUCCEEDED
    assert supervisor.worker is not None


def test_the_worker_runs_as_many_as_the_limits_say_and_takes_no_more_memory(tmp_path: Path) -> None:
    world = JobWorld(tmp_path, limits=JobLimits(max_running=2, memory_bytes=1 << 20))
    supervisor = WorkerSupervisor(world.onboarding, SupervisorSettings(options=OPTIONS, look_s=0.05))
    supervisor.start()
    try:
        refused = world.wait_ended(world.create())
        assert refused.failure is not None
        assert refused.failure.code == "out_of_memory"
        assert supervisor.worker is not None
        arguments = list(map(str, supervisor.worker.args))  # type: ignore[call-overload]
        assert arguments[arguments.index("--max-running") + 1] == "2"
    finally:
        supervisor.stop()
        world.close()
