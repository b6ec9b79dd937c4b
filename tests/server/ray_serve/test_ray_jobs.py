"""Jobs on a real Ray cluster of one node: found by the next worker, ended, and never run twice.

The cluster is for the long form (MULTILORA_FLEET=long): on a busy machine a node takes minutes to start.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.jobs.store.records import JobStatus
from server.jobs.tasks.executor import ExecutorUnavailable, Task
from server.jobs.tasks.ray_jobs import RayJobExecutor
from support.servers.job_world import JobWorld
from support.servers.ray_cluster import RayCluster, ray_cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster() as cluster:
        yield cluster


@pytest.mark.skipif(os.environ.get("MULTILORA_FLEET") != "long", reason="long form: MULTILORA_FLEET=long")
def test_a_job_trains_as_one_ray_job_although_its_worker_is_killed(cluster: RayCluster, tmp_path: Path) -> None:
    world = JobWorld(tmp_path)
    options = ("--executor", "ray", "--ray-address", cluster.jobs_url)
    job = world.create(steps=40, step_s=0.1)
    world.start_worker(*options)
    world.wait(job, lambda each: each.progress.get("step", 0) >= 6)
    world.kill_worker()
    world.start_worker(*options)
    ended = world.wait_ended(job)
    world.close()
    assert (ended.status, ended.executor) == (JobStatus.SUCCEEDED, "ray"), ended.failure
    runs = [each.metadata["multilora_task"] for each in cluster.client.list_jobs()]
    assert sorted(runs) == ["gate", "train"]
    lines = (ended.run_dir / "events.jsonl").read_text().splitlines()
    steps = [event["step"] for event in map(json.loads, lines) if event["type"] == "step"]
    assert steps == list(range(1, 41)), "the training was started twice"


def test_no_cluster_is_no_failure_of_a_job(tmp_path: Path) -> None:
    with pytest.raises(ExecutorUnavailable):
        RayJobExecutor("http://127.0.0.1:1").start(Task("train", tmp_path, ("true",)))
