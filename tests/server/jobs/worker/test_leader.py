"""Many servers, one database: one worker works, and the jobs of a machine that died go on elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from sqlalchemy import text

from server.jobs.store.records import Job, JobStatus
from server.jobs.worker.leader import is_led
from server.jobs.worker.options import DATABASE_URL_VARIABLE
from support.servers import job_server
from support.servers.job_world import GATE, TRAINER, JobWorld
from support.servers.postgres import PostgresServer
from support.servers.postgres import server as postgres_server
from support.servers.waiting import wait_until

OPTIONS = ("--trainer", json.dumps(TRAINER), "--gate", json.dumps(GATE), "--tick-s", "0.05", "--retry-wait-s", "0.05")


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    with postgres_server() as server:
        yield server


@pytest.fixture
def world(tmp_path: Path, postgres: PostgresServer) -> Iterator[JobWorld]:
    world = JobWorld(tmp_path, database_url=postgres.database(f"of_{tmp_path.name.lower()}"[:60]))
    yield world
    world.close()


class Host:
    """A server on a machine of its own: a data directory that shares only the folder of runs, and its processes."""

    def __init__(self, world: JobWorld, name: str, files: ExitStack) -> None:
        self.data_dir = world.root / name
        self.data_dir.mkdir()
        (self.data_dir / "store.json").write_bytes((world.data_dir / "store.json").read_bytes())
        (self.data_dir / "runs").symlink_to(world.data_dir / "runs")
        assert world.database_url is not None
        environment = {**os.environ, DATABASE_URL_VARIABLE: world.database_url}
        command = [sys.executable, job_server.__file__, str(self.data_dir), *OPTIONS]
        self.server = subprocess.Popen(command, env=environment)
        files.callback(self.die)

    def processes(self) -> list[psutil.Process]:
        """Server, worker, launcher and trainer."""
        return psutil.Process(self.server.pid).children(recursive=True)

    def die(self) -> None:
        """As a machine does: everything at once, and nothing is cleaned up."""
        if self.server.poll() is None:
            doomed = self.processes()
            for each in doomed:
                each.kill()
            self.server.kill()
            psutil.wait_procs(doomed)
            self.server.wait()


def has_checkpoint(job: Job) -> bool:
    return int(job.progress.get("step", 0)) >= 6


def test_the_job_of_a_machine_that_dies_succeeds_once_elsewhere_from_its_checkpoint(world: JobWorld) -> None:
    with ExitStack() as files:
        first = Host(world, "first", files)
        job = world.create(steps=60, step_s=0.05)
        world.wait(job, has_checkpoint)
        second = Host(world, "second", files)
        wait_until(lambda: second.server.poll() is None)
        assert second.processes() == [], "a second worker was started beside the leader"
        first.die()
        ended = world.wait_ended(job)
    assert (ended.status, ended.executor) == (JobStatus.SUCCEEDED, "subprocess"), ended.failure
    assert [each.digest for each in world.store.versions("acme", "style")] == [ended.adapter_digest]
    assert world.messages(ended).count("The job has succeeded") == 1
    steps = [json.loads(line)["step"] for line in (ended.run_dir / "events.jsonl").open() if '"type": "step"' in line]
    assert steps.count(1) == 1, "the second machine began again instead of at a checkpoint"
    assert str(second.data_dir) in (ended.run_dir / "request.yaml").read_text(), "it trained on the paths of the first"


def test_a_worker_that_lost_its_connection_ends_and_the_next_one_follows_its_trainer(
    world: JobWorld, postgres: PostgresServer
) -> None:
    job = world.create(steps=60, step_s=0.05)
    worker = world.start_worker()
    world.wait(job, has_checkpoint)
    trainer = json.loads((job.run_dir / "train.pid").read_text())
    postgres.execute("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 1")
    assert worker.wait(300) == 1
    os.killpg(trainer["group"], 0)
    assert not is_led(world.onboarding.database, world.data_dir)
    world.start_worker()
    assert world.wait_ended(job).status is JobStatus.SUCCEEDED
    assert json.loads((job.run_dir / "train.pid").read_text()) == trainer, "the training was started twice"


def test_a_second_worker_waits_and_a_signal_ends_its_wait(world: JobWorld) -> None:
    holders = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted"
    asked = "SELECT pid FROM pg_stat_activity WHERE query LIKE 'SELECT pg_try_advisory_lock%'"
    # the server's other databases may have a leader too, which ends
    holders += " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    asked += " AND datname = current_database()"
    with world.store.database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        first = world.start_worker()
        wait_until(lambda: connection.execute(text(holders)).first())
        second = world.start_worker()
        wait_until(lambda: connection.execute(text(f"{asked} AND pid NOT IN ({holders})")).first())
    second.send_signal(signal.SIGTERM)
    assert second.wait(300) == 0
    assert first.poll() is None
    first.terminate()
    first.wait()
