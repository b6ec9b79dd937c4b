"""What is done to files and jobs stands in the audit log, and what is refused does not."""

from __future__ import annotations

import pytest

from adapters_store.errors import Conflict
from adapters_store.storage.audit import Actor, act_as
from server.jobs.store.records import JobFailure, JobStatus
from support.servers.job_world import JobWorld, data_lines


def test_files_and_jobs_are_written_down_with_who_changed_them(world: JobWorld) -> None:
    act_as(Actor("key:7", "req_1"))
    file = world.upload(data_lines())
    job = world.create()
    world.jobs.pause(job)
    world.jobs.resume(world.jobs.get(job.id))
    world.jobs.cancel(world.jobs.get(job.id))
    with pytest.raises(Conflict):
        world.jobs.pause(world.jobs.get(job.id))
    world.onboarding.files.delete("acme", file.id)
    entries = [entry for entry in reversed(world.store.audit.entries(tenant="acme")) if entry.actor == "key:7"]
    assert [(entry.action, entry.target) for entry in entries if entry.target in (file.id, job.id)] == [
        ("file.upload", file.id),
        ("job.create", job.id),
        ("job.pause", job.id),
        ("job.resume", job.id),
        ("job.cancel", job.id),
        ("file.delete", file.id),
    ]
    act_as(Actor("process"))


def test_an_override_is_written_down_with_its_reason(world: JobWorld) -> None:
    job = world.create()
    world.jobs.move(job, JobStatus.RUNNING, only_in=tuple(JobStatus))
    assert world.jobs.end(job, JobStatus.FAILED, JobFailure("gate_blocked", "worse than the base", None))
    world.jobs.override(world.jobs.get(job.id), by="ops", reason="the customer insists")
    newest = world.store.audit.entries(limit=1)[0]
    assert (newest.action, newest.target) == ("job.override", job.id)
    assert newest.detail == {"by": "ops", "reason": "the customer insists"}
