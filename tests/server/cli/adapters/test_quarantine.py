"""Damaged adapters at the start of a real server, and the commands that list and release them."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from support.servers.waiting import wait_until

Command = Callable[..., Any]


def blob_of(data_dir: Path, digest: str) -> Path:
    name = digest.removeprefix("sha256:")
    return data_dir / "blobs" / name[:2] / name


def ask(client: httpx.Client, model: str) -> httpx.Response:
    return client.post("/v1/completions", json={"model": model, "prompt": "x", "max_tokens": 2})


def test_a_server_starts_on_a_damaged_store_says_so_and_serves_the_rest(
    serve_process: Command,
    wait_ready: Command,
    run_json: Command,
    base: Path,
    adapters: dict[str, Path],
    data_dir: Path,
) -> None:
    key = run_json("tenant", "create", "acme")["api_key"]
    pushed = {
        name: run_json("adapter", "push", folder, "--tenant", "acme", "--name", name, "--base", base)["digest"]
        for name, folder in adapters.items()
    }
    shutil.rmtree(blob_of(data_dir, pushed["law"]))
    weights = blob_of(data_dir, pushed["med"]) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with serve_process("--base", base, "--json", "--data-dir", data_dir) as server:
        wait_ready(server)
        checked = next(event for event in server.events if event["event"] == "store_checked")
        assert checked["blobs"] == 3
        assert checked["quarantined"] == {pushed["law"]: "blob_missing", pushed["med"]: "blob_damaged"}
        client = httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {key}"}, timeout=300)
        answers = {name: ask(client, name) for name in (*pushed, "tiny")}
        statuses = {name: answer.status_code for name, answer in answers.items()}
        assert statuses == {"law": 503, "med": 503, "code": 200, "tiny": 200}
        assert answers["law"].json()["error"]["code"] == "adapter_quarantined"
        assert answers["law"].headers["x-should-retry"] == "false"
        run_json("adapter", "push", adapters["med"], "--tenant", "acme", "--name", "med", "--base", base)
        wait_until(lambda: ask(client, "med").status_code == 200)  # another process's write
        assert server.stop(signal.SIGTERM) == 0


def test_the_commands_check_list_and_release(
    run: Command, run_json: Command, base: Path, adapter: Path, data_dir: Path, tmp_path: Path
) -> None:
    assert "nothing is in quarantine" in run("quarantine", "list").stdout
    run("tenant", "create", "acme")
    digest = run_json("adapter", "push", adapter, "--tenant", "acme", "--name", "law", "--base", base)["digest"]
    shutil.move(blob_of(data_dir, digest), tmp_path / "aside")
    assert run_json("quarantine", "check") == {
        "blobs": 1,
        "quarantined": [digest],
        "put_away": [digest],
        "restored": [],
    }
    [entry] = run_json("quarantine", "list")["data"]
    assert (entry["digest"], entry["code"]) == (digest, "blob_missing")
    assert digest in run("quarantine", "list").stdout
    assert run_json("quarantine", "release", digest) == {"digest": digest, "released": True}
    assert run("quarantine", "release", digest).exit_code == 3
    assert run_json("quarantine", "check")["quarantined"] == [digest]
    shutil.move(tmp_path / "aside", blob_of(data_dir, digest))
    assert run("quarantine", "check").stdout == "1 blobs: 0 quarantined, 1 restored\n"
