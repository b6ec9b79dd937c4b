"""Quotas and deadlines over HTTP: set by an operator, held for the next request, told in headers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import httpx
import pytest

from adapters_store.accounts.records import Quotas
from adapters_store.store import AdapterStore
from support.servers.waiting import wait_until
from support.worlds.fake_engine import FakeEngine

ASK = {"model": "tiny", "prompt": "hello", "max_tokens": 5, "temperature": 0}
PATH = "/admin/tenants/acme/quotas"


@pytest.fixture(autouse=True)
def unlimited(store: AdapterStore, keys: dict[str, str]) -> Iterator[None]:
    yield
    for tenant in keys:
        store.quotas.set(tenant, Quotas())


def test_an_operator_sets_and_reads_quotas(admin: httpx.Client, keys: dict[str, str]) -> None:
    wanted = {"weight": 2.0, "requests_per_minute": 30, "tokens_per_minute": 9000, "max_concurrent": 4}
    assert admin.put(PATH, json=wanted).status_code == 200
    shown = admin.get(PATH).json()
    assert {field: shown[field] for field in wanted} == wanted
    assert shown["max_adapters"] is None


@pytest.mark.parametrize(
    "body", [{"weight": 0}, {"requests_per_minute": -1}, {"tokens_per_minute": 1.5}, {"jobs": 1}, {"weight": "x"}]
)
def test_a_bad_quota_is_a_400_that_names_the_field(
    admin: httpx.Client, keys: dict[str, str], body: dict[str, object]
) -> None:
    response = admin.put(PATH, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == next(iter(body))


def test_quotas_of_nobody_are_a_404(admin: httpx.Client) -> None:
    assert admin.get("/admin/tenants/nobody/quotas").status_code == 404
    assert admin.put("/admin/tenants/nobody/quotas", json={}).status_code == 404


@pytest.mark.parametrize("stream", [False, True])
def test_answers_within_the_quota_say_what_is_left(client: httpx.Client, admin: httpx.Client, stream: bool) -> None:
    admin.put(PATH, json={"requests_per_minute": 100, "tokens_per_minute": 10_000})
    response = client.post("/v1/completions", json={**ASK, "stream": stream})
    assert response.status_code == 200
    assert response.headers["x-ratelimit-limit-requests"] == "100"
    assert response.headers["x-ratelimit-limit-tokens"] == "10000"
    assert 0 <= int(response.headers["x-ratelimit-remaining-requests"]) < 100
    assert response.headers["x-ratelimit-reset-requests"].endswith("s")


@pytest.mark.parametrize("stream", [False, True])
def test_the_request_beyond_the_quota_is_a_429_and_the_other_tenant_goes_on(
    client: httpx.Client, other: httpx.Client, admin: httpx.Client, stream: bool
) -> None:
    admin.put(PATH, json={"requests_per_minute": 1})
    client.post("/v1/completions", json=ASK)
    refused = client.post("/v1/completions", json={**ASK, "stream": stream})
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "requests_per_minute"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert other.post("/v1/completions", json=ASK).status_code == 200


def test_a_request_larger_than_the_quota_says_do_not_retry(client: httpx.Client, admin: httpx.Client) -> None:
    admin.put(PATH, json={"tokens_per_minute": 50})
    refused = client.post("/v1/completions", json={**ASK, "max_tokens": 200})
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "request_exceeds_quota")
    assert refused.headers["x-should-retry"] == "false"
    assert client.post("/v1/completions", json=ASK).status_code == 200


def test_tokens_not_used_come_back_when_the_answer_ends(client: httpx.Client, admin: httpx.Client) -> None:
    admin.put(PATH, json={"tokens_per_minute": 400})
    for _ in range(5):  # each reserves 300 and uses a few
        response = client.post("/v1/completions", json={**ASK, "max_tokens": 290, "stop": ["h"]})
        assert response.status_code == 200, response.text


def test_sequences_under_way_are_limited_and_a_hang_up_frees_them(
    client: httpx.Client, admin: httpx.Client, fake_engine: FakeEngine
) -> None:
    admin.put(PATH, json={"max_concurrent": 2})
    fake_engine.step_s = 0.01
    try:
        with client.stream(
            "POST", "/v1/completions", json={**ASK, "n": 2, "max_tokens": 400, "ignore_eos": True, "stream": True}
        ) as held:
            lines = held.iter_lines()  # dropped, it would close the stream
            next(lines)
            refused = client.post("/v1/completions", json=ASK)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "concurrency_limit")
            assert refused.headers["retry-after"] == "1"
    finally:
        fake_engine.step_s = 0.0
    wait_until(lambda: client.post("/v1/completions", json=ASK).status_code == 200)


def test_the_request_carries_weight_price_and_deadline_to_the_engine(
    client: httpx.Client, admin: httpx.Client, fake_engine: FakeEngine
) -> None:
    admin.put(PATH, json={"weight": 3.5})
    client.post("/v1/completions", json=ASK, headers={"x-request-timeout-ms": "60000"})
    seen = fake_engine.seen[-1]
    assert seen.weight == 3.5
    assert seen.price == 1.0
    assert seen.deadline_s is not None
    client.post("/v1/completions", json=ASK)
    assert fake_engine.seen[-1].deadline_s is None


@pytest.mark.parametrize("value", ["0", "-5", "1e3", "1.5", "soon", "86400001", "9" * 5000])
def test_a_bad_deadline_is_a_400(client: httpx.Client, value: str) -> None:
    response = client.post("/v1/completions", json=ASK, headers={"x-request-timeout-ms": value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "x-request-timeout-ms"


def test_uploads_beyond_the_quota_are_a_409(
    client: httpx.Client, admin: httpx.Client, upload: Callable[..., httpx.Response]
) -> None:
    admin.put(PATH, json={"max_adapters": 1})
    assert upload(client, "one", seed=71).status_code == 201
    refused = upload(client, "two", seed=72)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "quota_adapters")
    assert refused.headers["x-should-retry"] == "false"
