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

import httpx
import psutil
from ray.job_submission import JobSubmissionClient

START_S = 400
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
    """variables: of the node's environment, which Ray's proxies and replicas inherit."""
    gcs, dashboard, listen, grpc, runtime, metrics = free_ports(6)
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        environment |= {**_PATIENCE, **variables}
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--num-cpus", "4"]
        command += ["--node-ip-address", "127.0.0.1", "--port", str(gcs), "--temp-dir", folder]
        command += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)]
        # a node waits 15 s for the ports that its agents choose, and not for those that are given
        command += ["--dashboard-agent-listen-port", str(listen), "--dashboard-agent-grpc-port", str(grpc)]
        command += ["--runtime-env-agent-port", str(runtime), "--metrics-export-port", str(metrics)]
        command += ["--object-store-memory", str(100 << 20)]
        os.environ["RAY_AUTH_MODE"] = "disabled"
        log = Path(folder) / "head.log"
        try:
            with log.open("wb") as stream:  # its own verdict comes after 30 s, whatever the machine does: not asked
                subprocess.run(command, env=environment, stdout=stream, stderr=stream, cwd=folder, check=False)
            url = f"http://127.0.0.1:{dashboard}"
            _wait_until_its_node_lives(url, log)
            yield RayCluster(url, f"127.0.0.1:{gcs}", environment)
        finally:
            _kill_all_of(folder)


def _kill_all_of(folder: str) -> None:
    """Ray's processes have no parent here; their session's folder is in their commands. Workers end with them."""
    doomed = [each for each in psutil.process_iter() if folder in _command(each)]
    for each in doomed:
        each.kill()
    psutil.wait_procs(doomed, timeout=30)


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def run_serve(cluster: RayCluster, config: Path) -> None:
    """Deploy a Serve config, and return; replicas start meanwhile."""
    command = [sys.executable, "-m", "ray.serve.scripts", "deploy", str(config), "-a", cluster.jobs_url]
    subprocess.run(command, env=cluster.environment, check=True, cwd=config.parent)


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


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports
