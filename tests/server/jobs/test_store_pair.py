"""Files and runs are removed only by a process whose rows are proved to be the directory's; and a job outlives an
outage of its database."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from adapters_store.errors import StoreError, StoreUnavailable
from server.jobs.service import Onboarding
from server.jobs.store.records import Job, JobStatus
from support.servers import postgres
from support.servers.job_world import JobWorld
from support.servers.old_store import make_old
from support.servers.waiting import wait_until


@pytest.fixture
def server() -> Iterator[postgres.PostgresServer]:
    with postgres.server() as server:
        yield server


@pytest.fixture
def world(tmp_path: Path, server: postgres.PostgresServer) -> Iterator[JobWorld]:
    world = JobWorld(tmp_path, database_url=server.url)
    yield world
    world.close()


def age(data_dir: Path) -> None:
    then = time.time() - 7200
    for path in data_dir.rglob("*"):
        os.utime(path, (then, then))


def kept(data_dir: Path) -> set[Path]:
    return {path for folder in ("files", "runs") for path in (data_dir / folder).rglob("*") if path.is_file()}


def test_files_and_runs_of_another_database_are_not_swept(world: JobWorld) -> None:
    """The worker that a start without the URL brought took them all within a tick."""
    world.create()
    age(world.data_dir)
    before = kept(world.data_dir)
    with pytest.raises(StoreError) as caught:
        Onboarding.open(world.data_dir)
    assert caught.value.code == "wrong_store"
    assert kept(world.data_dir) == before != set()


def test_rows_that_change_under_a_worker_end_no_job_and_remove_nothing(world: JobWorld) -> None:
    job = world.create()
    age(world.data_dir)
    before = kept(world.data_dir)
    with world.store.database.engine.begin() as connection:
        connection.execute(text("DELETE FROM jobs"))
        connection.execute(text("DELETE FROM files"))
        connection.execute(text("UPDATE store_state SET store_id = 'another'"))
    for call in (world.onboarding.sweep, world.onboarding.files.sweep, lambda: world.jobs.find(job.id)):
        with pytest.raises(StoreError) as caught:
            call()
        assert caught.value.code == "wrong_store"
    assert kept(world.data_dir) == before


def test_files_and_runs_from_before_there_were_ids_are_kept_and_worked_on(world: JobWorld) -> None:
    job = world.create()
    unknown = world.data_dir / "runs" / "ftjob-unknown"
    unknown.mkdir()
    blob = world.data_dir / "files" / "aa" / ("a" * 64)
    blob.parent.mkdir(exist_ok=True)
    blob.write_bytes(b"whose?")
    make_old(world.data_dir, world.database_url)
    age(world.data_dir)
    onboarding = Onboarding.open(world.data_dir, database_url=world.database_url)
    onboarding.sweep(grace_s=-1)
    assert onboarding.jobs.get(job.id).status is JobStatus.VALIDATING
    assert (job.run_dir / "training.jsonl").exists()
    assert unknown.exists()
    assert blob.exists(), "nothing proves whose it is"
    onboarding.close()


def test_a_job_goes_on_through_an_outage_of_its_database(world: JobWorld, server: postgres.PostgresServer) -> None:
    """It ended as failed after four tries within four seconds."""
    job = world.create(steps=60, step_s=0.05)
    worker = world.start_worker()
    world.wait(job, lambda each: each.progress.get("step", 0) >= 6)
    server.stop()
    time.sleep(8)
    server.start()
    if worker.poll() is not None:  # as its supervisor would
        world.start_worker()
    ended = world.wait_ended(job_of(world, job.id))
    assert (ended.status, ended.failure) == (JobStatus.SUCCEEDED, None)
    assert world.messages(ended).count("The job has succeeded") == 1


def job_of(world: JobWorld, job_id: str) -> Job:
    """Once the database answers again."""
    found: list[Job] = []

    def ask() -> bool:
        try:
            found.append(world.jobs.get(job_id))
        except StoreUnavailable:
            return False
        return True

    wait_until(ask)
    return found[0]
