"""What probes and browsers send besides GET and POST: HEAD everywhere, and preflights where origins are allowed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.types import Message, Receive, Scope, Send

from adapters_store.store import AdapterStore
from server.api.app import create_app
from server.api.edge.head_method import HeadAsGet
from server.api.engine_client import EngineClient
from server.api.settings import ApiSettings
from support.servers.live_server import serving

PAGE = "https://app.example.com"
PREFLIGHT = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
}


@pytest.fixture(scope="module")
def open_url(engine: EngineClient, store: AdapterStore, settings: ApiSettings) -> Iterator[str]:
    """Of a server that lets PAGE in."""
    own = create_app(engine=engine, store=store, settings=replace(settings, cors_origins=(PAGE, "http://[::1]:3000")))
    with serving(own) as url:
        yield url


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models", "/v1/models/tiny", "/openapi.json"])
def test_head_is_get_without_the_body(client: httpx.Client, path: str) -> None:
    for _ in range(2):  # on one connection: a body would be taken for the next answer
        asked, whole = client.head(path), client.get(path)
        assert (asked.status_code, asked.content) == (200, b"")
        assert asked.headers["content-type"] == whole.headers["content-type"]


def test_head_of_every_route_asks_for_a_key_as_get_does(app: FastAPI, url: str, client: httpx.Client) -> None:
    paths = [route.path for route in app.routes if isinstance(route, APIRoute) and "GET" in route.methods]
    assert len(paths) > 10
    with httpx.Client(base_url=url, timeout=300) as stranger:
        for path in paths:
            for caller in (stranger, client):
                assert caller.head(path).status_code == caller.get(path).status_code, path


def test_head_of_a_route_without_get_is_a_405(client: httpx.Client) -> None:
    assert client.head("/v1/completions").status_code == 405


def test_head_is_counted_as_head_of_its_route(client: httpx.Client) -> None:
    client.head("/v1/models")
    assert 'multilora_http_requests_total{method="HEAD",route="/v1/models",status="200"}' in client.get("/metrics").text


def test_a_preflight_needs_no_key_and_names_what_a_page_may_send(open_url: str) -> None:
    answer = httpx.options(f"{open_url}/v1/chat/completions", headers=PREFLIGHT)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert answer.headers["access-control-allow-headers"] == PREFLIGHT["Access-Control-Request-Headers"]


def test_the_page_may_read_answers_and_refusals(open_url: str, keys: dict[str, str]) -> None:
    ask = {"model": "tiny", "prompt": "hello", "max_tokens": 2}
    for key, status in ((keys["acme"], 200), ("ml-wrong", 401)):
        headers = {"Authorization": f"Bearer {key}", "Origin": PAGE}
        answer = httpx.post(f"{open_url}/v1/completions", json=ask, headers=headers, timeout=300)
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert answer.headers["access-control-expose-headers"] == "*"
        assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize("origin", ["https://evil.example.com", "https://app.example.com.evil.com", "null", "*"])
def test_another_page_is_not_let_in(open_url: str, origin: str) -> None:
    answer = httpx.options(f"{open_url}/v1/models", headers={**PREFLIGHT, "Origin": origin})
    assert answer.status_code == 400
    assert "access-control-allow-origin" not in answer.headers
    assert "access-control-allow-origin" not in httpx.get(f"{open_url}/health", headers={"Origin": origin}).headers


def test_without_the_option_no_page_is_let_in(url: str) -> None:
    answer = httpx.options(f"{url}/v1/models", headers=PREFLIGHT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "origin", ["app.example.com", "https://app.example.com/", "HTTPS://App.example.com", "ftp://a", "https://", ""]
)
def test_an_origin_that_no_browser_sends_is_refused_at_the_start(settings: ApiSettings, origin: str) -> None:
    with pytest.raises(ValueError, match="CORS origin"):
        replace(settings, cors_origins=(origin,))


def test_head_ends_an_answer_that_would_not_end() -> None:
    """As FileResponse reads a file: part after part until its end, which is not there."""
    parts = 0

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal parts
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4000000000")]})
        for _ in range(10_000):
            parts += 1
            await asyncio.sleep(0)  # a read on a thread
            await send({"type": "http.response.body", "body": b"x", "more_body": True})

    sent: list[Message] = []

    async def ask() -> None:
        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            sent.append(message)

        await HeadAsGet(endless)({"type": "http", "method": "HEAD"}, receive, send)

    asyncio.run(ask())
    assert parts <= 2
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[1] == {"type": "http.response.body", "body": b"", "more_body": False}
