"""Uploaded files: kept once, owned apart, limited by tenant, and whole or not there at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from adapters_store.errors import BlobDamaged, NotFound, StoreError
from adapters_store.filesystem import Filesystem
from server.jobs.limits import JobLimit, JobLimits, JobRefused
from server.jobs.store.data_files import FileStore
from support.servers.job_world import JobWorld


def blobs(world: JobWorld) -> list[Path]:
    return [path for path in (world.data_dir / "files").glob("??/*") if path.is_file()]


def staged(world: JobWorld) -> list[Path]:
    return list((world.data_dir / "files" / "staging").iterdir())


class FailsAt(Filesystem):
    """A disk that is full from the n-th operation on."""

    def __init__(self, operation: str) -> None:
        self.operation = operation

    def copy(self, source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:3])
        self._fail("copy")
        super().copy(source, target)

    def sync_file(self, path: Path) -> None:
        self._fail("sync_file")
        super().sync_file(path)

    def rename(self, source: Path, target: Path) -> None:
        self._fail("rename")
        super().rename(source, target)

    def _fail(self, operation: str) -> None:
        if operation == self.operation:
            raise OSError(errno.ENOSPC, "No space left on device")


def test_equal_bytes_are_kept_once_and_go_with_their_last_owner(world: JobWorld) -> None:
    mine, yours = world.upload(b"same\n", "acme"), world.upload(b"same\n", "globex")
    assert len(blobs(world)) == 1
    world.onboarding.files.delete("acme", mine.id)
    assert world.onboarding.files.path(yours).read_bytes() == b"same\n"
    world.onboarding.files.delete("globex", yours.id)
    assert blobs(world) == []


def test_another_tenants_file_is_unknown(world: JobWorld) -> None:
    file = world.upload(b"secret\n", "acme")
    for call in (world.onboarding.files.get, world.onboarding.files.delete):
        with pytest.raises(NotFound) as refused:
            call("globex", file.id)
        assert refused.value.code == "file_not_found"
    assert world.onboarding.files.list("globex") == []
    assert world.onboarding.files.get(None, file.id) == file


def test_a_tenants_bytes_and_files_are_limited_and_others_are_not_touched(world: JobWorld) -> None:
    limits = JobLimits(max_file_bytes=10, max_tenant_bytes=15, max_tenant_files=3)
    store = FileStore(world.store.database, world.data_dir, limits)
    source = world.root / "source"

    def add(count: int, tenant: str = "acme") -> None:
        source.write_bytes(b"x" * count)
        store.add(tenant=tenant, filename="f", purpose="fine-tune", source=source)

    with pytest.raises(JobRefused, match="at most 10 bytes, got 11"):
        add(11)
    add(10)
    with pytest.raises(JobLimit, match="limit of 15"):
        add(6)
    add(6, "globex")
    add(1)
    add(1)
    with pytest.raises(JobLimit, match="the limit is 3"):
        add(1)


@pytest.mark.parametrize("operation", ["copy", "sync_file", "rename"])
def test_a_full_disk_is_an_answer_and_leaves_nothing(world: JobWorld, operation: str) -> None:
    store = FileStore(world.store.database, world.data_dir, JobLimits(), FailsAt(operation))
    source = world.root / "source"
    source.write_bytes(b"data\n")
    with pytest.raises(StoreError) as refused:
        store.add(tenant="acme", filename="f", purpose="fine-tune", source=source)
    assert refused.value.code == "disk_full"
    assert (store.list("acme"), blobs(world), staged(world)) == ([], [], [])


def test_a_sweep_takes_what_killed_uploads_left_and_nothing_else(world: JobWorld) -> None:
    kept = world.upload(b"kept\n")
    (world.data_dir / "files" / "staging" / "half").write_bytes(b"ha")
    orphan = world.data_dir / "files" / "ab" / ("ab" + "0" * 62)
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"no row")
    assert world.onboarding.files.sweep(grace_s=-1) == 2
    assert world.onboarding.files.path(kept).read_bytes() == b"kept\n"


def test_a_job_keeps_its_data_when_the_file_goes(world: JobWorld) -> None:
    job = world.create()
    (file,) = world.onboarding.files.list("acme")
    data = world.onboarding.files.path(file).read_bytes()
    world.onboarding.files.delete("acme", file.id)
    assert (job.run_dir / "training.jsonl").read_bytes() == data


def test_missing_bytes_are_named_and_the_file_is_healed_by_another_upload(world: JobWorld) -> None:
    file = world.upload(b"some lines\n")
    world.onboarding.files.path(file).unlink()
    with pytest.raises(BlobDamaged, match=file.id) as missing:
        world.onboarding.files.present_path(file)
    assert (missing.value.code, missing.value.param) == ("blob_missing", "file_id")
    world.upload(b"some lines\n", "globex")
    assert world.onboarding.files.present_path(file).read_bytes() == b"some lines\n"


def test_bytes_that_changed_on_the_disk_are_never_used(world: JobWorld) -> None:
    files, file = world.onboarding.files, world.upload(b"some lines\n")
    files.path(file).write_bytes(b"some LINES\n")
    with pytest.raises(BlobDamaged, match=file.id) as damaged:
        files.present_path(file)
    assert damaged.value.code == "blob_damaged"
    with pytest.raises(BlobDamaged):
        files.link(file, world.root / "job.jsonl")
    assert not (world.root / "job.jsonl").exists()
    world.upload(b"some lines\n", "globex")  # a copy of the same bytes heals both
    files.link(file, world.root / "job.jsonl")
    assert (world.root / "job.jsonl").read_bytes() == b"some lines\n"
    assert len(blobs(world)) == 1


def test_a_job_whose_file_is_gone_names_the_field_that_named_it(world: JobWorld) -> None:
    files, file, target = world.onboarding.files, world.upload(b"some lines\n"), world.root / "job.jsonl"
    files.path(file).unlink()
    with pytest.raises(BlobDamaged, match=file.id) as missing:
        files.link(file, target, param="validation_file")
    assert (missing.value.code, missing.value.param) == ("blob_missing", "validation_file")
    files.delete("acme", file.id)
    with pytest.raises(NotFound, match=file.id) as deleted:
        files.link(file, target, param="validation_file")
    assert (deleted.value.code, deleted.value.param) == ("file_not_found", "validation_file")
