"""Kubernetes Jobs by the real client, against an API server's routes in memory: no cluster runs here."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from kubernetes import client
from kubernetes.client.exceptions import ApiException

from server.jobs.tasks.executor import ExecutorUnavailable, Task, TaskState
from server.jobs.tasks.kubernetes_jobs import KubernetesJobExecutor, TemplateRefused, check_template
from support.kubernetes_schema import faults

TEMPLATE = yaml.safe_load(
    (Path(__file__).parents[4] / "deploy" / "kubernetes" / "fleet" / "job-template.yaml").read_text()
)


class Cluster(ThreadingHTTPServer):
    """The routes that the executor asks; `jobs` by name, and the exit codes of their pods."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Routes)
        self.jobs: dict[str, dict[str, Any]] = {}
        self.exit_codes: dict[str, int] = {}
        self.status = 200

    def end(self, name: str, code: int) -> None:
        kind = "Complete" if code == 0 else "Failed"
        self.jobs[name]["status"] = {"conditions": [{"type": kind, "status": "True"}]}
        self.exit_codes[name] = code


class Routes(BaseHTTPRequestHandler):
    server: Cluster
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.server.status != 200:
            return self.answer(self.server.status, {})
        assert self.path == "/apis/batch/v1/namespaces/default/jobs", self.path
        if self.server.jobs.setdefault(body["metadata"]["name"], body) is not body:
            return self.answer(409, {"reason": "AlreadyExists"})
        return self.answer(201, body)

    def do_GET(self) -> None:
        if self.server.status != 200:
            return self.answer(self.server.status, {})
        url = urlsplit(self.path)
        if url.path == "/api/v1/namespaces/default/pods":
            [selector] = parse_qs(url.query)["labelSelector"]
            code = self.server.exit_codes[selector.removeprefix("batch.kubernetes.io/job-name=")]
            rest = {"image": "x", "imageID": "x", "ready": False, "restartCount": 0}
            statuses = [  # sorted by name, as a kubelet does
                {"name": name, "state": {"terminated": {"exitCode": each}}, **rest}
                for name, each in (("proxy", 0), ("trainer", code))
            ]
            return self.answer(200, {"items": [{"status": {"containerStatuses": statuses}}]})
        job = self.server.jobs.get(self.path.split("/")[-2])
        return self.answer(404, {}) if job is None else self.answer(200, job)

    def do_DELETE(self) -> None:
        if self.server.status != 200:
            return self.answer(self.server.status, {})
        job = self.server.jobs.pop(self.path.partition("?")[0].split("/")[-1], None)
        return self.answer(404 if job is None else 200, {})

    def answer(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    threading.Thread(target=cluster.serve_forever, daemon=True).start()
    yield cluster
    cluster.shutdown()
    cluster.server_close()


def executor(cluster: Cluster) -> KubernetesJobExecutor:
    configuration = client.Configuration(host=f"http://127.0.0.1:{cluster.server_port}")
    configuration.retries = False
    return KubernetesJobExecutor(TEMPLATE, client.ApiClient(configuration))


def task(folder: Path, ranks: int = 1) -> Task:
    return Task("train", folder, ("python", "-m", "trainer"), {"OMP_NUM_THREADS": "4"}, ranks=ranks)


def test_a_task_is_one_job_whichever_worker_looks_at_it(cluster: Cluster, tmp_path: Path) -> None:
    each = task(tmp_path)
    first, second = executor(cluster), executor(cluster)
    assert first.state(each) == TaskState(is_running=False)
    for one in (first, second, first):
        one.start(each)
    [(name, job)] = cluster.jobs.items()
    assert faults(job) == []
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert (container["command"], job["spec"]["backoffLimit"]) == (["python", "-m", "trainer"], 0)
    assert container["env"] == [{"name": "OMP_NUM_THREADS", "value": "4"}]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "multilora"
    assert job["metadata"]["labels"]["multilora.io/run"] == tmp_path.name
    assert second.state(each).is_running
    cluster.end(name, 0)
    assert second.state(each) == TaskState(is_running=False, exit_code=0)
    second.start(each)
    assert len(cluster.jobs) == 2, "an ended task that is started again is another Job"


@pytest.mark.parametrize(("code", "shown"), [(2, 2), (137, -9)])
def test_how_it_failed_is_its_containers_exit_code(cluster: Cluster, tmp_path: Path, code: int, shown: int) -> None:
    each, own = task(tmp_path), executor(cluster)
    own.start(each)
    cluster.end(next(iter(cluster.jobs)), code)
    assert own.state(each) == TaskState(is_running=False, exit_code=shown)


def test_killed_between_its_name_and_its_job_it_is_created_once(cluster: Cluster, tmp_path: Path) -> None:
    each, own = task(tmp_path), executor(cluster)
    (tmp_path / "train.kubernetes").write_text("multilora-before")
    own.start(each)
    assert list(cluster.jobs) == ["multilora-before"]
    own.kill(each)
    own.kill(each)
    assert (cluster.jobs, own.state(each)) == ({}, TaskState(is_running=False))


def test_an_api_server_that_does_not_answer_fails_no_job(cluster: Cluster, tmp_path: Path) -> None:
    each, own = task(tmp_path), executor(cluster)
    own.start(each)
    cluster.status = 503
    for ask in (own.state, own.stop, own.kill):
        with pytest.raises(ExecutorUnavailable, match="503"):
            ask(each)
    cluster.shutdown()
    cluster.server_close()
    with pytest.raises(ExecutorUnavailable):
        own.state(each)


@pytest.mark.parametrize(
    ("status", "error"), [(429, ExecutorUnavailable), (503, ExecutorUnavailable), (403, ApiException)]
)
def test_a_job_is_refused_only_by_what_a_later_try_would_not_change(
    cluster: Cluster, tmp_path: Path, status: int, error: type[Exception]
) -> None:
    own = executor(cluster)
    cluster.status = status
    with pytest.raises(error, match=str(status)):
        own.start(task(tmp_path))
    cluster.status = 200
    own.start(task(tmp_path))
    assert len(cluster.jobs) == 1


def test_several_ranks_are_started_by_torchrun_in_its_pod(cluster: Cluster, tmp_path: Path) -> None:
    executor(cluster).start(task(tmp_path, ranks=4))
    [job] = cluster.jobs.values()
    command = job["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command[:4] == ["python", "-P", "-m", "torch.distributed.run"]
    assert command[command.index("--nproc-per-node") + 1] == "4"
    assert command[-3:] == ["python", "-m", "trainer"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kind": "Pod"}, "batch/v1 Job"),
        ({"spec": {"template": {"spec": {"containers": [{}], "restartPolicy": "OnFailure"}}}}, "restartPolicy"),
        ({"spec": {"template": {"spec": {"containers": []}}}}, "containers"),
    ],
)
def test_a_template_that_cannot_be_a_training_is_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(TemplateRefused, match=reason):
        check_template({**TEMPLATE, **change})


def test_a_template_that_says_one_thing_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    for content, reason in ((b"kind: Pod\nkind: Job\n", "duplicate key 'kind'"), (b"kind: \xff\n", "utf-8")):
        file.write_bytes(content)
        with pytest.raises(TemplateRefused, match=reason):
            KubernetesJobExecutor.from_file(file)
