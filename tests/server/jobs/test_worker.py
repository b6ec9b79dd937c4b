"""The worker process end to end with a trainer that needs no torch: what a job goes through, and how it ends."""

from __future__ import annotations

from server.jobs.records import JobStatus
from support.job_world import JobWorld


def test_a_job_goes_from_data_to_an_active_adapter(world: JobWorld) -> None:
    job = world.create()
    assert job.status is JobStatus.VALIDATING
    world.start_worker()
    ended = world.wait_ended(job)
    assert ended.status is JobStatus.SUCCEEDED, ended.failure
    version = world.store.resolve("acme", "style")
    assert (version.digest, version.version) == (ended.adapter_digest, ended.adapter_version)
    assert ended.model_id == "ft:tiny:acme:style:1"
    assert ended.verdict == "pass"
    assert ended.progress["step"] == 10
    assert ended.progress["trained_tokens"] == 1000
    assert [checkpoint.step for checkpoint in world.jobs.checkpoints(ended)] == [10, 5]
    assert world.messages(ended)[-1] == "The job has succeeded"
    assert not (ended.run_dir / "checkpoints").exists()
