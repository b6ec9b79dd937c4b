"""A real Ray cluster of one node on 127.0.0.1, for the length of a block."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx
from ray.job_submission import JobSubmissionClient

from support.servers import ray_node
from support.servers.waiting import wait_until

START_S = 900
_PATIENCE = {  # a busy machine starts Ray's processes slowly; each has a time-out of its own
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_health_check_timeout_ms": "60000",
    "RAY_health_check_initial_delay_ms": "60000",
}


@dataclass(frozen=True)
class RayCluster:
    """jobs_url: of its job server. address: for ray.init. environment: that its clients need."""

    jobs_url: str
    address: str
    environment: dict[str, str]

    @property
    def client(self) -> JobSubmissionClient:
        return JobSubmissionClient(self.jobs_url)


@contextmanager
def ray_cluster(**variables: str) -> Iterator[RayCluster]:
    """variables: of the node's environment, which Ray's proxies and replicas inherit. No process outlives the block."""
    gcs, dashboard, listen, grpc, runtime, metrics = free_ports(6)
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        environment |= {**_PATIENCE, **variables}
        command = [sys.executable, ray_node.__file__, str(listen), "start", "--head", "--num-cpus", "4"]
        command += ["--node-ip-address", "127.0.0.1", "--port", str(gcs), "--temp-dir", folder]
        command += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)]
        # a node waits 15 s for the ports that its agents choose, and not for those that are given
        command += ["--dashboard-agent-listen-port", str(listen), "--dashboard-agent-grpc-port", str(grpc)]
        command += ["--runtime-env-agent-port", str(runtime), "--metrics-export-port", str(metrics)]
        command += ["--object-store-memory", str(100 << 20)]
        os.environ["RAY_AUTH_MODE"] = "disabled"
        log = Path(folder) / "head.log"
        with log.open("wb") as stream, _ended_with_us(command, stream, env=environment, cwd=folder):
            url = f"http://127.0.0.1:{dashboard}"
            _wait_until_its_node_lives(url, log)
            # the node's agent takes jobs only some time after the node is said to live
            wait_until(lambda: answers(f"http://127.0.0.1:{listen}/api/local_raylet_healthz"), timeout_s=START_S)
            yield RayCluster(url, f"127.0.0.1:{gcs}", environment)


@contextmanager
def _ended_with_us(command: list[str], log: IO[bytes], **options: Any) -> Iterator[None]:
    """In a session of its own: an interrupt of the tests reaches it as the end of the pipe, and it kills the node."""
    node = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True, **options)
    assert node.stdin is not None
    try:
        yield
    finally:
        node.stdin.close()
        node.wait()


def run_serve(cluster: RayCluster, config: Path) -> None:
    """Deploy a Serve config, and return; replicas start meanwhile."""
    command = [sys.executable, "-m", "ray.serve.scripts", "deploy", str(config), "-a", cluster.jobs_url]
    subprocess.run(command, env=cluster.environment, check=True, cwd=config.parent)


def end_serve(cluster: RayCluster) -> None:
    """Its replicas end; the node lives on."""
    command = [sys.executable, "-m", "ray.serve.scripts", "shutdown", "-y", "-a", cluster.jobs_url]
    subprocess.run(command, env=cluster.environment, check=True)


def _wait_until_its_node_lives(url: str, log: Path) -> None:
    deadline_s = time.monotonic() + START_S
    while True:
        assert time.monotonic() < deadline_s, log.read_text()
        try:
            nodes = httpx.get(f"{url}/nodes?view=summary", timeout=5).json()["data"]["summary"]
            if [node["raylet"]["state"] for node in nodes] == ["ALIVE"]:
                return
        except (httpx.TransportError, ValueError, KeyError, TypeError):
            pass
        time.sleep(0.5)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports
