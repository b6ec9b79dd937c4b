"""Every answer that is no success has OpenAI's error body and a request id, also where nothing of ours was reached."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from adapters_store.errors import AdapterRejected, AdapterUnavailable, BlobDamaged, Conflict, NotFound, StoreError
from adapters_store.store import AdapterStore
from server.api.wire.errors import ApiError, from_engine, to_api_error
from server.engine.request import RequestError
from support.worlds.fake_engine import FakeEngine

ASK = {"model": "tiny", "prompt": "hello", "max_tokens": 1}


def assert_is_error(response: httpx.Response, status: int) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.json().keys() == {"error"}
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]


def test_unknown_route_is_a_404(client: httpx.Client) -> None:
    for path in ("/", "/v1", "/v1/engines", "/docs", "/v1/completions/", "/%00", "/v1/../admin"):
        assert_is_error(client.get(path), 404)
    told = client.get("/v1/v1/models").json()["error"]["message"]
    assert told == "GET /v1/v1/models: Not Found"


def test_a_long_path_is_told_in_part(client: httpx.Client) -> None:
    assert len(client.get("/" + "x" * 4000).json()["error"]["message"]) < 300


def test_wrong_method_is_a_405_with_the_right_one(client: httpx.Client) -> None:
    response = client.get("/v1/completions")
    assert_is_error(response, 405)
    assert response.headers["allow"] == "POST"
    assert response.json()["error"]["message"] == "GET /v1/completions: Method Not Allowed"


def test_what_is_not_http_gets_the_same_body(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(b"HELLO\r\n\r\n")
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'{"error":{"message":' in answer


def test_a_fault_of_ours_tells_nothing_but_the_request_id(
    client: httpx.Client, store: AdapterStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the secret path /srv/keys")

    monkeypatch.setattr(store, "resolve", broken)
    with caplog.at_level(logging.ERROR):
        response = client.post("/v1/completions", json={**ASK, "model": "x"}, headers={"x-request-id": "find-me-1"})
    assert_is_error(response, 500)
    assert "secret" not in response.text
    assert "find-me-1" in response.json()["error"]["message"]
    assert response.headers["x-should-retry"] == "false"
    assert "find-me-1" in caplog.text
    assert "the secret path" in caplog.text


def test_a_harmless_request_id_comes_back_and_others_do_not(client: httpx.Client) -> None:
    assert client.get("/health", headers={"x-request-id": "abc-1:2.3"}).headers["x-request-id"] == "abc-1:2.3"
    for bad in ("a b", "x" * 129, "<script>", "é"):
        given = client.get("/health", headers={"x-request-id": bad.encode("latin-1")}).headers["x-request-id"]
        assert given != bad
        assert given.startswith("req_")


def test_two_requests_have_two_ids(client: httpx.Client) -> None:
    ids = {client.get("/health").headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (AdapterRejected("nan_values", "x"), 400),
        (AdapterRejected("too_large", "x"), 413),
        (NotFound("model_not_found", "x"), 404),
        (Conflict("tenant_exists", "x"), 409),
        (BlobDamaged("blob_damaged", "x"), 503),
        (AdapterUnavailable("wrong_base", "x"), 503),
        (StoreError("disk_full", "x"), 503),
    ],
)
def test_each_store_error_has_its_status(error: StoreError, status: int) -> None:
    answer = to_api_error(error)
    assert (answer.status, answer.code) == (status, error.code)


@pytest.mark.parametrize(("status", "kind"), [(400, "invalid_request_error"), (401, "authentication_error")])
@pytest.mark.parametrize("code", ["a", "b"])
def test_type_follows_status(status: int, kind: str, code: str) -> None:
    assert ApiError(status, code, "x").type == kind


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (429, {"retry-after": "1", "x-should-retry": "true"}),
        (503, {"x-should-retry": "false"}),
        (500, {"x-should-retry": "false"}),
        (400, {}),
    ],
)
def test_of_the_engines_failures_only_overload_invites_a_retry(status: int, headers: dict[str, str]) -> None:
    assert from_engine(RequestError("code", "message", status)).headers == headers


def test_retry_after_is_whole_seconds_rounded_up() -> None:
    assert ApiError(429, "x", "x", retry_after_s=1.2).headers["retry-after"] == "2"
    assert ApiError(429, "x", "x", retry_after_s=0.0).headers["retry-after"] == "1"


def test_openapi_describes_every_route_to_those_with_a_key(
    client: httpx.Client, connect: Callable[..., httpx.Client]
) -> None:
    assert connect(None).get("/openapi.json").status_code == 401
    paths = client.get("/openapi.json").json()["paths"]
    body = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "messages" in body["required"]
    assert "multipart/form-data" in paths["/v1/adapters"]["post"]["requestBody"]["content"]


def test_the_schema_is_made_and_encoded_off_the_event_loop(
    app: FastAPI, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes a large part of a second, and streams would wait for it."""
    on_loop, real = list[bool](), app.openapi

    def openapi() -> dict[str, Any]:
        on_loop.append(asyncio._get_running_loop() is not None)
        return real()

    monkeypatch.setattr(app, "openapi", openapi)
    assert client.get("/openapi.json").json() == real()
    assert on_loop == [False]


def test_a_dead_engine_is_unhealthy_and_an_unready_one_not_ready(
    connect: Callable[..., httpx.Client], fake_engine: FakeEngine, data_dir: Path
) -> None:
    anyone = connect(None)
    assert anyone.get("/health").json() == {"status": "ok"}
    assert anyone.get("/ready").json() == {"status": "ready"}
    fake_engine.ready = False
    assert_is_error(anyone.get("/ready"), 503)
    assert anyone.get("/ready").headers["retry-after"] == "1"
    assert anyone.get("/health").status_code == 200
    fake_engine.__exit__()
    assert_is_error(anyone.get("/health"), 503)
