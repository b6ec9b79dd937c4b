"""Jobs on a real Ray cluster of one node: found by the next worker, ended, and never run twice.

The cluster is for the long form (MULTILORA_FLEET=long): on a busy machine a node takes minutes to start.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import pytest
import ray

from server.jobs.settings import JobSettings
from server.jobs.store.records import JobStatus
from server.jobs.tasks.executor import ExecutorUnavailable, Task
from server.jobs.tasks.ray_jobs import RayJobExecutor
from support.servers.job_world import JobWorld
from support.servers.ray_cluster import RayCluster


@pytest.fixture
def world(tmp_path: Path) -> Iterator[JobWorld]:
    world = JobWorld(tmp_path)
    yield world
    world.close()


@pytest.mark.skipif(os.environ.get("MULTILORA_FLEET") != "long", reason="long form: MULTILORA_FLEET=long")
def test_a_job_trains_as_one_ray_job_although_its_worker_is_killed(cluster: RayCluster, world: JobWorld) -> None:
    options = ("--jobs", JobSettings(executor="ray", ray_address=cluster.jobs_url).to_json())
    job = world.create(steps=40, step_s=0.1)
    world.start_worker(*options)
    world.wait(job, lambda each: each.progress.get("step", 0) >= 6, timeout_s=900)
    world.kill_worker()
    world.start_worker(*options)
    ended = world.wait_ended(job, timeout_s=900)
    assert (ended.status, ended.executor) == (JobStatus.SUCCEEDED, "ray"), ended.failure
    ours = [each.metadata for each in cluster.client.list_jobs() if each.metadata["multilora_run"] == job.run_dir.name]
    assert sorted(each["multilora_task"] for each in ours) == ["gate", "train"]
    lines = (ended.run_dir / "events.jsonl").read_text().splitlines()
    steps = [event["step"] for event in map(json.loads, lines) if event["type"] == "step"]
    assert steps == list(range(1, 41)), "the training was started twice"


def test_no_cluster_is_no_failure_of_a_job(tmp_path: Path) -> None:
    with pytest.raises(ExecutorUnavailable):
        RayJobExecutor("http://127.0.0.1:1").start(Task("train", tmp_path, ("true",)))


class JobServer(BaseHTTPRequestHandler):
    """Answers `refusal` to what is submitted, in Ray's words, and knows no job. submitted: what was, by all."""

    refusal = (200, "")
    submitted: ClassVar[list[dict[str, Any]]] = []

    def do_GET(self) -> None:
        if self.path == "/api/version":
            version = {"version": "4", "ray_version": ray.__version__, "ray_commit": ray.__commit__, "session_name": ""}
            return self.answer(200, json.dumps(version))
        return self.answer(404, "Job x does not exist")

    def do_POST(self) -> None:
        self.submitted.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.answer(*self.refusal)

    def answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *words: object) -> None:
        """Quiet."""


@contextmanager
def job_server() -> Iterator[str]:
    """Its URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), JobServer) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@pytest.mark.parametrize(
    ("status", "text", "raised"),
    [
        (500, "No available agent to submit job, please try again later.", ExecutorUnavailable),
        (500, "Traceback ... RuntimeError: Request failed with status code 400: bad entrypoint", RuntimeError),
        (400, "bad entrypoint", RuntimeError),
    ],
)
def test_a_cluster_that_is_starting_is_no_failure_of_a_job_and_a_refusal_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, text: str, raised: type[Exception]
) -> None:
    monkeypatch.setattr(JobServer, "refusal", (status, text))
    with job_server() as url, pytest.raises(raised):
        RayJobExecutor(url).start(Task("train", tmp_path, ("true",)))


def test_a_worker_that_began_before_a_base_was_served_on_a_gpu_gives_its_jobs_gpus(
    world: JobWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(JobServer, "refusal", (400, "bad entrypoint"))
    monkeypatch.setattr(JobServer, "submitted", [])
    with job_server() as url:
        world.start_worker("--jobs", JobSettings(executor="ray", ray_address=url).to_json())
        world.wait_ended(world.create(name="before"))
        served = world.jobs.bases.last()
        assert served is not None
        world.jobs.bases.remember(replace(served, device="cuda"))
        world.wait_ended(world.create(name="after", salt=1))
    tries = [each["entrypoint_num_gpus"] for each in JobServer.submitted]
    assert [count for count, _ in groupby(tries)] == [0, 1]
