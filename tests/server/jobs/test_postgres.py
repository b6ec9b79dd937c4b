"""The same tables and the same durable steps on a real PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from server.jobs.store.records import JobStatus
from support.servers import postgres
from support.servers.job_world import JobWorld


@pytest.fixture
def world(tmp_path: Path) -> Iterator[JobWorld]:
    with postgres.running() as url:
        world = JobWorld(tmp_path, database_url=url)
        yield world
        world.close()


def test_a_killed_workers_job_is_gone_on_with_and_registered_once(world: JobWorld) -> None:
    jobs = [world.create(tenant, steps=40, step_s=0.05) for tenant in ("acme", "globex")]
    world.start_worker("--max-running", "2")
    for job in jobs:
        world.wait(job, lambda each: each.progress.get("step", 0) >= 6)
    world.kill_worker()
    world.start_worker("--max-running", "2")
    ended = [world.wait_ended(job) for job in jobs]
    assert [each.status for each in ended] == [JobStatus.SUCCEEDED] * 2, [each.failure for each in ended]
    for job in ended:
        assert [each.digest for each in world.store.versions(job.tenant, "style")] == [job.adapter_digest]
        assert world.messages(job).count("The job has succeeded") == 1
    assert not (world.data_dir / "jobs.db").exists(), "the durable steps are on the store's own database"
    assert not (world.data_dir / "multilora.db").exists()
