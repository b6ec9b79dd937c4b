"""`serve --tensor-parallel 2`: a rank that is killed ends the server with an exit code, and no rank outlives it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from support.servers.waiting import wait_until

ASK: dict[str, Any] = {"model": "tiny", "prompt": "hello", "max_tokens": 8, "ignore_eos": True}


def followers_of(server: Any) -> list[int]:
    children = Path(f"/proc/{server.process.pid}/task").glob("*/children")
    pids = [int(pid) for each in children for pid in each.read_text().split()]
    return [pid for pid in pids if b"tensor_parallel.follower" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def rendezvous_of(follower: int) -> Path:
    """Its fourth argument after the module's name."""
    words = Path(f"/proc/{follower}/cmdline").read_text().split("\0")
    return Path(words[words.index("server.engine.tensor_parallel.follower") + 4])


def started(serve_process: Callable[..., Any], base: Path, data_dir: Path) -> Any:
    arguments = ("--base", base, "--json", "--auth", "off", "--data-dir", data_dir, "--tensor-parallel", "2")
    return serve_process(*arguments)


def test_a_killed_rank_ends_the_server_with_exit_code_7(
    serve_process: Callable[..., Any], base: Path, tmp_path: Path
) -> None:
    with started(serve_process, base, tmp_path) as server:
        wait_until(server.is_ready)
        assert httpx.post(f"{server.url}/v1/completions", json=ASK, timeout=60).status_code == 200
        (follower,) = followers_of(server)
        os.kill(follower, signal.SIGKILL)
        assert server.ended(timeout_s=60) == 7
    error = server.events[-1]["error"]
    assert error["code"] == "device_lost"
    assert "rank 1 of 2" in error["message"]


def test_the_other_ranks_end_with_the_server_whatever_ends_it(
    serve_process: Callable[..., Any], base: Path, tmp_path: Path
) -> None:
    with started(serve_process, base, tmp_path) as server:
        wait_until(server.is_ready)
        (follower,) = followers_of(server)
        rendezvous = rendezvous_of(follower)
        assert rendezvous.exists()
        os.kill(follower, signal.SIGTERM)  # a supervisor sends it to all, and the server still has requests to answer
        assert httpx.post(f"{server.url}/v1/completions", json=ASK, timeout=60).status_code == 200
        server.stop(signal.SIGKILL)
        wait_until(lambda: not Path(f"/proc/{follower}").exists())
        assert not rendezvous.parent.exists()  # nothing is left on the disk either
