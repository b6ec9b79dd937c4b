"""Three servers on one PostgreSQL, requests to any of them: a tenant gets its quota once, not three times."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from adapters_store.accounts.records import Quotas
from server.engine.request import Request, TokenEvent
from support.servers import postgres
from support.servers.waiting import wait_until
from support.worlds.fleet import IS_LONG, Replica, fleet

RATE = 60 if IS_LONG else 20
NUM_REQUESTS = 25 * RATE if IS_LONG else 42
NUM_CLIENTS = 12 if IS_LONG else 6


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.PostgresServer]:
    with postgres.server() as server:
        yield server


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory, server: postgres.PostgresServer) -> Iterator[list[Replica]]:
    with fleet(tmp_path_factory.mktemp("quotas") / "data", server.url, 3, step_s=0.001) as replicas:
        yield replicas


class Tenant:
    """With quotas, asking for the base at a server drawn by chance."""

    def __init__(self, replicas: list[Replica], name: str, quotas: Quotas) -> None:
        self._replicas = replicas
        self.name = name
        self.key = replicas[0].store.tenants.create(name).api_key
        replicas[0].store.quotas.set(name, quotas)
        for replica in replicas:
            wait_until(lambda replica=replica: replica.store.quotas.get(name) == quotas)  # type: ignore[misc]

    def ask(self, seed: int, max_tokens: int = 4, prompt: str = "Hi") -> httpx.Response:
        replica = random.Random(seed).choice(self._replicas)
        return replica.ask(self.key, "tiny", max_tokens=max_tokens, prompt=prompt)

    def ask_all(self, num: int, max_tokens: int = 2, prompt: str = "Hi") -> tuple[list[httpx.Response], float]:
        """Answers, and the seconds that they took together."""
        start_s = time.monotonic()
        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            answers = list(pool.map(lambda seed: self.ask(seed, max_tokens, prompt), range(num)))
        return answers, time.monotonic() - start_s


def codes(answers: list[httpx.Response]) -> set[tuple[int, str | None]]:
    return {(each.status_code, None if each.is_success else each.json()["error"]["code"]) for each in answers}


def test_requests_a_minute(replicas: list[Replica]) -> None:
    tenant = Tenant(replicas, "requests", Quotas(requests_per_minute=RATE))
    answers, taken_s = tenant.ask_all(NUM_REQUESTS)
    assert codes(answers) == {(200, None), (429, "requests_per_minute")}
    num_served = sum(each.is_success for each in answers)
    print(f"{RATE} a minute: {num_served} of {NUM_REQUESTS} served in {taken_s:.1f} s")
    assert RATE <= num_served <= RATE + RATE / 60 * taken_s + 1


def test_tokens_a_minute(replicas: list[Replica]) -> None:
    tenant = Tenant(replicas, "tokens", Quotas(tokens_per_minute=100 * RATE))
    answers, taken_s = tenant.ask_all(NUM_REQUESTS, prompt="x" * 98)
    assert codes(answers) == {(200, None), (429, "tokens_per_minute")}
    used = sum(each.json()["usage"]["total_tokens"] for each in answers if each.is_success)
    allowed = 100 * RATE * (1 + taken_s / 60)
    print(f"{100 * RATE} tokens a minute: {used} of {allowed:.0f} used in {taken_s:.1f} s")
    assert 100 * (RATE - 1) <= used <= 1.02 * allowed


def test_sequences_at_once(replicas: list[Replica], monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted where they run: from the submission to the engine to their last event."""
    counted = Counter[str]()
    for replica in replicas:
        monkeypatch.setattr(replica.engine, "submit", counting(replica.engine.submit, counted))
    tenant = Tenant(replicas, "at-once", Quotas(max_concurrent=2))
    answers, _ = tenant.ask_all(NUM_REQUESTS // 3, max_tokens=8)
    assert codes(answers) == {(200, None), (429, "concurrency_limit")}
    print(f"2 at once: {counted['most']} at most, {sum(each.is_success for each in answers)} of {len(answers)} served")
    assert counted["most"] == 2
    wait_until(lambda: tenant.ask(0).is_success)


def counting(submit: Callable[..., None], counted: Counter[str]) -> Callable[..., None]:
    lock = threading.Lock()

    def submit_counted(request: Request, listener: Callable[[TokenEvent], None]) -> None:
        def listen(event: TokenEvent) -> None:
            if event.finish_reason is not None:
                with lock:
                    counted["now"] -= 1
            listener(event)

        with lock:
            counted["now"] += 1
            counted["most"] = max(counted["most"], counted["now"])
        submit(request, listen)

    return submit_counted


def test_headers_say_what_is_left_wherever_it_was_used(replicas: list[Replica]) -> None:
    tenant = Tenant(replicas, "headers", Quotas(requests_per_minute=6, tokens_per_minute=6000))
    left = []
    for replica in replicas * 2:
        answer = replica.ask(tenant.key, "tiny", max_tokens=2)
        assert answer.status_code == 200
        assert answer.headers["x-ratelimit-limit-requests"] == "6"
        left.append(int(answer.headers["x-ratelimit-remaining-requests"]))
    assert left == [5, 4, 3, 2, 1, 0]
    refused = replicas[0].ask(tenant.key, "tiny")
    assert (refused.status_code, refused.headers["x-ratelimit-remaining-requests"]) == (429, "0")
    assert 1 <= int(refused.headers["retry-after"]) <= 10


def test_what_can_never_fit_is_refused_for_good(replicas: list[Replica]) -> None:
    tenant = Tenant(replicas, "large", Quotas(tokens_per_minute=10, max_concurrent=1))
    answer = tenant.ask(0, max_tokens=50)
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "request_exceeds_quota")
    assert answer.headers["x-should-retry"] == "false"
    assert tenant.ask(1, max_tokens=4).is_success, "a refusal takes nothing"


def test_a_refused_body_costs_its_request_and_a_refused_call_does_not(replicas: list[Replica]) -> None:
    tenant = Tenant(replicas, "bodies", Quotas(requests_per_minute=3, tokens_per_minute=50))
    headers = {"authorization": f"Bearer {tenant.key}"}
    assert replicas[0].client.post("/v1/completions", json={"model": 3}, headers=headers).status_code == 400
    assert tenant.ask(0, max_tokens=100).json()["error"]["code"] == "request_exceeds_quota"
    answer = tenant.ask(1)
    assert answer.headers["x-ratelimit-remaining-requests"] == "1"


def test_one_that_hangs_up_gives_back_what_it_did_not_use(replicas: list[Replica]) -> None:
    tenant = Tenant(replicas, "hanging-up", Quotas(max_concurrent=1, tokens_per_minute=6000))
    body = {"model": "tiny", "prompt": "Hi", "max_tokens": 400, "ignore_eos": True, "stream": True}
    headers = {"authorization": f"Bearer {tenant.key}"}
    replicas[0].engine.stalls_at = replicas[0].engine.num_steps + 5
    with replicas[0].client.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
        lines = answer.iter_lines()  # kept: its end would close the connection
        next(lines)
        assert replicas[1].ask(tenant.key, "tiny").status_code == 429
    replicas[0].engine.resume()
    wait_until(lambda: all(replica.ask(tenant.key, "tiny").is_success for replica in replicas))


def test_without_the_database_each_server_counts_by_itself(
    replicas: list[Replica], server: postgres.PostgresServer
) -> None:
    """The last test here: its database stops."""
    tenant = Tenant(replicas, "alone", Quotas(requests_per_minute=4))
    for replica in replicas:
        assert replica.ask(tenant.key, "tiny").is_success
    server.stop()
    for replica in replicas:
        seen = [replica.ask(tenant.key, "tiny").status_code for _ in range(8)]
        assert seen == [200] * 4 + [429] * 4
    server.start()
    wait_until(lambda: tenant.ask(0).status_code == 200)
