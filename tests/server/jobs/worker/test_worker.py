"""The worker process end to end with a trainer that needs no torch: what a job goes through, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from sqlalchemy import update

from adapters_store.errors import NotFound
from adapters_store.storage.schema import jobs as rows
from server.jobs.store.records import Job, JobStatus
from server.jobs.tasks.executor import SubprocessExecutor, Task
from support.servers.job_world import BASE_CONFIG, JobWorld
from support.servers.waiting import wait_until


def ended_without_adapter(world: JobWorld, job: Job) -> Job:
    ended = world.wait_ended(job)
    assert world.store.versions(job.tenant, job.name) == []
    assert (ended.adapter_digest, ended.model_id) == (None, None)
    assert ended.finished_at is not None
    return ended


def trainer_group(job: Job) -> int:
    return int(json.loads((job.run_dir / "train.pid").read_text())["group"])


def is_training(job: Job) -> bool:
    return job.progress.get("step", 0) >= 1


def test_a_worker_starts_without_torch() -> None:
    """torch is half of what a start costs, and 180 MB beside the server for as long as that runs."""
    code = "import sys, server.jobs.worker.worker; print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_job_goes_from_data_to_an_active_adapter(working: JobWorld) -> None:
    job = working.create()
    assert job.status is JobStatus.VALIDATING
    ended = working.wait_ended(job)
    assert ended.status is JobStatus.SUCCEEDED, ended.failure
    version = working.store.resolve("acme", "style")
    assert (version.digest, version.version) == (ended.adapter_digest, ended.adapter_version)
    assert ended.model_id == "ft:tiny:acme:style:1"
    assert ended.verdict == "pass"
    assert ended.progress["step"] == 10
    assert ended.progress["trained_tokens"] == 1000
    assert [checkpoint.step for checkpoint in working.jobs.checkpoints(ended)] == [10, 5]
    assert working.messages(ended)[-1] == "The job has succeeded"
    wait_until(lambda: not (ended.run_dir / "checkpoints").exists())


def test_the_published_config_names_the_base_and_no_path_of_this_machine(working: JobWorld) -> None:
    job = working.create(name=None)
    working.wait_ended(job)
    config = json.loads(working.store.config_of(working.store.resolve("acme", job.name)))
    assert config["base_model_name_or_path"] == working.base.name


def test_what_the_trainer_refuses_is_the_jobs_error_and_is_not_tried_again(working: JobWorld) -> None:
    job = working.create(name=None, fail_at=0, fails=9, exit=2, code="nothing_supervised")
    ended = ended_without_adapter(working, job)
    assert ended.status is JobStatus.FAILED
    assert ended.failure is not None
    assert (ended.failure.code, ended.failure.param) == ("nothing_supervised", "data")
    assert (job.run_dir / "fails").read_text() == "1"


def test_a_failure_is_tried_again_and_goes_on_from_the_checkpoint(working: JobWorld) -> None:
    job = working.create(name=None, fail_at=7, fails=2)
    ended = working.wait_ended(job)
    assert ended.status is JobStatus.SUCCEEDED, ended.failure
    assert (job.run_dir / "fails").read_text() == "2"
    assert sum("resumes from the last checkpoint" in text for text in working.messages(ended)) == 2


def test_a_failure_that_stays_ends_the_job_with_its_reason(working: JobWorld) -> None:
    job = working.create(name=None, fail_at=7, fails=99)
    ended = ended_without_adapter(working, job)
    assert ended.failure is not None
    assert ended.failure.message == "as the test told it"
    assert (job.run_dir / "fails").read_text() == "3"


@pytest.mark.parametrize("code", ["out_of_memory", "disk_full"])
def test_what_time_does_not_cure_is_not_tried_again(working: JobWorld, code: str) -> None:
    job = working.create(name=None, fail_at=3, fails=99, code=code)
    ended = ended_without_adapter(working, job)
    assert ended.failure is not None
    assert ended.failure.code == code
    assert (job.run_dir / "fails").read_text() == "1"


def test_a_trainer_killed_again_and_again_says_so(working: JobWorld) -> None:
    job = working.create(name=None, fail_at=3, fails=99, exit=-9)
    ended = ended_without_adapter(working, job)
    assert ended.failure is not None
    assert ended.failure.code == "trainer_killed"
    assert "signal 9" in ended.failure.message


def test_a_trainer_that_the_system_killed_for_its_memory_is_told_what_would_fit(world: JobWorld) -> None:
    job = world.create(name=None, fail_at=3, fails=99, exit=-9, step_s=0.2)
    world.start_worker()
    world.wait(job, is_training)
    (world.root / "base" / "config.json").write_text(json.dumps({**BASE_CONFIG, "num_hidden_layers": 1 << 30}))
    ended = ended_without_adapter(world, job)
    assert ended.failure is not None
    assert ended.failure.code == "trainer_killed"
    assert "signal 9; out of memory is a common cause; the run needs about" in ended.failure.message
    assert "a smaller base is needed" in ended.failure.message


def test_a_blocked_adapter_is_kept_but_not_registered(working: JobWorld) -> None:
    job = working.create(name=None, verdict="block")
    ended = ended_without_adapter(working, job)
    assert ended.failure is not None
    assert (ended.failure.code, ended.verdict) == ("gate_blocked", "block")
    assert "worse than base" in ended.failure.message
    assert (job.run_dir / "adapter" / "adapter_model.safetensors").is_file()


def test_a_gate_that_cannot_measure_is_no_pass(working: JobWorld) -> None:
    job = working.create(name=None, verdict="crash")
    ended = ended_without_adapter(working, job)
    assert ended.failure is not None
    assert ended.failure.code == "gate_failed"
    assert "the gate crashed, as the test told it" in ended.failure.message


def test_cancelled_while_training_leaves_nothing(working: JobWorld) -> None:
    job = working.create(name=None, steps=10_000)
    running = working.wait(job, is_training)
    working.jobs.cancel(running)
    ended = ended_without_adapter(working, job)
    assert ended.status is JobStatus.CANCELLED
    wait_until(lambda: not (job.run_dir / "checkpoints").exists())


def test_paused_gives_its_place_away_and_goes_on_where_it_was(world: JobWorld) -> None:
    job = world.create(steps=60, step_s=0.05)
    world.start_worker()
    running = world.wait(job, lambda each: each.progress.get("step", 0) >= 6)
    world.jobs.pause(running)
    paused = world.wait(job, lambda each: each.status is JobStatus.PAUSED)
    other = world.wait_ended(world.create("globex"))
    assert other.status is JobStatus.SUCCEEDED
    assert world.jobs.get(job.id).status is JobStatus.PAUSED
    world.jobs.resume(paused)
    ended = world.wait_ended(job)
    assert ended.status is JobStatus.SUCCEEDED, ended.failure
    steps = [json.loads(line)["step"] for line in (job.run_dir / "events.jsonl").open() if '"type": "step"' in line]
    assert steps == list(range(1, 61)), "a step was done twice, or not at all"


def test_a_deleted_tenants_training_ends_and_its_folder_goes(world: JobWorld) -> None:
    job = world.create("globex", steps=10_000)
    world.start_worker()
    world.wait(job, is_training)
    world.store.tenants.delete("globex")
    wait_until(lambda: not job.run_dir.exists())
    assert world.jobs.find(job.id) is None


def test_a_worker_asked_to_end_lets_trainings_checkpoint_and_the_next_goes_on(world: JobWorld) -> None:
    job = world.create(steps=40, step_s=0.05)
    worker = world.start_worker()
    world.wait(job, lambda each: each.progress.get("step", 0) >= 6)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(300) == 0
    assert not SubprocessExecutor().state(Task("train", job.run_dir, ())).is_running
    assert world.jobs.get(job.id).status is JobStatus.RUNNING
    world.start_worker()
    ended = world.wait_ended(job)
    assert ended.status is JobStatus.SUCCEEDED, ended.failure
    events = (job.run_dir / "events.jsonl").read_text()
    assert events.count('"paused"') == 1


def test_a_step_that_fails_for_good_leaves_no_training_behind(world: JobWorld) -> None:
    job = world.create(steps=100_000)
    world.start_worker()
    world.wait(job, is_training)
    with (job.run_dir / "events.jsonl").open("a") as events:
        events.write('{"type": "step"}\n')  # which step, it does not say: the worker cannot read on
    ended = world.wait_ended(job)
    assert ended.failure is not None
    assert ended.failure.code == "internal_error"
    wait_until(lambda: not SubprocessExecutor().state(Task("train", job.run_dir, ())).is_running)


def test_a_spec_that_this_version_refuses_fails_its_job_alone(world: JobWorld) -> None:
    old, new = world.create(), world.create("globex")
    world.jobs.move(old, JobStatus.QUEUED, only_in=(JobStatus.VALIDATING,))
    with world.store.database.write() as connection:
        spec = json.dumps({"base": "b", "data": "training.jsonl", "gone": 1})
        connection.execute(update(rows).where(rows.c.id == old.id).values(spec=spec))
    world.start_worker()
    assert world.wait_ended(new).status is JobStatus.SUCCEEDED
    failure = world.wait_ended(old).failure
    assert failure is not None
    assert (failure.code, failure.param) == ("unknown_field", "gone")


def test_a_killed_workers_training_is_adopted_by_the_next(world: JobWorld) -> None:
    job = world.create(steps=40, step_s=0.05)
    world.start_worker()
    world.wait(job, is_training)
    group = trainer_group(job)
    world.kill_worker()
    os.kill(group, 0)  # it lives on
    world.start_worker()
    ended = world.wait_ended(job)
    assert ended.status is JobStatus.SUCCEEDED, ended.failure
    assert trainer_group(job) == group, "a second trainer was started beside the first"


def test_a_job_that_cannot_fit_says_how_much_it_needs(world: JobWorld) -> None:
    job = world.create()
    (world.root / "base" / "config.json").write_text(json.dumps({**BASE_CONFIG, "hidden_size": 1 << 30}))
    world.start_worker()
    ended = ended_without_adapter(world, job)
    assert ended.failure is not None
    assert ended.failure.code == "out_of_memory"
    assert "are free. the run needs about" in ended.failure.message


def test_two_tenants_train_at_once_under_the_same_name_and_get_their_own(working: JobWorld) -> None:
    jobs = [working.create(tenant, "same", salt=tenant) for tenant in ("acme", "globex")]
    ended = [working.wait_ended(job) for job in jobs]
    assert [each.status for each in ended] == [JobStatus.SUCCEEDED] * 2
    digests = [working.store.resolve(job.tenant, "same").digest for job in jobs]
    assert digests == [each.adapter_digest for each in ended]
    assert digests[0] != digests[1]
    with pytest.raises(NotFound):
        working.jobs.get(jobs[0].id, "globex")
