"""GET /v1/usage sums to what clients were told: equal while the server lives, never over when it is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from adapters_store.accounts.usage import total_of
from adapters_store.store import AdapterStore
from support.servers.waiting import wait_until
from support.source_path import SOURCE_PATH

NUM_KILLS = int(os.environ.get("MULTILORA_USAGE_KILLS", "2"))
FLUSH_S = 0.05
MIN_SEEN_TOKENS = 200  # before a kill, however slow the machine is: several flush intervals
TESTS = Path(__file__).parents[3]
ASK = {"prompt": "hello there", "max_tokens": 12, "temperature": 0}
Upload = Callable[..., httpx.Response]


def total(client: httpx.Client, **params: str) -> dict[str, int]:
    answer = client.get("/v1/usage", params=params)
    assert answer.status_code == 200, answer.text
    summed: dict[str, int] = answer.json()["total"]
    return summed


def told(response: httpx.Response) -> dict[str, int]:
    usage = response.json()["usage"]
    return {
        "requests": 1,
        "prompt_tokens": usage["prompt_tokens"],
        "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
        "completion_tokens": usage["completion_tokens"],
    }


def added(*each: dict[str, int]) -> dict[str, int]:
    return {name: sum(one[name] for one in each) for name in each[0]}


def test_records_equal_what_the_answers_said(client: httpx.Client, upload: Upload) -> None:
    upload(client, "billed", seed=5)
    before = total(client)
    answers = [
        told(client.post("/v1/completions", json={"model": model, **ASK, "n": n}))
        for model in ("tiny", "billed", "billed@1")
        for n in (1, 3)
    ]
    chat = {"model": "billed", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
    answers.append(told(client.post("/v1/chat/completions", json=chat)))
    assert total(client) == added(before, *answers)


def test_a_stream_is_billed_as_its_last_chunk_says(client: httpx.Client) -> None:
    before = total(client)
    body = {"model": "tiny", **ASK, "stream": True, "stream_options": {"include_usage": True}}
    last = json.loads(client.post("/v1/completions", json=body).text.split("data: ")[-2])
    after = total(client)
    assert after["completion_tokens"] - before["completion_tokens"] == last["usage"]["completion_tokens"]
    assert after["prompt_tokens"] - before["prompt_tokens"] == last["usage"]["prompt_tokens"]


def test_what_was_refused_costs_nothing(client: httpx.Client) -> None:
    before = total(client)
    assert client.post("/v1/completions", json={"model": "none", **ASK}).status_code == 404
    assert client.post("/v1/completions", json={"model": "tiny", **ASK, "n": 0}).status_code == 400
    assert total(client) == before


def test_rows_tell_days_and_versions_apart_and_come_in_pages(
    client: httpx.Client, upload: Upload, store: AdapterStore
) -> None:
    upload(client, "rows", seed=1)
    client.post("/v1/completions", json={"model": "rows", **ASK})
    rows = client.get("/v1/usage").json()["data"]
    [row] = [row for row in rows if row["adapter"] == "rows@1"]
    assert (row["tenant"], row["requests"], row["completion_tokens"]) == ("acme", 1, 12)
    first = client.get("/v1/usage", params={"limit": 1}).json()
    rest = client.get("/v1/usage", params={"after": first["last_id"]}).json()
    assert first["data"] + rest["data"] == rows
    assert total(client, start="2999-01-01")["requests"] == 0


def test_a_tenant_sees_its_own_and_an_admin_everybodys(
    client: httpx.Client, other: httpx.Client, admin: httpx.Client
) -> None:
    for each in (client, other):
        each.post("/v1/completions", json={"model": "tiny", **ASK})
    for each, tenants in ((client, {"acme"}), (other, {"globex"}), (admin, {"acme", "globex"})):
        assert {row["tenant"] for row in each.get("/v1/usage").json()["data"]} >= tenants
    assert {row["tenant"] for row in client.get("/v1/usage").json()["data"]} == {"acme"}


def test_a_day_that_is_none_is_a_400(client: httpx.Client) -> None:
    response = client.get("/v1/usage", params={"start": "yesterday"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "start"


@contextmanager
def server_process(data_dir: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    script = TESTS / "support" / "servers" / "served_process.py"
    environment = {**os.environ, "PYTHONPATH": SOURCE_PATH}
    process = subprocess.Popen(
        [sys.executable, str(script), str(data_dir), str(FLUSH_S)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def stream_until_cut(url: str, tenant: str, seen: dict[str, int]) -> None:
    """Generate until the connection breaks; seen: completion tokens by request, as the chunks told them."""
    options = {"continuous_usage_stats": True}
    body: dict[str, Any] = {"model": "tiny", **ASK, "max_tokens": 40, "stream": True, "stream_options": options}
    with httpx.Client(base_url=url, headers={"X-Tenant-Id": tenant}, timeout=300) as client:
        for index in range(10_000):
            try:
                with client.stream("POST", "/v1/completions", json=body) as response:
                    for line in response.iter_lines():
                        if line.startswith("data: {"):
                            usage = json.loads(line[6:])["usage"]
                            seen[f"{tenant}/{index}"] = usage["prompt_tokens"] * 1_000_000 + usage["completion_tokens"]
            except httpx.TransportError:
                return


def has_seen_enough(seen: dict[str, int], prefix: str) -> bool:
    """Whether the clients so named have seen that many generated tokens."""
    return sum(each % 1_000_000 for name, each in list(seen.items()) if name.startswith(prefix)) >= MIN_SEEN_TOKENS


def test_across_kill_9_records_are_never_more_than_clients_were_told_and_lose_one_interval(tmp_path: Path) -> None:
    seen: dict[str, int] = {}
    for run in range(NUM_KILLS):
        with server_process(tmp_path) as (process, url):
            clients = [
                threading.Thread(target=stream_until_cut, args=(url, f"t{run}-{index}", seen)) for index in range(3)
            ]
            for client in clients:
                client.start()
            clients[0].join(0.6 + 0.13 * (run % 5))
            wait_until(partial(has_seen_enough, seen, f"t{run}-"))
            process.send_signal(signal.SIGKILL)
            for client in clients:
                client.join()
    store = AdapterStore.open(tmp_path)
    recorded = total_of(store.usage.rows())
    store.close()
    prompt, output = sum(each // 1_000_000 for each in seen.values()), sum(each % 1_000_000 for each in seen.values())
    print(f"{NUM_KILLS} kills: clients saw {prompt}+{output}, recorded {recorded}")
    assert recorded.output_tokens <= output
    assert recorded.prompt_tokens <= prompt
    assert recorded.requests <= len(seen)
    assert recorded.output_tokens > 0.5 * output, "more than one flush interval is missing"
