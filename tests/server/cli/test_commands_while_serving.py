"""Commands beside a running server: what they change it follows, what it did they show; its traces are collected."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.servers.otlp_receiver import Receiver, receiving
from support.servers.waiting import wait_until

Command = Callable[..., Any]
HEADER = "x-multilora-adapter-version"


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def served_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def server(
    serve_process: Command, wait_ready: Command, base: Path, served_dir: Path, receiver: Receiver
) -> Iterator[Any]:
    options = ("--log-format", "json", "--otlp-endpoint", receiver.url, "--data-dir", served_dir)
    with serve_process("--base", base, "--json", *options) as server:
        wait_ready(server)
        yield server


@pytest.fixture
def data_dir(served_dir: Path) -> Path:
    """The commands here work on the directory that is being served."""
    return served_dir


@pytest.fixture
def acme(server: Any, run_json: Command) -> httpx.Client:
    """A client of a tenant of the test's own."""
    run_json("tenant", "create", "acme")
    key = run_json("tenant", "rotate-key", "acme")["api_key"]
    return httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {key}"}, timeout=300)


def ask(client: httpx.Client, model: str, **fields: Any) -> httpx.Response:
    return client.post("/v1/completions", json={"model": model, "prompt": "hello", "max_tokens": 4, **fields})


def resident(client: httpx.Client) -> float:
    found = re.search(r"^multilora_adapters_resident (\S+)$", client.get("/metrics").text, flags=re.MULTILINE)
    assert found is not None
    return float(found[1])


def test_a_server_follows_what_commands_change(
    acme: httpx.Client, run_json: Command, adapters: dict[str, Path]
) -> None:
    push = ("--tenant", "acme", "--name", "style")
    run_json("adapter", "push", adapters["law"], *push)
    run_json("adapter", "push", adapters["med"], *push, "--no-activate")
    wait_until(lambda: ask(acme, "style").headers.get(HEADER) == "style@1")
    run_json("adapter", "canary", "style@2", "--percent", "50", "--tenant", "acme")
    users = [f"user-{index}" for index in range(12)]
    wait_until(lambda: {ask(acme, "style", user=user).headers[HEADER] for user in users} == {"style@1", "style@2"})
    run_json("adapter", "promote", "style", "--tenant", "acme")
    wait_until(lambda: ask(acme, "style").headers[HEADER] == "style@2")
    run_json("adapter", "rollback", "style", "--tenant", "acme")
    wait_until(lambda: ask(acme, "style").headers[HEADER] == "style@1")

    wait_until(lambda: resident(acme) == 2)
    run_json("adapter", "unload", "style", "--tenant", "acme")
    wait_until(lambda: resident(acme) == 0)
    assert ask(acme, "style").json()["error"]["code"] == "adapter_unloaded"
    assert resident(acme) == 0
    run_json("adapter", "activate", "style@1", "--tenant", "acme")
    wait_until(lambda: ask(acme, "style").status_code == 200)
    wait_until(lambda: resident(acme) == 1)
    run_json("adapter", "delete", "style", "--tenant", "acme")
    wait_until(lambda: resident(acme) == 0)
    assert ask(acme, "style").json()["error"]["code"] == "model_not_found"


def test_what_was_served_is_shown_logged_and_traced(
    server: Any, run_json: Command, receiver: Receiver, served_dir: Path
) -> None:
    """Last in this file: the server is stopped, and everything it owes is written by then."""
    key = run_json("tenant", "create", "initech")["api_key"]
    headers = {"Authorization": f"Bearer {key}", "x-request-id": "asked-once"}
    answer = httpx.post(
        f"{server.url}/v1/completions", json={"model": "tiny", "prompt": "hi", "max_tokens": 4}, headers=headers
    ).json()
    assert server.stop(signal.SIGTERM) == 0
    told = run_json("usage", "--tenant", "initech")["total"]
    assert (told["requests"], told["completion_tokens"]) == (1, answer["usage"]["completion_tokens"])
    [line] = [json.loads(line) for line in server.log if "asked-once" in line and "server.api.access" in line]
    assert (line["tenant"], line["call"], line["status"]) == ("initech", answer["id"], 200)
    ids = {each.value.string_value for span in receiver.named("generate") for each in span.attributes}
    assert answer["id"] in ids
