"""Publish and activate, cut off or refused anywhere: one registration, or none."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from adapters_store.filesystem import Filesystem
from adapters_store.store import AdapterStore
from server.jobs.steps.onboarding import Steps
from server.jobs.store.records import Job, JobStatus
from support.models.adapter_files import config_bytes, lora_tensors, safetensors_bytes
from support.servers.job_world import JobWorld


class FullDisk(Filesystem):
    """Nothing more can be put in place."""

    def rename(self, source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def steps(world: JobWorld, store: AdapterStore | None = None) -> Steps:
    """The last two steps need neither training nor gate."""
    none: Any = None
    return Steps(jobs=world.jobs, open_store=lambda: store or world.store, training=none, gating=none)


@pytest.fixture
def trained(world: JobWorld) -> Job:
    """A running job whose adapter is ready."""
    job = world.create()
    for status, before in ((JobStatus.QUEUED, JobStatus.VALIDATING), (JobStatus.RUNNING, JobStatus.QUEUED)):
        assert world.jobs.move(job, status, only_in=(before,))
    folder = job.run_dir / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes(config_bytes())
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(lora_tensors(world.base)))
    return world.jobs.get(job.id)


def versions(world: JobWorld) -> list[tuple[int, bool]]:
    return [(each.version, each.active) for each in world.store.versions("acme", "style")]


def test_published_it_is_not_active_before_the_last_step(world: JobWorld, trained: Job) -> None:
    assert steps(world).publish(trained.id)
    assert versions(world) == [(1, False)]
    assert world.jobs.get(trained.id).model_id is None
    assert steps(world).activate(trained.id)
    assert versions(world) == [(1, True)]
    assert world.jobs.get(trained.id).status is JobStatus.SUCCEEDED


def test_done_again_after_being_cut_off_it_registers_once(world: JobWorld, trained: Job) -> None:
    """Cut off between the store's commit and the job's row, and between the two steps' ends and their records."""
    assert steps(world).publish(trained.id)
    world.jobs.record(trained, {"adapter_digest": None, "adapter_version": None})
    for _ in range(2):
        assert steps(world).publish(trained.id)
    assert steps(world).activate(trained.id)
    assert not steps(world).activate(trained.id), "an ended job was activated again"
    assert versions(world) == [(1, True)]


def test_a_full_disk_fails_the_job_and_registers_nothing(world: JobWorld, trained: Job) -> None:
    store = AdapterStore.open(world.data_dir, files=FullDisk())
    assert not steps(world, store).publish(trained.id)
    store.close()
    failure = world.jobs.get(trained.id).failure
    assert failure is not None
    assert failure.code == "disk_full"
    assert versions(world) == []


def test_an_adapter_the_store_refuses_fails_the_job_with_its_code(world: JobWorld, trained: Job) -> None:
    (trained.run_dir / "adapter" / "adapter_model.safetensors").write_bytes(b"\x80\x04pickle")
    assert not steps(world).publish(trained.id)
    failed = world.jobs.get(trained.id)
    assert failed.status is JobStatus.FAILED
    assert cast(Any, failed.failure).code == "pickle"
    assert versions(world) == []


@pytest.mark.parametrize(("ask", "status"), [("cancel", JobStatus.CANCELLED), ("pause", JobStatus.PAUSED)])
def test_a_wish_that_comes_before_publish_is_kept(world: JobWorld, trained: Job, ask: str, status: JobStatus) -> None:
    wish: Callable[[Job], Job] = getattr(world.jobs, ask)
    wish(trained)
    assert not steps(world).publish(trained.id)
    assert world.jobs.get(trained.id).status is status
    assert versions(world) == []


def test_an_adapter_deleted_before_it_is_active_fails_the_job(world: JobWorld, trained: Job) -> None:
    assert steps(world).publish(trained.id)
    world.store.delete("acme", "style")
    assert not steps(world).activate(trained.id)
    assert cast(Any, world.jobs.get(trained.id).failure).code == "adapter_deleted"


def test_a_disk_that_is_full_at_validation_fails_the_job_with_its_code(
    world: JobWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    job = world.create()
    monkeypatch.setattr(Filesystem, "write_atomic", full)
    assert not steps(world).validate(job.id)
    assert cast(Any, world.jobs.get(job.id).failure).code == "disk_full"
