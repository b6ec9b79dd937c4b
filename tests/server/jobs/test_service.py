"""What a new job must be: limits by tenant, and nothing kept of what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import delete, select

from adapters_store.errors import Conflict, StoreError
from adapters_store.storage.schema import jobs, served_bases
from server.jobs.limits import JobLimit, JobLimits, JobRefused
from server.jobs.served_base import ServedBase
from server.jobs.service import Onboarding
from server.jobs.store.job_request import JobRequest, build_spec
from server.jobs.store.records import JobStatus
from server.jobs.store.served_bases import ServedBases
from support.servers.job_world import MODEL, JobWorld, data_lines, make_base_folder


def ask(world: JobWorld, **fields: object) -> JobRequest:
    return JobRequest(**{"model": MODEL, "training_file": world.upload(data_lines()).id, **fields})  # type: ignore[arg-type]


def test_jobs_at_once_and_in_a_day_are_limited_by_tenant(tmp_path: Path) -> None:
    world = JobWorld(tmp_path, limits=JobLimits(max_active_jobs=2, max_jobs_per_day=3))
    jobs = [world.create(salt=index) for index in range(2)]
    with pytest.raises(JobLimit, match="has 2 jobs that have not ended, the limit is 2"):
        world.create(salt=2)
    with pytest.raises(JobLimit):  # not a word on its data: reading it takes a core for a while
        world.onboarding.create("acme", ask(world, training_file=world.upload(b"no JSON\n").id))
    world.create("globex")
    world.jobs.cancel(jobs[0])
    world.jobs.cancel(world.create(salt=3))
    with pytest.raises(JobLimit, match="made 3 jobs in 24 hours, the limit is 3"):
        world.create(salt=4)
    assert len(list(world.jobs.runs.iterdir())) == 4, "a refused job left a folder"
    world.close()


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"knobs": {"rank": 0}}, "invalid_value", "multilora.rank"),
        ({"knobs": {"method": "full"}}, "unsupported_method", "multilora.method"),
        ({"spec": {"adapter": {"ranks": 1}}}, "unknown_parameter", "adapter.ranks"),
        ({"spec": {"base": "/etc"}}, "unknown_parameter", "base"),
        ({"hyperparameters": {"n_epochs": 1001}}, "invalid_value", "hyperparameters.n_epochs"),
        ({"suffix": "x" * 65}, "invalid_value", "suffix"),
    ],
)
def test_a_refused_job_leaves_no_row_and_no_folder(
    world: JobWorld, fields: dict[str, object], code: str, param: str
) -> None:
    with pytest.raises(JobRefused) as refused:
        world.onboarding.create("acme", ask(world, **fields))
    assert (refused.value.code, refused.value.param) == (code, param)
    assert world.jobs.list() == []
    assert not world.jobs.runs.exists() or list(world.jobs.runs.iterdir()) == []


def test_int8_is_taken_on_every_device(tmp_path: Path) -> None:
    request = JobRequest(model=MODEL, training_file="file-1", knobs={"adapter_dtype": "int8"})
    served = ServedBase(path=tmp_path, name=MODEL, digest="sha256:b", dtype="float32", device="cpu")
    for device in ("cpu", "cuda"):
        spec = build_spec(request, replace(served, device=device), JobLimits(), validation=False, mix=False)
        assert spec.adapter_dtype == "int8"


def test_rank_above_the_servers_limit_is_refused_by_name(tmp_path: Path) -> None:
    world = JobWorld(tmp_path, limits=JobLimits(max_rank=32))
    for knobs in ({"rank": 64}, {"rank_pattern": {"q_proj": 64}}):
        with pytest.raises(JobRefused, match="at most 32, got 64"):
            world.onboarding.create("acme", ask(world, knobs=knobs))
    world.close()


def test_knobs_go_before_the_spec_and_hyperparameters_before_both(world: JobWorld) -> None:
    request = ask(
        world,
        spec={"adapter": {"rank": 4, "dropout": 0.1}, "optim": {"epochs": 9}},
        knobs={"rank": 8},
        hyperparameters={"n_epochs": 2},
    )
    spec = world.onboarding.create("acme", request).spec
    assert (spec["adapter"]["rank"], spec["adapter"]["dropout"], spec["optim"]["epochs"]) == (8, 0.1, 2)


def test_an_nf4_base_is_trained_on_as_it_is_served(world: JobWorld) -> None:
    assert world.create().spec["method"] == "lora"
    base = world.root / "base"
    world.jobs.bases.remember(ServedBase(path=base, name=MODEL, digest=world.base.digest, quantize="nf4"))
    assert world.create(salt=1).spec["method"] == "qlora"


def test_rows_hold_no_path_of_a_host_and_jobs_have_this_hosts(world: JobWorld) -> None:
    job = world.create()
    assert [job.spec["data"], job.run_dir] == [str(job.run_dir / "training.jsonl"), world.data_dir / "runs" / job.id]
    with world.store.database.read() as connection:
        [row] = connection.execute(select(jobs.c.run_dir, jobs.c.spec)).all()
    assert row.run_dir == f"runs/{job.id}"
    assert json.loads(row.spec)["data"] == "training.jsonl"
    elsewhere = ServedBases(world.store.database, host="other")
    elsewhere.remember(ServedBase(path=Path("/elsewhere/base"), name=MODEL, digest=world.base.digest))
    assert world.jobs.get(job.id).spec["base"] == str(world.root / "base"), "this host's path goes first"
    assert job.at(Path("/other"), {world.base.digest: Path("/b")}).spec["base"] == "/b"
    found = elsewhere.find(world.base.digest)
    assert found is not None
    assert found.path == Path("/elsewhere/base")


def test_two_servers_of_two_bases_create_jobs_each_for_its_own(world: JobWorld) -> None:
    folder = make_base_folder(world.root / "second")
    world.jobs.bases.remember(ServedBase(path=folder, name="second", digest="sha256:2"))
    servers = {
        digest: Onboarding(world.data_dir, world.store.database, serves=digest)
        for digest in (world.base.digest, "sha256:2")
    }
    first = servers[world.base.digest].create("acme", ask(world))
    assert first.base_digest == world.base.digest
    with pytest.raises(StoreError, match="which is served here"):
        servers["sha256:2"].create("acme", ask(world))


@pytest.mark.parametrize("name", ["nodes", "ranks"])
def test_a_training_on_many_processes_is_sharded_and_stays_within_the_limits(tmp_path: Path, name: str) -> None:
    world = JobWorld(tmp_path, limits=JobLimits(max_ranks=2, max_nodes=2))
    with pytest.raises(JobRefused, match=rf"multilora\.{name}: must be from 1 to 2, got 3"):
        world.onboarding.create("acme", ask(world, **{name: 3}))
    job = world.onboarding.create("acme", ask(world, **{name: 2}))
    assert (job.spec["sharding"], job.nodes * job.ranks) == ("fsdp", 2)
    world.close()


def test_a_job_that_has_ended_cannot_be_asked_for_anything(world: JobWorld) -> None:
    job = world.create()
    world.jobs.end(job, JobStatus.FAILED)
    for ask_for in (world.jobs.cancel, world.jobs.pause, world.jobs.resume):
        with pytest.raises(Conflict) as refused:
            ask_for(job)
        assert refused.value.code == "job_has_ended"
    assert not world.jobs.end(job, JobStatus.SUCCEEDED), "an ended job ended again"


def test_a_cancel_of_a_running_job_cannot_be_withdrawn(world: JobWorld) -> None:
    job = world.create()
    for status, before in ((JobStatus.QUEUED, JobStatus.VALIDATING), (JobStatus.RUNNING, JobStatus.QUEUED)):
        assert world.jobs.move(job, status, only_in=(before,))
    assert world.jobs.cancel(job).wanted == "cancel"
    for ask_for in (world.jobs.pause, world.jobs.resume):
        with pytest.raises(Conflict, match="a job that is being cancelled") as refused:
            ask_for(job)
        assert refused.value.code == "job_has_ended"
    assert world.jobs.cancel(job).wanted == "cancel", "asked twice it is the same"
    world.jobs.settle_pause(job)
    assert world.jobs.get(job.id).status is JobStatus.CANCELLED


def test_a_base_nobody_served_is_refused(world: JobWorld) -> None:
    with world.store.database.write() as connection:
        connection.execute(delete(served_bases))
    with pytest.raises(StoreError) as refused:
        world.onboarding.create("acme", ask(world))
    assert refused.value.code == "model_not_found"


def test_a_sweep_takes_orphaned_folders_and_ended_jobs_checkpoints_only(world: JobWorld) -> None:
    ended, active = world.create(salt=1), world.create(salt=2)
    for job in (ended, active):
        (job.run_dir / "checkpoints" / "step-000001").mkdir(parents=True)
    world.jobs.cancel(ended)
    orphan = world.jobs.runs / "ftjob-0123"
    orphan.mkdir()
    world.onboarding.sweep(grace_s=3600)
    assert orphan.exists(), "a folder may be a job's that is just being made"
    world.onboarding.sweep(grace_s=-1)
    assert not orphan.exists()
    assert not (ended.run_dir / "checkpoints").exists()
    assert (ended.run_dir / "training.jsonl").exists()
    assert (active.run_dir / "checkpoints" / "step-000001").exists()


@pytest.mark.parametrize(
    ("device", "dtype", "of_config", "precision"),
    [
        ("cpu", "auto", "bfloat16", "float32"),
        ("cuda", "auto", "bfloat16", "bfloat16"),
        ("cuda", "auto", "float32", "float32"),
        ("cuda", "float32", "bfloat16", "float32"),
        ("cuda", "bfloat16", "float32", "bfloat16"),
    ],
)
def test_a_job_on_a_gpu_trains_as_the_base_is_served(
    tmp_path: Path, device: str, dtype: str, of_config: str, precision: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"dtype": of_config}))
    base = ServedBase(path=tmp_path, name="b", digest="sha256:0", device=device, dtype=dtype)
    assert base.training_precision == precision
