"""`multilora serve` as a real process: from the first line to the last, with tenants and adapters coming meanwhile."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from support.servers.waiting import wait_until

Command = Callable[..., Any]


@pytest.fixture(scope="module")
def served_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data directory of the one server that most tests here share."""
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def server(serve_process: Command, wait_ready: Command, base: Path, served_dir: Path) -> Iterator[Any]:
    options = ("--base", base, "--json", "--log-format", "json", "--drain-s", "0.2", "--data-dir", served_dir)
    with serve_process(*options) as server:
        wait_ready(server)
        wait_until(lambda: server.events[-1]["event"] == "ready")
        yield server


@pytest.fixture
def data_dir(served_dir: Path) -> Path:
    """The commands here work on the directory that is being served."""
    return served_dir


@pytest.fixture
def client(server: Any, run_json: Command) -> Callable[[str], openai.OpenAI]:
    """client(tenant): made by the command line while the server runs."""

    def make(tenant: str) -> openai.OpenAI:
        key = run_json("tenant", "create", tenant)["api_key"]
        return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)

    return make


def test_ready_is_an_event_once_requests_are_served(server: Any) -> None:
    ready = server.events[-1]
    assert ready == {
        "event": "ready",
        "url": server.url,
        "base": "tiny",
        "auth": "on",
        "pid": server.process.pid,
    }
    assert [event["event"] for event in server.events if event["event"] != "stage"] == [
        "admin_key",
        "store_checked",
        "memory",
        "ready",
    ]


def test_the_memory_plan_is_an_event(server: Any) -> None:
    plan = next(event for event in server.events if event["event"] == "memory")
    assert plan["kv_bytes"] <= 16 << 20
    assert plan["adapter_pool_bytes"] == 16 << 20
    assert plan["num_blocks"] * plan["block_size"] > 1000


def test_the_admin_key_made_at_the_first_start_opens_the_admin_routes(server: Any, served_dir: Path) -> None:
    event = next(event for event in server.events if event["event"] == "admin_key")
    path = served_dir / "admin.key"
    assert path.read_text().strip() == event["admin_key"]
    assert path.stat().st_mode & 0o777 == 0o600
    headers = {"Authorization": f"Bearer {event['admin_key']}"}
    assert httpx.get(f"{server.url}/admin/tenants", headers=headers).status_code == 200
    assert httpx.get(f"{server.url}/admin/tenants", headers={"Authorization": "Bearer other"}).status_code == 401


def test_a_tenant_and_an_adapter_made_while_it_runs_answer_a_second_later(
    client: Callable[[str], openai.OpenAI], run_json: Command, adapters: dict[str, Path]
) -> None:
    acme = client("acme")

    def answer(model: str) -> str | None:
        prompt = [{"role": "user", "content": "What is a contract?"}]
        said = acme.chat.completions.create(model=model, messages=prompt, max_tokens=12, temperature=0)
        return said.choices[0].message.content

    run_json("adapter", "push", adapters["law"], "--tenant", "acme", "--name", "style")
    first = answer("style")
    assert first != answer("tiny")
    assert sorted(model.id for model in acme.models.list()) == ["style", "tiny"]
    run_json("adapter", "push", adapters["med"], "--tenant", "acme", "--name", "style")
    wait_until(lambda: answer("style") != first)
    assert answer("style@1") == first


def test_another_tenant_does_not_reach_it(
    client: Callable[[str], openai.OpenAI], run_json: Command, adapter: Path
) -> None:
    client("globex")
    run_json("adapter", "push", adapter, "--tenant", "globex", "--name", "secret")
    with pytest.raises(openai.NotFoundError):
        client("initech").completions.create(model="secret", prompt="x", max_tokens=2)


def test_an_adapter_deleted_while_it_runs_is_gone_within_a_second(
    client: Callable[[str], openai.OpenAI], run_json: Command, adapter: Path
) -> None:
    hooli = client("hooli")
    run_json("adapter", "push", adapter, "--tenant", "hooli", "--name", "law")
    assert hooli.completions.create(model="law", prompt="x", max_tokens=2).choices
    run_json("adapter", "delete", "law", "--tenant", "hooli")

    def is_gone() -> bool:
        try:
            hooli.completions.create(model="law", prompt="x", max_tokens=2)
        except openai.NotFoundError:
            return True
        return False

    wait_until(is_gone)


def test_a_second_server_on_the_port_is_refused_before_it_loads_anything(
    server: Any, run_json: Command, base: Path, tmp_path: Path
) -> None:
    unreadable = shutil.copytree(base, tmp_path / "unreadable")
    (unreadable / "model.safetensors").write_bytes(b"")
    error = run_json("serve", "--base", unreadable, "--port", server.url.rpartition(":")[2])["error"]
    assert error["code"] == "port_in_use"
    assert "--port" in error["message"]


def test_a_single_server_loads_nothing_of_a_fleet(server: Any) -> None:
    """No library of a database server, an object store or a cluster is in its memory."""
    loaded = Path("/proc", str(server.process.pid), "maps").read_text()
    assert "/torch/" in loaded
    assert [name for name in ("psycopg", "obstore", "/ray/", "grpc") if name in loaded] == []


def test_sigterm_lets_a_stream_come_to_its_end_and_exits_0(
    serve_process: Command, wait_ready: Command, run_json: Command, base: Path, tmp_path: Path
) -> None:
    key = "an-admin-key-of-ours"
    data_dir, objects = tmp_path / "data", tmp_path / "objects"
    options = ("--base", base, "--served-name", "mine", "--data-dir", data_dir, "--auth", "off")
    environment = {"MULTILORA_ADMIN_KEY": key, "MULTILORA_BLOB_URL": objects.as_uri()}
    with serve_process(*options, env=environment) as server:
        wait_ready(server)
        body = {"model": "mine", "prompt": "x", "max_tokens": 200, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: {")
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert server.ended() == 0
    assert f"ready on {server.url}" in server.lines
    assert any("KV cache" in line for line in server.lines)
    assert any(line.startswith("--auth off: ") for line in server.lines)
    assert "commands need the server's own MULTILORA_BLOB_URL" in server.lines
    assert server.lines[-1] == "stopped"
    assert not any(key in line for line in (*server.lines, *server.log))
    assert not (data_dir / "admin.key").exists()
    assert not any("Traceback" in line for line in server.log)


LONG_STREAM = {"model": "tiny", "prompt": "x", "max_tokens": 500, "ignore_eos": True, "stream": True, "n": 16}


def test_a_server_stopped_twice_cuts_its_streams(
    serve_process: Command, wait_ready: Command, base: Path, tmp_path: Path
) -> None:
    with serve_process("--base", base, "--data-dir", tmp_path, "--auth", "off", "--drain-s", "3600") as server:
        wait_ready(server)
        with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG_STREAM, timeout=600) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: {")
            start_s = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: httpx.get(f"{server.url}/ready").status_code == 503)
            server.process.send_signal(signal.SIGTERM)
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
        assert server.ended() == 0
        assert time.monotonic() - start_s < 600  # not the 3,600 s of the drain
    assert server.lines[-1] == "stopped"


def test_sigint_while_it_loads_exits_0(serve_process: Command, base: Path, tmp_path: Path) -> None:
    options = ("--base", base, "--data-dir", tmp_path)
    with serve_process(*options) as server:
        wait_until(lambda: server.lines)
        assert server.stop(signal.SIGINT) == 0
    assert server.lines[-1] == "stopped"
    assert not any("ready on" in line for line in server.lines)
    assert not any("Traceback" in line for line in server.log)


def test_a_stream_that_outlives_the_drain_is_told_and_the_server_stops_in_order(
    server: Any, client: Callable[[str], openai.OpenAI]
) -> None:
    """Last in this file: it ends the shared server."""
    headers = {"Authorization": f"Bearer {client('umbrella').api_key}"}
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json=LONG_STREAM, headers=headers, timeout=60
    ) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: {")
        server.process.send_signal(signal.SIGTERM)
        *_, error, done = [line for line in lines if line]
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "server_stopping"
    assert done == "data: [DONE]"
    assert server.ended() == 0
    assert [event["event"] for event in server.events[-2:]] == ["stopping", "stopped"]
    logged = [json.loads(line) for line in server.log]
    assert {"time", "level", "logger", "message"} <= set(logged[-1])
    assert not any("exception" in record for record in logged)
